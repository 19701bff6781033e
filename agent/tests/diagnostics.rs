//! The real binary with a log and a systemd that nothing reads: it serves on.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "clippy.toml lets tests fail loudly; clippy does not take the helpers of an integration test for tests"
)]

mod support;

use std::io::Read;
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::sync::Arc;

use nix::fcntl::{FcntlArg, fcntl};
use russh::client::{self, Handle};
use russh::keys::PublicKeyOrCertificate;
use support::{Agent, FREE_PORTS, HANG, Place, Systemd, free_address};
use tokio::time::{Duration, sleep, timeout};

struct Client;

impl client::Handler for Client {
    type Error = russh::Error;

    async fn check_server_key(&mut self, _: &PublicKeyOrCertificate) -> Result<bool, russh::Error> {
        Ok(true)
    }
}

/// Logs in, and makes the agent refuse a few streams, which it logs.
async fn log_in(address: SocketAddr) {
    let attest = async {
        let mut handle: Handle<Client> = loop {
            match client::connect(Arc::new(client::Config::default()), address, Client).await {
                Ok(handle) => break handle,
                // It may not listen yet.
                Err(_) => sleep(Duration::from_millis(20)).await,
            }
        };
        assert!(handle.authenticate_none("attestation").await.unwrap().success());
        for _ in 0..20 {
            handle.channel_open_direct_tcpip("nowhere", 1, "127.0.0.1", 1).await.unwrap_err();
        }
    };
    timeout(HANG, attest).await.expect("the agent hangs");
}

/// Lines that one login causes at level debug, roughly, times this: more than any queue takes.
const LOGINS: usize = 60;

/// Starts an agent whose log goes to `stderr`, with a systemd that reads nothing. Logs in many times, then reads the log.
async fn serves_on_unread(stderr: impl Into<Stdio>, log: impl Read + 'static) {
    let place = Place::new();
    let (_systemd, notify) = (Systemd::new(&place), place.path("notify"));
    // The log that names the address is not read.
    let address = free_address();
    let text = address.to_string();
    let args = [&FREE_PORTS[..], &["-secure-comms-listen", &text]].concat();
    let env = [("NOTIFY_SOCKET", notify.to_str().unwrap()), ("SECURE_COMMS_LOG", "debug")];
    let mut agent = place.start_logging_to(&args, &env, stderr.into(), log);
    for _ in 0..LOGINS {
        log_in(address).await;
    }
    let lost = reads_on(&mut agent);
    assert!(lost > 0, "{lost} messages were lost");
    assert_eq!(agent.terminate().code(), Some(0));
    assert!(agent.rest().contains("stopping"), "later lines are written");
}

/// Reads up to the line about lost messages; returns their number.
fn reads_on(agent: &mut Agent) -> u64 {
    let line = agent.says("<4>log: ");
    let (number, rest) = line.split_once(' ').unwrap();
    assert!(rest.starts_with("messages were lost"), "{line}");
    number.parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pipe_that_is_not_read_stops_nothing() {
    let (reader, writer) = std::io::pipe().unwrap();
    fcntl(&writer, FcntlArg::F_SETPIPE_SZ(4096)).unwrap();
    serves_on_unread(writer, reader).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_journal_that_is_not_read_stops_nothing() {
    let (reader, writer) = UnixStream::pair().unwrap();
    serves_on_unread(std::os::fd::OwnedFd::from(writer), reader).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_ends_while_its_log_is_not_read() {
    let (place, address) = (Place::new(), free_address());
    let text = address.to_string();
    let args = [&FREE_PORTS[..], &["-secure-comms-listen", &text]].concat();
    let (reader, writer) = std::io::pipe().unwrap();
    fcntl(&writer, FcntlArg::F_SETPIPE_SZ(4096)).unwrap();
    let mut agent = place.start_logging_to(
        &args,
        &[("SECURE_COMMS_LOG", "debug")],
        writer.try_clone().unwrap().into(),
        reader,
    );
    for _ in 0..10 {
        log_in(address).await;
    }
    // A second agent on the same pipe can say nothing about its fault, and ends all the same.
    let mut second = place.start_logging_to(&args, &[], writer.into(), std::io::empty());
    assert_eq!(second.exits().code(), Some(1));
    assert_eq!(agent.terminate().code(), Some(0));
}
