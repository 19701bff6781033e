//! The real binary's `doctor`: with nothing there, with faults, with a service, and without privileges.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "clippy.toml lets tests fail loudly; clippy does not take the helpers of an integration test for tests"
)]

#[path = "cli/service.rs"]
mod service;

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Output};

use axum::Router;
use axum::http::{Method, StatusCode};
use serde_json::{Value, json};
use service::{Service, days_ago, pod};
use tempfile::TempDir;

/// The user nobody.
const NOBODY: u32 = 65_534;
const SECRET: &str = "-----BEGIN PRIVATE KEY-----";

/// A node: a store, and where its service would be.
struct Node {
    dir: TempDir,
}

impl Node {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("store")).unwrap();
        mode(&dir.path().join("store"), 0o700);
        Self { dir }
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    /// The settings' file, with these lines more.
    fn settings(&self, more: &str) {
        let text =
            format!("store = \"{}\"\ncaa = \"off\"\nmetrics-listen = \"off\"\n{more}\n", self.path("store"));
        fs::write(self.path("adaptor.toml"), text).unwrap();
        mode(Path::new(&self.path("adaptor.toml")), 0o600);
    }

    fn command(&self, socket: &Path, more: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_secure-comms-adaptor"));
        command.args([
            "doctor",
            "--config",
            &self.path("adaptor.toml"),
            "--socket",
            socket.to_str().unwrap(),
        ]);
        command.args(more).env_clear().env("LANG", "C.UTF-8");
        command
    }

    fn report(&self, socket: &Path, more: &[&str]) -> Report {
        Report::of(&self.command(socket, &[&["-o", "json"], more].concat()).output().unwrap())
    }
}

fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

struct Report {
    code: Option<i32>,
    findings: Vec<Value>,
}

impl Report {
    fn of(output: &Output) -> Self {
        let text = String::from_utf8(output.stdout.clone()).unwrap();
        assert!(!text.contains(SECRET) && output.stderr.is_empty(), "{output:?}");
        let report: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {output:?}"));
        let groups = report["groups"].as_array().unwrap();
        let findings =
            groups.iter().flat_map(|group| group["findings"].as_array().unwrap().clone()).collect();
        Self { code: output.status.code(), findings }
    }

    #[track_caller]
    fn outcome(&self, check: &str) -> &str {
        self.find(check)["outcome"].as_str().unwrap()
    }

    #[track_caller]
    fn find(&self, check: &str) -> &Value {
        self.findings
            .iter()
            .find(|finding| finding["check"] == check)
            .unwrap_or_else(|| panic!("{check}: {:?}", self.findings))
    }

    fn faults(&self) -> Vec<&str> {
        let faults = self.findings.iter().filter(|finding| finding["outcome"] == "fault");
        faults.map(|finding| finding["check"].as_str().unwrap()).collect()
    }
}

/// A KBS that answers with this status, but for /healthz.
fn kbs(runtime: &tokio::runtime::Runtime, status: StatusCode) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    let answer =
        move |method: Method| async move { if method == Method::GET { StatusCode::OK } else { status } };
    let app = Router::new().fallback(answer);
    runtime.spawn(async move {
        axum::serve(tokio::net::TcpListener::from_std(listener).unwrap(), app).await.unwrap();
    });
    address.to_string()
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

#[test]
fn a_node_without_a_service_has_one_fault_and_a_fix() {
    let runtime = runtime();
    let node = Node::new();
    node.settings(&format!("kbs = \"{}\"", kbs(&runtime, StatusCode::OK)));
    let socket = node.dir.path().join("none");
    let report = node.report(&socket, &[]);
    assert_eq!((report.faults(), report.code), (vec!["service-reachable"], Some(1)));
    assert_eq!(report.outcome("store-writable"), "ok");
    assert_eq!(report.outcome("kbs-token"), "warning", "no token is asked for");
    assert_eq!(fs::read_dir(node.path("store")).unwrap().count(), 0, "the probe is deleted");
    let output = node.command(&socket, &[]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    for line in [
        &*format!("× the service answers at {}", socket.display()),
        "    no such socket: the service does not run",
        "√ a file can be written there",
    ] {
        assert!(text.lines().any(|found| found == line), "{line}:\n{text}");
    }
    assert!(text.contains("    fix: start it: systemctl start secure-comms-adaptor"), "{text}");
    let ascii = node.command(&socket, &[]).env("LANG", "C").output().unwrap();
    assert!(ascii.stdout.is_ascii());
}

#[test]
fn faults_of_settings_store_and_kbs_are_found() {
    let runtime = runtime();
    let node = Node::new();
    let key = node.path("admin.pem");
    fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&key).unwrap();
    fs::write(&key, SECRET).unwrap();
    let refusing = kbs(&runtime, StatusCode::UNAUTHORIZED);
    node.settings(&format!("kbs = \"{refusing}\""));
    mode(Path::new(&node.path("store")), 0o777);
    let report = node.report(&node.dir.path().join("none"), &[]);
    for check in ["store-private", "kbs-token"] {
        assert_eq!(report.outcome(check), "fault", "{check}");
    }
    assert!(report.find("kbs-token")["found"].as_str().unwrap().contains("401"));

    node.settings(&format!("kbs = \"{refusing}\"\nkbs-admin-key = \"{key}\""));
    let report = node.report(&node.dir.path().join("none"), &[]);
    assert_eq!(report.outcome("kbs-token"), "fault", "the key is no key");
    assert_eq!(report.outcome("settings-secret"), "ok");

    mode(Path::new(&node.path("adaptor.toml")), 0o666);
    let report = node.report(&node.dir.path().join("none"), &[]);
    assert_eq!(report.outcome("settings-file"), "fault");
    assert_eq!(report.outcome("settings-rest"), "not-checked");

    node.settings("kbss = \"x:1\"");
    let report = node.report(&node.dir.path().join("none"), &[]);
    assert_eq!(report.outcome("settings-valid"), "fault");
    assert!(
        report.find("settings-valid")["found"].as_str().unwrap().contains("kbss"),
        "{:?}",
        report.findings
    );
}

fn status(parts: &Value) -> Value {
    json!({
        "version": "0.1.0", "since": days_ago(1), "ready": true, "parts": parts, "pods": 0, "podsByPhase": {},
        "stopCost": {"podsLost": 0, "podsAtRisk": 0, "startsInterrupted": 0},
    })
}

#[test]
fn a_pod_is_looked_at_from_the_service_to_the_vm() {
    let node = Node::new();
    node.settings("no-trustee = true");
    // A VM whose port something else has.
    let vm = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = vm.local_addr().unwrap();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = vm.accept().unwrap();
        std::io::Write::write_all(&mut stream, b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap();
    });
    let mut lost = pod("p1", "shop", "web-1", "Down");
    lost["addresses"] = json!([address]);
    lost["reason"] = json!("no route to host");
    let service = Service::with_pods(&[lost]);
    service.answer("GET /v1/status", 200, &status(&json!([{"name": "api", "works": true}])));
    let event = json!({"time": days_ago(1), "pod": "p1", "type": "Warning", "reason": "VmLog", "message": "VM: no keys"});
    service.answer_text("GET /v1/events?pod=p1", 200, &format!("event: pod\ndata: {event}\n\n"));
    let report = node.report(&service.socket(), &["--pod", "shop/web-1"]);
    server.join().unwrap();
    assert_eq!((report.faults(), report.code), (vec!["pod-phase", "pod-agent"], Some(1)));
    assert_eq!(report.find("pod-phase")["found"], "no route to host");
    assert_eq!(report.outcome("pod-tcp"), "ok");
    assert!(report.find("pod-agent")["found"].as_str().unwrap().contains("HTTP"));
    assert!(report.find("pod-events")["found"].as_str().unwrap().contains("VM: no keys"));

    let report = node.report(&service.socket(), &["--pod", "p2"]);
    assert_eq!(report.faults(), ["pod-known"]);
}

#[test]
fn a_part_that_does_not_work_is_a_fault() {
    let node = Node::new();
    node.settings("no-trustee = true");
    let service = Service::with_pods(&[]);
    let parts = json!([{"name": "rules", "works": false, "reason": "nft is missing: install nftables"}]);
    service.answer("GET /v1/status", 200, &status(&parts));
    let report = node.report(&service.socket(), &[]);
    let part = report.find("service-parts");
    assert_eq!((&part["found"], &part["fix"]), (&json!("nft is missing"), &json!("install nftables")));
    assert_eq!(report.code, Some(1));
    service.answer("GET /v1/status", 200, &status(&json!([])));
    let report = node.report(&service.socket(), &[]);
    assert_eq!((report.faults(), report.code), (Vec::new(), Some(0)), "{:?}", report.findings);
}

#[test]
fn checks_that_need_privileges_are_not_made_without() {
    let node = Node::new();
    node.settings("no-trustee = true");
    // The parents of the program may be closed to others.
    let program = node.path("adaptor");
    // Not by this process: another test's fork would hold the file open for writing, which keeps it from being started.
    let copied =
        Command::new("cp").arg(env!("CARGO_BIN_EXE_secure-comms-adaptor")).arg(&program).status().unwrap();
    assert!(copied.success());
    mode(node.dir.path(), 0o755);
    mode(Path::new(&program), 0o755);
    mode(Path::new(&node.path("adaptor.toml")), 0o644);
    let mut command = Command::new(&program);
    command.args([
        "doctor",
        "-o",
        "json",
        "--config",
        &node.path("adaptor.toml"),
        "--socket",
        "/nonexistent",
    ]);
    if nix::unistd::geteuid().is_root() {
        command.uid(NOBODY).gid(NOBODY);
    } else {
        // Another user's store, as root's is to nobody.
        mode(Path::new(&node.path("store")), 0o000);
    }
    let report = Report::of(&command.env_clear().output().unwrap());
    assert_eq!(report.outcome("store-private"), "not-checked", "{:?}", report.findings);
    assert_eq!(report.faults(), ["service-reachable"]);
}
