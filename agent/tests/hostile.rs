//! The real binary against a peer that breaks the rules.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "clippy.toml lets tests fail loudly; clippy does not take the helpers of an integration test for tests"
)]

mod support;

use std::net::SocketAddr;
use std::sync::Arc;

use russh::client::{self, Handle};
use russh::keys::PublicKeyOrCertificate;
use support::{FREE_PORTS, HANG, Place};
use tokio::time::timeout;

struct Stranger;

impl client::Handler for Stranger {
    type Error = russh::Error;

    async fn check_server_key(&mut self, _: &PublicKeyOrCertificate) -> Result<bool, russh::Error> {
        Ok(true)
    }
}

async fn attest(address: SocketAddr) -> Handle<Stranger> {
    let mut handle = client::connect(Arc::new(client::Config::default()), address, Stranger).await.unwrap();
    assert!(handle.authenticate_none("attestation").await.unwrap().success());
    handle
}

/// More than any queue of the agent holds.
const MANY: usize = 200;

#[tokio::test]
async fn an_idle_session_channel_does_not_stall_its_session() {
    let place = Place::new();
    let mut agent = place.start(&FREE_PORTS, &[]);
    let stranger = attest(agent.address()).await;
    let session = stranger.channel_open_session().await.unwrap();
    for number in 0..MANY {
        session.set_env(false, format!("LC_{number}"), "x").await.unwrap();
        session.signal(russh::Sig::INT).await.unwrap();
    }
    timeout(HANG, stranger.send_ping()).await.expect("the session is stuck").unwrap();
}

#[tokio::test]
async fn eof_before_the_control_channel_does_not_stall_the_session() {
    let place = Place::new();
    let mut agent = place.start(&FREE_PORTS, &[]);
    let stranger = attest(agent.address()).await;
    let session = stranger.channel_open_session().await.unwrap();
    for _ in 0..MANY {
        session.eof().await.unwrap();
    }
    timeout(HANG, stranger.send_ping()).await.expect("the session is stuck").unwrap();
}

#[tokio::test]
async fn env_requests_up_to_the_limit_allow_the_control_channel() {
    let place = Place::new();
    let mut agent = place.start(&FREE_PORTS, &[]);
    let stranger = attest(agent.address()).await;
    let mut session = stranger.channel_open_session().await.unwrap();
    for number in 0..15 {
        session.set_env(false, format!("LC_{number}"), "x").await.unwrap();
    }
    session.request_subsystem(true, "secure-comms").await.unwrap();
    let hello = async {
        loop {
            if let Some(russh::ChannelMsg::Data { data }) = session.wait().await {
                return data;
            }
        }
    };
    let hello = timeout(HANG, hello).await.expect("the session is stuck");
    assert!(hello.starts_with(b"{\"hello\":"), "{hello:?}");
}

#[tokio::test]
async fn repeated_refusals_do_not_fill_the_log() {
    let place = Place::new();
    let mut agent = place.start(&FREE_PORTS, &[]);
    let stranger = attest(agent.address()).await;
    for _ in 0..MANY {
        let refused = stranger.channel_open_direct_tcpip("nowhere", 1, "127.0.0.1", 1).await;
        assert!(matches!(refused, Err(russh::Error::ChannelOpenFailure(_))), "{refused:?}");
    }
    assert_eq!(agent.terminate().code(), Some(0));
    let lines = agent.rest();
    let refusals = lines.matches("refusing a stream").count();
    assert!((1..=16).contains(&refusals), "{refusals} refusals are logged");
}

#[tokio::test]
async fn strangers_that_reconnect_do_not_fill_the_log() {
    let place = Place::new();
    let mut agent = place.start(&FREE_PORTS, &[]);
    let address = agent.address();
    for number in 0..MANY {
        let mut stranger =
            client::connect(Arc::new(client::Config::default()), address, Stranger).await.unwrap();
        // Each user name would be a line, and the end of the connection another.
        for attempt in 0..3 {
            let user = format!("user{number}-{attempt}");
            if stranger.authenticate_none(user).await.is_err() {
                break;
            }
        }
        drop(stranger);
        drop(attest(address).await);
    }
    assert_eq!(agent.terminate().code(), Some(0));
    let log = agent.rest();
    let lines = log.lines().filter(|line| line.contains("connection from")).count();
    // Those of one minute, or of two.
    assert!((1..=2 * (20 + 20 + 60)).contains(&lines), "{lines} lines of {MANY} strangers:\n{log}");
    let refused = log.lines().filter(|line| line.contains("refused")).count();
    assert!(refused <= 40, "{refused} refusals are logged");
}

// The log is read by a blocking call.
#[tokio::test(flavor = "multi_thread")]
async fn the_fields_of_an_agents_hello_are_not_logged() {
    let place = Place::new();
    let mut agent = place.start(&FREE_PORTS, &[]);
    let stranger = attest(agent.address()).await;
    let session = stranger.channel_open_session().await.unwrap();
    session.request_subsystem(true, "secure-comms").await.unwrap();
    let list = vec!["\"SHA256:canary\""; 1000].join(",");
    let config =
        format!(r#""pod_id":"canary","worker_nodes":[{list}],"inbounds":[{list}],"user_data":"canary""#);
    let text = format!(r"canary\u001b\u2028{}", "a".repeat(20_000));
    let hello =
        format!(r#"{{"hello":{{"version":1,"pod_id":"p1","init_data":"{text}","config":{{{config}}}}}}}"#);
    session.data_bytes((hello + "\n").into_bytes()).await.unwrap();
    agent.says("adaptor identified; pod p1");
    assert_eq!(agent.terminate().code(), Some(0));
    let rest = agent.rest();
    assert!(!rest.contains("canary"), "{rest}");
}

// The log is read by a blocking call.
#[tokio::test(flavor = "multi_thread")]
async fn a_hello_with_thousands_of_names_is_one_line() {
    let place = Place::new();
    let mut agent = place.start(&FREE_PORTS, &[]);
    let stranger = attest(agent.address()).await;
    let session = stranger.channel_open_session().await.unwrap();
    session.request_subsystem(true, "secure-comms").await.unwrap();
    let names: Vec<String> = (0..5000).map(|number| format!("\"n{number}\"")).collect();
    let hello =
        format!(r#"{{"hello":{{"version":1,"outbounds":[{}],"inbounds":[]}}}}"#, names.join(",")) + "\n";
    session.data_bytes(hello.into_bytes()).await.unwrap();
    let line = agent.says("tunnels of the Attestation phase: ");
    assert!(line.contains("n0, n1,") && line.ends_with(" and 4992 more"), "{line}");
    assert_eq!(agent.terminate().code(), Some(0));
    let rest = agent.rest();
    assert!(!rest.contains("no matching"), "{rest}");
}
