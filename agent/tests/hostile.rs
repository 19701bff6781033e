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
