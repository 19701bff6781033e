//! The `connect` command as a process: output lines, exit codes, signals.
#![allow(clippy::unwrap_used)]

#[path = "../../adaptor/tests/support/mod.rs"]
mod support;

use std::process::{Output, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use secure_comms_adaptor::store::{DirectoryStore, Store};
use support::agent::{Agent, Mode};
use support::{Lines, PATIENCE, pod};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::time::timeout;

fn connect(store: &std::path::Path, kbs: &url::Url, agent: &Agent, more: &[&str]) -> (Child, Lines) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_secure-comms-adaptor"))
        .args(["connect", "--pod-id", pod().as_str(), "--address", &agent.address.to_string(), "--store"])
        .arg(store)
        .args(["--kbs", "127.0.0.1:9", "--kbs-url", kbs.as_str()])
        .args(more)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let lines = Lines::default();
    let (printed, mut out) = (lines.clone(), BufReader::new(child.stdout.take().unwrap()).lines());
    tokio::spawn(async move {
        while let Some(line) = out.next_line().await.unwrap() {
            printed.push(line);
        }
    });
    (child, lines)
}

async fn ends(child: Child) -> Output {
    timeout(PATIENCE, child.wait_with_output()).await.unwrap().unwrap()
}

fn signal(child: &Child, signal: Signal) {
    kill(Pid::from_raw(child.id().unwrap().try_into().unwrap()), signal).unwrap();
}

async fn latched(store: &DirectoryStore) -> Mode {
    let node = store.worker_node_key().await.unwrap().public().unwrap();
    Mode::kubernetes(store.pod_key(&pod()).await.unwrap(), node)
}

#[tokio::test]
async fn connect_prints_each_event_and_ends_on_a_signal() {
    let directory = tempfile::tempdir().unwrap();
    let (kbs, asked) = support::kbs().await;
    let agent = Agent::start(Mode::attestation()).await;
    let store = directory.path().join("store");
    let (child, lines) = connect(&store, &kbs, &agent, &[]);
    agent.seen.wait("hello", 1).await;
    agent.keys(3, "not yet");
    lines.wait("keys: attempt 3: not yet", 1).await;
    agent.upgrade(latched(&DirectoryStore::open(&store).unwrap()).await);
    lines.wait("kubernetes phase up", 1).await;
    let first = lines.all()[0].clone();
    let local = first.strip_prefix("inbound KATAAGENT listens on ").unwrap();
    support::echoes(local).await;
    signal(&child, Signal::SIGTERM);
    let output = ends(child).await;
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    lines.wait("pod pod-1: stopped", 1).await;
    agent.seen.wait("the peer said bye: the adaptor ends", 1).await;
    assert_eq!(asked.count("DELETE"), 0);
    let address = agent.address;
    let expected = [
        first,
        format!("pod pod-1: attestation: connected to {address}"),
        "pod pod-1: tunnel KATAAGENT, Attestation phase: the agent serves it, but no --inbounds tag here listens for it".to_owned(),
        "pod pod-1: keys: attempt 3: not yet".to_owned(),
        "pod pod-1: attestation done; reconnecting for the Kubernetes phase".to_owned(),
        format!("pod pod-1: kubernetes phase up at {address}"),
        "pod pod-1: stopped".to_owned(),
    ];
    // On a machine under load a start takes longer than a second, and then says what it waits for.
    let lines: Vec<_> =
        lines.all().into_iter().filter(|line| !line.starts_with("pod pod-1: waiting for ")).collect();
    assert_eq!(lines, expected);
}

#[tokio::test]
async fn delete_on_exit_deletes_the_pod() {
    let directory = tempfile::tempdir().unwrap();
    let (kbs, asked) = support::kbs().await;
    let store = directory.path().join("store");
    let opened = DirectoryStore::open(&store).unwrap();
    let agent = Agent::start(latched(&opened).await).await;
    let (child, lines) = connect(&store, &kbs, &agent, &["--delete-on-exit"]);
    lines.wait("kubernetes phase up", 1).await;
    signal(&child, Signal::SIGINT);
    assert_eq!(ends(child).await.status.code(), Some(0));
    assert_eq!(asked.count("DELETE /kbs/v0/resource/default/pp-pod-1/privateKey"), 1);
    assert!(opened.known_pod_key(&pod()).await.unwrap().is_none());
}

#[tokio::test]
async fn a_failed_start_prints_its_cause_in_one_line() {
    let directory = tempfile::tempdir().unwrap();
    let (kbs, _) = support::kbs().await;
    let agent = Agent::start(Mode::attestation()).await;
    let (child, lines) =
        connect(&directory.path().join("store"), &kbs, &agent, &["--deadline", "1", "--log", "error"]);
    let output = ends(child).await;
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(
        error,
        "secure-comms-adaptor: start pod pod-1: not up within 1 s; last seen: connected; the agent has not reported \
         on its keys yet; check that the VM runs and its agent can be reached, or allow more time (--deadline)\n"
    );
    assert_eq!(lines.count("attestation: connected to"), 1);
}

#[tokio::test]
async fn a_signal_ends_a_start_too() {
    let directory = tempfile::tempdir().unwrap();
    let (kbs, _) = support::kbs().await;
    let agent = Agent::start(Mode::attestation()).await;
    let (child, lines) = connect(&directory.path().join("store"), &kbs, &agent, &[]);
    lines.wait("attestation: connected to", 1).await;
    let start = std::time::Instant::now();
    signal(&child, Signal::SIGTERM);
    assert_eq!(ends(child).await.status.code(), Some(0));
    assert!(start.elapsed() < Duration::from_secs(3));
    agent.seen.wait("the peer said bye: the adaptor ends", 1).await;
}
