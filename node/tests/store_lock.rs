//! Which pods `connect` drives: one adaptor per pod and store, and without Trustee only pods with a key.
#![allow(clippy::unwrap_used)]

#[path = "../../adaptor/tests/support/mod.rs"]
mod support;

use std::process::{Output, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use secure_comms_adaptor::store::{DirectoryStore, Store};
use support::agent::{Agent, Mode};
use support::{PATIENCE, pod};
use tokio::process::{Child, Command};
use tokio::time::timeout;

fn spawn(store: &std::path::Path, agent: &Agent, more: &[&str]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_secure-comms-adaptor"))
        .args(["connect", "--pod-id", pod().as_str(), "--address", &agent.address.to_string(), "--store"])
        .arg(store)
        .arg("--run-dir")
        .arg(store.with_file_name("run"))
        .args(more)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap()
}

async fn ends(child: Child) -> Output {
    timeout(PATIENCE, child.wait_with_output()).await.unwrap().unwrap()
}

/// The agent has said hello; the adaptor may or may not have received it, and so be up.
fn ended_by_term(output: &Output) -> bool {
    matches!(output.status.code(), Some(0 | 143))
}

fn signal(child: &Child, signal: Signal) {
    kill(Pid::from_raw(child.id().unwrap().try_into().unwrap()), signal).unwrap();
}

async fn latched(store: &DirectoryStore) -> Mode {
    let node = store.worker_node_key().await.unwrap().public().unwrap();
    Mode::kubernetes(store.pod_key(&pod()).await.unwrap(), node)
}

fn command(arguments: &[&str], store: &std::path::Path) -> Output {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_secure-comms-adaptor"));
    command.args(arguments).arg("--store").arg(store).output().unwrap()
}

#[tokio::test]
async fn one_adaptor_drives_a_pod_at_a_time() {
    let directory = tempfile::tempdir().unwrap();
    let (kbs, asked) = support::kbs().await;
    let trustee = ["--kbs", "127.0.0.1:9", "--kbs-url", kbs.as_str()];
    let deleting = [&trustee[..], &["--delete-on-exit"]].concat();
    let store = directory.path().join("store");
    let opened = DirectoryStore::open(&store).unwrap();
    let agent = Agent::start(latched(&opened).await).await;
    let mut first = spawn(&store, &agent, &trustee);
    agent.seen.wait("hello", 1).await;
    // Then it is up.
    asked.wait("DELETE", 1).await;
    let (requests, connections) = (asked.all().len(), agent.seen.count("connection"));
    for more in [&trustee[..], &deleting, &["--no-trustee"]] {
        let output = ends(spawn(&store, &agent, more)).await;
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let error = String::from_utf8(output.stderr).unwrap();
        let expected =
            format!("another adaptor (pid {}) drives pod pod-1: end it first", first.id().unwrap());
        assert!(error.contains(&expected), "{error}");
    }
    assert_eq!(asked.all().len(), requests, "the others have changed nothing");
    assert_eq!(agent.seen.count("connection"), connections);
    // Commands that drive no pod need no lock.
    let user_data = directory.path().join("user-data");
    for arguments in [
        &["keygen", "--pod-id", "pod-1"][..],
        &["user-data", "--pod-id", "pod-1", "--output", user_data.to_str().unwrap()],
    ] {
        let output = command(arguments, &store);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
    }
    signal(&first, Signal::SIGKILL);
    first.wait().await.unwrap();
    let second = spawn(&store, &agent, &trustee);
    agent.seen.wait("hello", 2).await;
    signal(&second, Signal::SIGTERM);
    assert!(ended_by_term(&ends(second).await));
}

#[tokio::test]
async fn without_trustee_a_pod_needs_its_user_data_first() {
    let directory = tempfile::tempdir().unwrap();
    let store = directory.path().join("store");
    let agent = Agent::start(Mode::attestation()).await;
    let output = ends(spawn(&store, &agent, &["--no-trustee"])).await;
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let error = String::from_utf8(output.stderr).unwrap();
    let expected = "pod pod-1 has no key here: run user-data first (wrong --store?)";
    assert_eq!(error.matches(expected).count(), 1, "{error}");
    assert_eq!(std::fs::read_dir(store.join("pods")).unwrap().count(), 0);
    assert_eq!(agent.seen.count("connection"), 0);
    // With its user data the same command connects to the VM.
    let output = directory.path().join("user-data");
    let made = command(&["user-data", "--pod-id", "pod-1", "--output", output.to_str().unwrap()], &store);
    assert!(made.status.success(), "{made:?}");
    agent.become_(latched(&DirectoryStore::open(&store).unwrap()).await);
    let child = spawn(&store, &agent, &["--no-trustee"]);
    agent.seen.wait("hello", 1).await;
    signal(&child, Signal::SIGTERM);
    assert!(ended_by_term(&ends(child).await));
}
