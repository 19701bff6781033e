//! `serve` as a process: readiness, metrics, signals, and pods that outlive it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "clippy.toml lets tests fail loudly; clippy does not take the helpers of an integration test for tests"
)]

#[path = "../../adaptor/tests/support/mod.rs"]
mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};

use nix::errno::Errno;
use nix::sys::ptrace;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use secure_comms_adaptor::store::{DirectoryStore, Store};
use serde_json::{Value, json};
use support::agent::{Agent, Mode};
use support::{Lines, PATIENCE, own_port, pod};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream, UnixDatagram, UnixStream};
use tokio::process::{Child, Command};
use tokio::time::timeout;

/// A running `serve`.
struct Serve {
    child: Child,
    /// The lines on stderr, without time and level.
    log: Lines,
    socket: PathBuf,
}

impl Serve {
    fn start(dir: &Path, args: &[&str], env: &[(&str, &str)]) -> Self {
        let run = dir.join("run");
        // Not as under nohup, which this process may run under.
        let mut child = Command::new("/usr/bin/env")
            .args(["--default-signal=HUP", env!("CARGO_BIN_EXE_secure-comms-adaptor"), "serve", "--store"])
            .arg(dir.join("store"))
            .arg("--run-dir")
            .arg(&run)
            .args(["--kbs", "127.0.0.1:9"])
            .args(args)
            .env_clear()
            // It must not find nft: the rules would be the host's.
            .env("PATH", "/nonexistent")
            .envs(env.iter().copied())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let log = lines(child.stderr.take().unwrap());
        Self { child, log, socket: run.join("adaptor.sock") }
    }

    /// Without cloud-api-adaptor, and with metrics at any port.
    fn plain(dir: &Path, more: &[&str]) -> Self {
        Self::start(dir, &[&["--caa", "off", "--metrics-listen", "127.0.0.1:0"], more].concat(), &[])
    }

    async fn metrics_address(&self) -> SocketAddr {
        self.log.wait("metrics: listening on ", 1).await;
        let all = self.log.all();
        let line = all.iter().find(|line| line.contains("metrics: listening on ")).unwrap();
        let text = line.split_once("listening on ").unwrap().1;
        text.split('"').next().unwrap().parse().unwrap()
    }

    async fn get(&self, path: &str, accept: &str) -> Answer {
        let stream = TcpStream::connect(self.metrics_address().await).await.unwrap();
        ask(stream, &format!("GET {path} HTTP/1.1\r\nHost: x\r\nAccept: {accept}\r\n\r\n")).await
    }

    /// Asks the API.
    async fn api(&self, method: &str, path: &str, body: &Value) -> Answer {
        let stream = UnixStream::connect(&self.socket).await.unwrap();
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {}",
            body.len()
        );
        ask(stream, &format!("{head}\r\n\r\n{body}")).await
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().unwrap().try_into().unwrap()), signal).unwrap();
    }

    /// The threads that run the tasks of the pods, and those that do their blocking work.
    fn pods_threads(&self) -> Vec<Pid> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.child.id().unwrap())).unwrap();
        // A thread that ended since it was listed has no name.
        let tasks = tasks.map(|task| task.unwrap()).filter(|task| {
            fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name.starts_with("tokio-rt-worker"))
        });
        tasks.map(|task| Pid::from_raw(task.file_name().to_str().unwrap().parse().unwrap())).collect()
    }

    async fn ends(&mut self) -> ExitStatus {
        let status = timeout(PATIENCE, self.child.wait()).await.unwrap().unwrap();
        self.log.wait("end of output", 1).await;
        status
    }
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

#[derive(Debug)]
struct Answer {
    status: u16,
    head: String,
    body: String,
}

async fn ask(mut stream: impl AsyncRead + AsyncWrite + Unpin, request: &str) -> Answer {
    let mut answer = Vec::new();
    let asked = async {
        stream.write_all(request.as_bytes()).await.unwrap();
        stream.read_to_end(&mut answer).await.unwrap();
    };
    timeout(PATIENCE, asked).await.unwrap();
    let answer = String::from_utf8(answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{answer}"));
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Answer { status, head: head.to_ascii_lowercase(), body: body.to_owned() }
}

/// A service manager that waits for a notification.
struct Manager(UnixDatagram);

impl Manager {
    fn bind(path: &Path) -> Self {
        Self(UnixDatagram::bind(path).unwrap())
    }

    async fn wait(&self, part: &str) {
        let mut seen = Vec::new();
        let waited = timeout(PATIENCE, async {
            loop {
                let mut text = [0; 4096];
                let length = self.0.recv(&mut text).await.unwrap();
                let text = String::from_utf8_lossy(&text[..length]).into_owned();
                let found = text.contains(part);
                seen.push(text);
                if found {
                    return;
                }
            }
        });
        assert!(waited.await.is_ok(), "no {part} in {seen:?}");
    }
}

#[tokio::test]
async fn the_service_manager_learns_of_each_step() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("notify");
    let manager = Manager::bind(&path);
    let env = [("NOTIFY_SOCKET", path.to_str().unwrap()), ("WATCHDOG_USEC", "100000")];
    let mut serve = Serve::start(dir.path(), &["--caa", "off", "--metrics-listen", "off"], &env);
    manager.wait("READY=1").await;
    let api = serve.api("GET", "/v1/pods", &Value::Null).await;
    assert_eq!(api.status, 200, "ready means that the API answers: {api:?}");
    manager.wait("WATCHDOG=1").await;
    manager.wait("WATCHDOG=1").await;
    serve.signal(Signal::SIGHUP);
    serve.log.wait("SIGHUP: settings are read at the start only", 1).await;
    serve.signal(Signal::SIGTERM);
    manager.wait("STOPPING=1").await;
    manager.wait("STATUS=ending: no pod is connected").await;
    assert_eq!(serve.ends().await.code(), Some(0));
    assert!(!serve.socket.exists(), "the API's socket is removed");
}

#[tokio::test]
async fn a_fault_is_in_the_status_and_in_readyz() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("notify");
    let manager = Manager::bind(&path);
    let pods = dir.path().join("pods");
    fs::create_dir(&pods).unwrap();
    let port = own_port().to_string();
    let args = [
        "--pods-directory",
        pods.to_str().unwrap(),
        "--listen-port",
        &port,
        "--metrics-listen",
        "127.0.0.1:0",
    ];
    let mut serve = Serve::start(dir.path(), &args, &[("NOTIFY_SOCKET", path.to_str().unwrap())]);
    manager.wait("rules: nft cannot be run").await;
    let ready = serve.get("/readyz", "*/*").await;
    assert_eq!(ready.status, 503);
    assert!(ready.body.contains("rules: nft cannot be run"), "{ready:?}");
    assert_eq!(serve.get("/healthz", "*/*").await.status, 200, "it lives");
    serve.signal(Signal::SIGINT);
    assert_eq!(serve.ends().await.code(), Some(0));
}

/// Needs CAP_SYS_PTRACE: the process is not dumpable.
#[tokio::test]
async fn the_api_answers_while_all_threads_of_pods_hang() {
    let dir = tempfile::tempdir().unwrap();
    let serve = Serve::plain(dir.path(), &[]);
    serve.log.wait("serve: ready", 1).await;
    let mut hung = Vec::new();
    for thread in serve.pods_threads() {
        match ptrace::seize(thread, ptrace::Options::empty()) {
            // One for blocking work that has ended.
            Err(Errno::ESRCH) => continue,
            seized => seized.expect("this test needs CAP_SYS_PTRACE"),
        }
        ptrace::interrupt(thread).unwrap();
        waitpid(thread, Some(WaitPidFlag::__WALL)).unwrap();
        hung.push(thread);
    }
    assert!(hung.len() >= 2, "{hung:?}");
    assert_eq!(serve.api("GET", "/v1/pods", &Value::Null).await.status, 200);
    assert_eq!(serve.api("GET", "/v1/status", &Value::Null).await.status, 200);
    assert_eq!(serve.get("/readyz", "*/*").await.body, "ready\n");
    assert!(serve.get("/metrics", "*/*").await.body.contains("secure_comms_api_requests_total"));
    let health = serve.get("/healthz", "*/*").await;
    assert_eq!((health.status, &*health.body), (503, "the pods' threads have run no task for 5 s\n"));
    for thread in &hung {
        ptrace::detach(*thread, None).unwrap();
    }
    assert_eq!(serve.get("/healthz", "*/*").await.status, 200, "they go on");
}

#[tokio::test]
async fn a_second_signal_ends_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let mut serve = Serve::plain(dir.path(), &[]);
    serve.log.wait("serve: ready", 1).await;
    // A request that is under way: the end would wait for the rest of it.
    let mut request = UnixStream::connect(&serve.socket).await.unwrap();
    let head =
        "PUT /v1/pods/p1 HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{";
    request.write_all(head.as_bytes()).await.unwrap();
    let answered = serve.api("GET", "/v1/pods", &Value::Null).await;
    assert_eq!(answered.status, 200, "the service has read further than that");
    serve.signal(Signal::SIGTERM);
    serve.log.wait("SIGTERM: ending", 1).await;
    serve.signal(Signal::SIGTERM);
    assert_eq!(serve.ends().await.code(), Some(143));
    assert_eq!(serve.log.count("SIGTERM during the end: open streams are cut"), 1);
}

#[tokio::test]
async fn a_port_in_use_costs_the_metrics_only() {
    let dir = tempfile::tempdir().unwrap();
    let other = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = other.local_addr().unwrap();
    let args = ["--caa", "off", "--metrics-listen", &address.to_string()];
    let serve = Serve::start(dir.path(), &args, &[]);
    serve.log.wait("choose another address with metrics-listen; retrying", 1).await;
    serve.log.wait("api: listening", 1).await;
    assert_eq!(serve.api("GET", "/v1/pods", &Value::Null).await.status, 200);
    drop(other);
    assert_eq!(serve.metrics_address().await, address);
    serve.log.wait("serve: ready", 1).await;
    assert_eq!(serve.get("/readyz", "*/*").await.body, "ready\n");
}

#[tokio::test]
async fn a_directory_of_others_is_no_place_for_the_api() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    fs::create_dir(&run).unwrap();
    fs::set_permissions(&run, fs::Permissions::from_mode(0o777)).unwrap();
    let mut serve = Serve::plain(dir.path(), &[]);
    assert_eq!(serve.ends().await.code(), Some(1));
    let all = serve.log.all();
    assert!(all.iter().any(|line| line.contains("secure-comms-adaptor: api: ")), "{all:?}");
}

#[tokio::test]
async fn metrics_keep_to_the_format_and_no_label_grows() {
    let dir = tempfile::tempdir().unwrap();
    let serve = Serve::plain(dir.path(), &[]);
    serve.log.wait("serve: ready", 1).await;
    let open = serve.get("/metrics", "application/openmetrics-text;version=1.0.0,text/plain;q=0.5").await;
    assert!(
        open.head.contains("content-type: application/openmetrics-text; version=1.0.0; charset=utf-8"),
        "{open:?}"
    );
    let series = checked(&open.body, Form::OpenMetrics);
    assert_eq!(series.get("secure_comms_pods{phase=\"up\",launcher=\"caa\"}"), Some(&0.0), "{series:?}");
    assert!(series["process_resident_memory_bytes"] > 1e6);
    let older = serve.get("/metrics", "*/*").await;
    assert!(older.head.contains("content-type: text/plain; version=0.0.4; charset=utf-8"), "{older:?}");
    let names = |series: &BTreeMap<String, f64>| series.keys().cloned().collect::<BTreeSet<_>>();
    assert_eq!(names(&checked(&older.body, Form::Older)), names(&series));
    let put = ask(
        TcpStream::connect(serve.metrics_address().await).await.unwrap(),
        "PUT /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
    );
    assert_eq!(put.await.status, 405);
    assert_eq!(serve.get("/x", "*/*").await.status, 404);
}

#[tokio::test]
async fn clients_that_say_nothing_keep_nobody_from_the_metrics() {
    let dir = tempfile::tempdir().unwrap();
    let serve = Serve::plain(dir.path(), &[]);
    let address = serve.metrics_address().await;
    let mut silent = Vec::new();
    for _ in 0..40 {
        silent.push(TcpStream::connect(address).await.unwrap());
    }
    assert_eq!(serve.get("/healthz", "*/*").await.status, 200);
}

async fn latched(store: &Path) -> Mode {
    let store = DirectoryStore::open(store).unwrap();
    let node = store.worker_node_key().await.unwrap().public().unwrap();
    Mode::kubernetes(store.pod_key(&pod()).await.unwrap(), node)
}

#[tokio::test]
async fn a_pod_outlives_the_process_and_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let (kbs, _) = support::kbs().await;
    let agent = Agent::start(Mode::attestation()).await;
    let mut serve = Serve::plain(dir.path(), &["--kbs-url", kbs.as_str(), "--metrics-pods"]);
    serve.log.wait("serve: ready", 1).await;
    let spec = json!({"podRef": {"namespace": "shop", "name": "web-1"}});
    let prepared = serve.api("PUT", "/v1/pods/pod-1", &spec).await;
    assert!([200, 201].contains(&prepared.status), "{prepared:?}");
    let started =
        serve.api("POST", "/v1/pods/pod-1/start", &json!({"addresses": [agent.address.to_string()]})).await;
    assert!([200, 202].contains(&started.status), "{started:?}");
    agent.seen.wait("hello", 1).await;
    agent.upgrade(latched(&dir.path().join("store")).await);
    serve.log.wait("pod shop/web-1 (pod-1): kubernetes phase up", 1).await;
    // The start's result follows its event.
    let counted = timeout(PATIENCE, async {
        loop {
            let series = checked(&serve.get("/metrics", "*/*").await.body, Form::Older);
            if series["secure_comms_starts_total{result=\"up\"}"] > 0.0 {
                return series;
            }
        }
    });
    let series = counted.await.unwrap();
    for name in [
        "secure_comms_pods{phase=\"up\",launcher=\"api\"}",
        "secure_comms_pod_up{pod=\"pod-1\",namespace=\"shop\",name=\"web-1\",launcher=\"api\"}",
        "secure_comms_prepares_total{result=\"prepared\"}",
    ] {
        assert_eq!(series.get(name), Some(&1.0), "{name}: {series:?}");
    }
    // A connection that a busy machine breaks is one more.
    for phase in ["all", "attestation"] {
        let name = format!("secure_comms_phase_duration_seconds_count{{phase=\"{phase}\"}}");
        assert!(series.get(&name).is_some_and(|count| *count >= 1.0), "{name}: {series:?}");
    }
    serve.signal(Signal::SIGTERM);
    assert_eq!(serve.ends().await.code(), Some(0));
    assert_eq!(
        serve.log.count("serve: SIGTERM: ending: the open streams of 1 pod are cut"),
        1,
        "{:?}",
        serve.log.all()
    );
    agent.seen.wait("the peer said bye: the adaptor ends", 1).await;

    let mut next = Serve::plain(dir.path(), &["--kbs-url", kbs.as_str(), "--log-format", "json"]);
    next.log.wait("kubernetes phase up", 1).await;
    let all = next.log.all();
    let of = |part: &str| -> Value {
        serde_json::from_str(all.iter().find(|line| line.contains(part)).unwrap()).unwrap()
    };
    assert_eq!(of("pods resumed")["message"], "serve: pods resumed: 1");
    let up = of("kubernetes phase up");
    assert_eq!(
        (&up["pod"], &up["namespace"], &up["name"]),
        (&json!("pod-1"), &json!("shop"), &json!("web-1"))
    );
    next.signal(Signal::SIGTERM);
    assert_eq!(next.ends().await.code(), Some(0));
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    OpenMetrics,
    Older,
}

/// The series and their values. Fails if the text is not of the form, or breaks Prometheus's conventions: one family after
/// the other, each with its help and its type; the names that its type demands; no series twice; counters and buckets that
/// only grow.
fn checked(text: &str, form: Form) -> BTreeMap<String, f64> {
    let (mut series, mut families) = (BTreeMap::new(), BTreeSet::new());
    let mut family: Option<(String, String)> = None;
    let mut lines = text.lines().peekable();
    while let Some(line) = lines.next() {
        if line == "# EOF" {
            assert!(form == Form::OpenMetrics && lines.peek().is_none() && text.ends_with("# EOF\n"));
            return check_histograms(series);
        }
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').unwrap();
            assert!(families.insert(name.to_owned()) && !help.is_empty(), "twice or without help: {line}");
            let next = lines.next().unwrap();
            let (typed, kind) = next.strip_prefix("# TYPE ").unwrap().split_once(' ').unwrap();
            assert_eq!(typed, name, "{next}");
            family = Some((name.to_owned(), kind.to_owned()));
            continue;
        }
        if let Some(rest) = line.strip_prefix("# UNIT ") {
            let (name, unit) = rest.split_once(' ').unwrap();
            assert!(form == Form::OpenMetrics && name.ends_with(&format!("_{unit}")), "{line}");
            continue;
        }
        let (family, kind) = family.as_ref().unwrap_or_else(|| panic!("a sample before its family: {line}"));
        let (labelled, value) = line.rsplit_once(' ').unwrap();
        let name = labelled.split('{').next().unwrap();
        check_name(name, family, kind, form);
        check_labels(labelled);
        let value: f64 = value.parse().unwrap_or_else(|_| panic!("{line}"));
        assert!(kind == "gauge" || value >= 0.0, "{line}");
        assert!(series.insert(labelled.to_owned(), value).is_none(), "twice: {line}");
    }
    assert!(form == Form::Older, "no end");
    check_histograms(series)
}

fn check_name(name: &str, family: &str, kind: &str, form: Form) {
    let suffix = name.strip_prefix(family).unwrap_or_else(|| panic!("{name} in {family}"));
    let allowed: &[&str] = match (kind, form) {
        ("counter", Form::OpenMetrics) => &["_total"],
        ("info", Form::OpenMetrics) => &["_info"],
        ("counter", Form::Older) | ("gauge", _) => &[""],
        ("histogram", _) => &["_bucket", "_sum", "_count"],
        _ => panic!("{kind} of {family}"),
    };
    assert!(allowed.contains(&suffix), "{name} of the {kind} {family}");
    assert!(kind != "counter" || name.ends_with("_total"), "{name}");
    assert!(name.starts_with("secure_comms_") || name.starts_with("process_"), "{name}");
    assert!(name.bytes().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'_'), "{name}");
    assert!(!name.contains("duration") || family.ends_with("_seconds"), "{name}");
}

/// `{name="value",...}` without an escape: our labels hold words.
fn check_labels(labelled: &str) {
    let Some((_, labels)) = labelled.split_once('{') else { return };
    for label in labels.strip_suffix('}').unwrap().split("\",") {
        let (name, value) = label.split_once("=\"").unwrap_or_else(|| panic!("{labelled}"));
        assert!(name.bytes().all(|c| c.is_ascii_lowercase() || c == b'_'), "{labelled}");
        assert!(!value.trim_end_matches('"').contains(['"', '\\', '\n']), "{labelled}");
    }
}

/// Buckets are cumulative, and the last one has all.
fn check_histograms(series: BTreeMap<String, f64>) -> BTreeMap<String, f64> {
    let mut buckets: BTreeMap<String, Vec<(f64, f64)>> = BTreeMap::new();
    for (name, value) in &series {
        if let Some((name, labels)) = name.split_once("_bucket{") {
            let labels = labels.strip_suffix('}').unwrap();
            let (others, le) = labels.split_once("le=\"").unwrap();
            let (le, after) = le.split_once('"').unwrap();
            let bound = if le == "+Inf" { f64::INFINITY } else { le.parse().unwrap() };
            let others = format!("{others}{after}").trim_matches(',').to_owned();
            let labels = if others.is_empty() { String::new() } else { format!("{{{others}}}") };
            buckets.entry(format!("{name}_count{labels}")).or_default().push((bound, *value));
        }
    }
    for (count, mut buckets) in buckets {
        buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
        assert!(buckets.windows(2).all(|pair| pair[0].1 <= pair[1].1), "{count}: {buckets:?}");
        assert_eq!(buckets.last(), Some(&(f64::INFINITY, series[&count])), "{count}");
    }
    series
}
