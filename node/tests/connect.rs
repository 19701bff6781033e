//! The `connect` command as a process: output lines, exit codes, signals.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

#[path = "../../adaptor/tests/support/mod.rs"]
mod support;

use std::process::{ExitStatus, Stdio};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use secure_comms_adaptor::store::{DirectoryStore, Store};
use support::agent::{Agent, Mode};
use support::{Lines, PATIENCE, pod};
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::{Child, Command};
use tokio::time::timeout;

/// A running `connect`.
struct Connect {
    child: Child,
    /// The lines on stderr, without time and level.
    log: Lines,
    /// The lines on stdout.
    events: Lines,
}

fn command(store: &std::path::Path, kbs: &url::Url, agent: &Agent) -> Command {
    // Not as under nohup, which this process may run under.
    let mut command = Command::new("env");
    command.args(["--default-signal=HUP", env!("CARGO_BIN_EXE_secure-comms-adaptor")]);
    arguments(&mut command, store, kbs, agent);
    command
}

fn arguments(command: &mut Command, store: &std::path::Path, kbs: &url::Url, agent: &Agent) {
    command
        .args(["connect", "--pod-id", pod().as_str(), "--address", &agent.address.to_string(), "--store"])
        .arg(store)
        .args(["--kbs", "127.0.0.1:9", "--kbs-url", kbs.as_str(), "--run-dir"])
        .arg(store.with_file_name("run"))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
}

fn connect(store: &std::path::Path, kbs: &url::Url, agent: &Agent, more: &[&str]) -> Connect {
    Connect::spawn(command(store, kbs, agent).args(more))
}

fn lines(stream: impl AsyncRead + Unpin + Send + 'static) -> Lines {
    let lines = Lines::default();
    let (read, mut stream) = (lines.clone(), BufReader::new(stream).lines());
    tokio::spawn(async move {
        while let Some(line) = stream.next_line().await.unwrap() {
            let text = [" INFO ", " WARN ", "ERROR "].iter().find_map(|level| line.split_once(level));
            read.push(text.map_or(line.as_str(), |(_, text)| text));
        }
        read.push("end of output");
    });
    lines
}

impl Connect {
    fn spawn(command: &mut Command) -> Self {
        let mut child = command.spawn().unwrap();
        let (events, log) = (lines(child.stdout.take().unwrap()), lines(child.stderr.take().unwrap()));
        Self { child, log, events }
    }

    fn signal(&self, signal: Signal) {
        signal_child(&self.child, signal);
    }

    async fn ends(&mut self) -> ExitStatus {
        let status = timeout(PATIENCE, self.child.wait()).await.unwrap().unwrap();
        self.log.wait("end of output", 1).await;
        self.events.wait("end of output", 1).await;
        status
    }
}

fn signal_child(child: &Child, signal: Signal) {
    kill(Pid::from_raw(child.id().unwrap().try_into().unwrap()), signal).unwrap();
}

async fn latched(store: &DirectoryStore) -> Mode {
    let node = store.worker_node_key().await.unwrap().public().unwrap();
    Mode::kubernetes(store.pod_key(&pod()).await.unwrap(), node)
}

#[tokio::test]
async fn connect_logs_each_event_once_and_ends_on_a_signal() {
    let directory = tempfile::tempdir().unwrap();
    let (kbs, asked) = support::kbs().await;
    let agent = Agent::start(Mode::attestation()).await;
    let store = directory.path().join("store");
    let mut connect = connect(&store, &kbs, &agent, &["--inbounds", "KUBERNETES_PHASE:KATAAGENT:0"]);
    agent.seen.wait("hello", 1).await;
    agent.keys(3, "not yet");
    connect.log.wait("keys: attempt 3: not yet", 1).await;
    agent.upgrade(latched(&DirectoryStore::open(&store).unwrap()).await);
    connect.log.wait("kubernetes phase up", 1).await;
    // On a machine under load a start takes longer than a second, and then says what it waits for.
    let of_the_pod = |log: &Lines| {
        let wanted =
            |line: &String| line.starts_with("pod pod-1: ") && !line.starts_with("pod pod-1: waiting for ");
        log.all().into_iter().filter(wanted).collect::<Vec<_>>()
    };
    let local = "pod pod-1: inbound KATAAGENT listens on ";
    let listens = of_the_pod(&connect.log).into_iter().find(|line| line.starts_with(local)).unwrap();
    support::echoes(listens.strip_prefix(local).unwrap()).await;
    connect.signal(Signal::SIGTERM);
    assert_eq!(connect.ends().await.code(), Some(0));
    agent.seen.wait("the peer said bye: the adaptor ends", 1).await;
    assert_eq!(asked.count("DELETE"), 1, "the VM has its keys");
    let address = agent.address;
    let unbound = of_the_pod(&connect.log).into_iter().find(|line| line.contains("bound to no VM")).unwrap();
    let expected = [
        unbound,
        "pod pod-1: keys published to the KBS".to_owned(),
        listens,
        format!("pod pod-1: attestation: connected to {address}"),
        "pod pod-1: tunnel KATAAGENT, Attestation phase: the agent serves it, but no --inbounds tag here listens for it".to_owned(),
        "pod pod-1: keys: attempt 3: not yet".to_owned(),
        format!("pod pod-1: attestation done at {address}; reconnecting for the Kubernetes phase"),
        "pod pod-1: the VM has its keys: deleted from the KBS".to_owned(),
        format!("pod pod-1: kubernetes phase up at {address}"),
        "pod pod-1: SIGTERM: ending; a second signal ends at once".to_owned(),
        "pod pod-1: stopped".to_owned(),
    ];
    assert_eq!(of_the_pod(&connect.log), expected);
    assert_eq!(connect.events.all(), ["end of output"], "nothing on standard output unless it is asked for");
}

#[tokio::test]
async fn a_program_reads_the_events_as_json() {
    let directory = tempfile::tempdir().unwrap();
    let (kbs, _) = support::kbs().await;
    let store = directory.path().join("store");
    let agent = Agent::start(latched(&DirectoryStore::open(&store).unwrap()).await).await;
    let mut connect = connect(&store, &kbs, &agent, &["--events", "json", "--log", "error"]);
    connect.events.wait("\"event\":\"up\"", 1).await;
    connect.signal(Signal::SIGHUP);
    assert_eq!(connect.ends().await.code(), Some(0));
    let events = connect.events.all();
    let json: Vec<serde_json::Value> =
        events.iter().filter_map(|line| serde_json::from_str(line).ok()).collect();
    assert_eq!(json.len(), events.len() - 1, "{events:?}");
    // On a machine under load a start takes longer than a second, and then says what it waits for.
    let kinds: Vec<_> = json.iter().map(|event| event["event"].as_str().unwrap()).collect();
    let kinds: Vec<_> = kinds.into_iter().filter(|kind| *kind != "waiting").collect();
    assert_eq!(kinds, ["published", "listening", "withdrawn", "up", "stopped"]);
    let listening = json.iter().find(|event| event["event"] == "listening").unwrap();
    assert_eq!(listening["tunnel"], "KATAAGENT");
    let socket = directory.path().join("run/pods/pod-1/agent.ttrpc");
    assert_eq!(listening["local"].as_str(), socket.to_str());
    assert!(!socket.parent().unwrap().exists(), "removed at the end");
    let up = json.iter().find(|event| event["event"] == "up").unwrap();
    assert_eq!(up["address"], agent.address.to_string());
    assert!(json.iter().all(|event| event["pod"] == "pod-1" && event["time"].is_string()), "{json:?}");
    assert_eq!(connect.log.all(), ["end of output"]);
}

#[tokio::test]
async fn outputs_that_are_not_read_stall_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let (kbs, _) = support::kbs().await;
    let agent = Agent::start(Mode::attestation()).await;
    let store = directory.path().join("store");
    let port = support::own_port();
    let inbound = format!("KUBERNETES_PHASE:KATAAGENT:{port}");
    // Both pipes are full from the start, and nothing reads them.
    let (_stdout, stdout) = full_pipe();
    let (_stderr, stderr) = full_pipe();
    let mut command = command(&store, &kbs, &agent);
    command.args(["--inbounds", &inbound, "--events", "json"]).stdout(stdout).stderr(stderr);
    let mut child = command.spawn().unwrap();
    agent.seen.wait("hello", 1).await;
    agent.keys(1, "not yet");
    agent.upgrade(latched(&DirectoryStore::open(&store).unwrap()).await);
    agent.seen.wait("hello", 2).await;
    support::echoes(&format!("127.0.0.1:{port}")).await;
    signal_child(&child, Signal::SIGTERM);
    let status = timeout(PATIENCE, child.wait()).await.unwrap().unwrap();
    assert_eq!(status.code(), Some(0));
    agent.seen.wait("the peer said bye: the adaptor ends", 1).await;
}

/// A pipe with no room left.
fn full_pipe() -> (std::io::PipeReader, std::io::PipeWriter) {
    let (reader, writer) = std::io::pipe().unwrap();
    let set = |flags| fcntl(&writer, FcntlArg::F_SETFL(flags)).unwrap();
    set(OFlag::O_NONBLOCK);
    while std::io::Write::write(&mut &writer, &[b'x'; 4096]).is_ok() {}
    set(OFlag::empty());
    (reader, writer)
}

#[tokio::test]
async fn delete_on_exit_deletes_the_pod() {
    let directory = tempfile::tempdir().unwrap();
    let (kbs, asked) = support::kbs().await;
    let store = directory.path().join("store");
    let opened = DirectoryStore::open(&store).unwrap();
    let agent = Agent::start(latched(&opened).await).await;
    let mut connect = connect(&store, &kbs, &agent, &["--delete-on-exit"]);
    connect.log.wait("kubernetes phase up", 1).await;
    connect.signal(Signal::SIGINT);
    assert_eq!(connect.ends().await.code(), Some(0));
    assert_eq!(
        asked.count("DELETE /kbs/v0/resource/default/pp-pod-1/keys"),
        2,
        "once it was up, and at the end"
    );
    assert!(opened.known_pod_key(&pod()).await.unwrap().is_none());
}

#[tokio::test]
async fn a_failed_start_deletes_the_keys_that_no_vm_can_have() {
    let directory = tempfile::tempdir().unwrap();
    let (kbs, asked) = support::kbs().await;
    let store = directory.path().join("store");
    let mut gone = Agent::start(Mode::attestation()).await;
    gone.address.set_port(support::own_port());
    // Time for the publication.
    let mut connect = connect(&store, &kbs, &gone, &["--delete-on-exit", "--deadline", "3"]);
    assert_eq!(connect.ends().await.code(), Some(1));
    assert_eq!(asked.count("DELETE"), 1);
    assert!(DirectoryStore::open(&store).unwrap().known_pod_key(&pod()).await.unwrap().is_none());
}

#[tokio::test]
async fn a_failed_start_keeps_the_keys_of_a_vm_that_answered() {
    let directory = tempfile::tempdir().unwrap();
    let (kbs, asked) = support::kbs().await;
    let store = directory.path().join("store");
    let opened = DirectoryStore::open(&store).unwrap();
    let agent = Agent::start(Mode::attestation()).await;
    let mut silent = agent.clone();
    silent.address.set_port(support::own_port());
    for (agent, deadline, reason) in [
        // Time for the agent's answer.
        (&agent, "5", "an SSH server has answered at its address"),
        (&silent, "1", "they are from before this start"),
    ] {
        let mut connect = connect(&store, &kbs, agent, &["--delete-on-exit", "--deadline", deadline]);
        assert_eq!(connect.ends().await.code(), Some(1));
        let kept = format!("the start failed, but the keys are kept: {reason}");
        assert_eq!(connect.log.count(&kept), 1, "{:?}", connect.log.all());
        assert_eq!(connect.log.count("to delete the keys, run connect --delete-on-exit again and end it"), 1);
        assert_eq!(asked.count("DELETE"), 0);
        assert!(opened.known_pod_key(&pod()).await.unwrap().is_some());
    }
    // What the log says deletes them.
    let hellos = agent.seen.count("hello");
    let mut connect = connect(&store, &kbs, &agent, &["--delete-on-exit"]);
    agent.seen.wait("hello", hellos + 1).await;
    connect.signal(Signal::SIGTERM);
    connect.ends().await;
    assert_eq!(asked.count("DELETE"), 1);
    assert!(opened.known_pod_key(&pod()).await.unwrap().is_none());
}

/// A KBS that answers the first DELETE and no other.
async fn stuck_kbs() -> (url::Url, Lines) {
    let requests = Lines::default();
    let seen = requests.clone();
    let app = axum::Router::new().fallback(move |request: axum::extract::Request| {
        seen.push(request.method().to_string());
        let deletes = seen.count("DELETE");
        async move {
            if request.method() == "DELETE" && deletes > 1 {
                std::future::pending::<()>().await;
            }
        }
    });
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
    tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
    (url, requests)
}

#[tokio::test]
async fn a_second_signal_ends_at_once() {
    let directory = tempfile::tempdir().unwrap();
    for (second, code) in [(Signal::SIGTERM, 143), (Signal::SIGINT, 130)] {
        let (kbs, asked) = stuck_kbs().await;
        let store = directory.path().join(second.as_str());
        let agent = Agent::start(latched(&DirectoryStore::open(&store).unwrap()).await).await;
        let mut connect = connect(&store, &kbs, &agent, &["--delete-on-exit", "--deadline", "24h"]);
        connect.log.wait("kubernetes phase up", 1).await;
        connect.signal(Signal::SIGTERM);
        asked.wait("DELETE", 2).await;
        connect.signal(second);
        // With one signal it ends with 0, also if its deletion does not end in time.
        assert_eq!(connect.ends().await.code(), Some(code));
        let hint = "its deletion may be incomplete: delete default/pp-pod-1/keys from the KBS by hand";
        assert_eq!(connect.log.count(hint), 1, "{:?}", connect.log.all());
    }
}

#[tokio::test]
async fn a_failed_start_prints_its_cause_in_one_line() {
    let directory = tempfile::tempdir().unwrap();
    let (kbs, _) = support::kbs().await;
    let agent = Agent::start(Mode::attestation()).await;
    // Time for the agent's hello.
    let mut connect =
        connect(&directory.path().join("store"), &kbs, &agent, &["--deadline", "5", "--log", "error"]);
    assert_eq!(connect.ends().await.code(), Some(1));
    assert_eq!(
        connect.log.all(),
        [
            "secure-comms-adaptor: start pod pod-1: not up within 5 s; last seen: connected; the agent has not \
             reported on its keys yet; check that the VM runs and its agent can be reached, or allow more time \
             (--deadline)",
            "end of output"
        ]
    );
}

#[tokio::test]
async fn a_signal_before_the_pod_is_up_is_the_exit_code() {
    let directory = tempfile::tempdir().unwrap();
    for (signal, code) in [(Signal::SIGTERM, 143), (Signal::SIGINT, 130), (Signal::SIGHUP, 129)] {
        let (kbs, _) = support::kbs().await;
        let agent = Agent::start(Mode::attestation()).await;
        let mut connect = connect(&directory.path().join(signal.as_str()), &kbs, &agent, &[]);
        connect.log.wait("attestation: connected to", 1).await;
        connect.signal(signal);
        assert_eq!(connect.ends().await.code(), Some(code));
        agent.seen.wait("the peer said bye: the adaptor ends", 1).await;
        assert_eq!(connect.log.count(&format!("{signal} before the pod was up: ending")), 1);
    }
}

#[tokio::test]
async fn a_signal_ends_the_wait_for_a_namespace() {
    let directory = tempfile::tempdir().unwrap();
    let (kbs, _) = support::kbs().await;
    let agent = Agent::start(Mode::attestation()).await;
    let inbound = "KUBERNETES_PHASE:LOG:none-such:7000";
    let mut connect = connect(&directory.path().join("store"), &kbs, &agent, &["--inbounds", inbound]);
    connect.log.wait("waiting for network namespace", 1).await;
    connect.signal(Signal::SIGINT);
    assert_eq!(connect.ends().await.code(), Some(130));
}

#[tokio::test]
async fn nohup_is_respected() {
    let directory = tempfile::tempdir().unwrap();
    let (kbs, _) = support::kbs().await;
    let agent = Agent::start(Mode::attestation()).await;
    let mut command = Command::new("sh");
    command.args(["-c", "trap '' HUP; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_secure-comms-adaptor")]);
    arguments(&mut command, &directory.path().join("store"), &kbs, &agent);
    let mut connect = Connect::spawn(&mut command);
    connect.log.wait("attestation: connected to", 1).await;
    connect.signal(Signal::SIGHUP);
    agent.keys(1, "still here");
    connect.log.wait("keys: attempt 1: still here", 1).await;
    connect.signal(Signal::SIGTERM);
    assert_eq!(connect.ends().await.code(), Some(143));
}

#[tokio::test]
async fn a_start_says_what_it_waits_for_and_how_long() {
    let directory = tempfile::tempdir().unwrap();
    let (kbs, _) = support::kbs().await;
    let agent = Agent::start(Mode::attestation()).await;
    let store = directory.path().join("store");
    let mut connect = connect(&store, &kbs, &agent, &["--deadline", "1h", "--events", "json"]);
    // After a second, once on each output.
    connect.log.wait(" s left)", 1).await;
    connect.events.wait("\"event\":\"waiting\"", 1).await;
    let events = connect.events.all();
    let waiting = events.iter().find(|line| line.contains("waiting")).unwrap();
    let waiting: serde_json::Value = serde_json::from_str(waiting).unwrap();
    assert!((3000..=3600).contains(&waiting["left"].as_u64().unwrap()), "{waiting}");
    connect.signal(Signal::SIGINT);
    assert_eq!(connect.ends().await.code(), Some(130));
}

#[tokio::test]
async fn the_deadline_counts_the_wait_for_a_namespace() {
    let directory = tempfile::tempdir().unwrap();
    let (kbs, _) = support::kbs().await;
    let agent = Agent::start(Mode::attestation()).await;
    let store = directory.path().join("store");
    let more = ["--deadline", "2s", "--inbounds", "KUBERNETES_PHASE:LOG:none-such:7000"];
    let mut connect = connect(&store, &kbs, &agent, &more);
    assert_eq!(connect.ends().await.code(), Some(1), "{:?}", connect.log.all());
    assert_eq!(connect.log.count("not done within 2 s"), 1, "{:?}", connect.log.all());
}
