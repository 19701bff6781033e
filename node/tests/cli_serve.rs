//! The real service, asked by the real command line.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "clippy.toml lets tests fail loudly; clippy does not take the helpers of an integration test for tests"
)]

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

/// A node with a service that serves the API only.
struct Node {
    dir: TempDir,
    service: Child,
}

impl Node {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        let settings = format!(
            "store = \"{}\"\nrun-dir = \"{}\"\nno-trustee = true\ncaa = \"off\"\nmetrics-listen = \"off\"\n",
            path("store"),
            path("run")
        );
        fs::write(dir.path().join("adaptor.toml"), settings).unwrap();
        let mut service = Command::new(env!("CARGO_BIN_EXE_secure-comms-adaptor"))
            .args(["serve", "--config", &path("adaptor.toml")])
            .env_clear()
            .envs(std::env::var_os("PATH").map(|path| ("PATH", path)))
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut log = BufReader::new(service.stderr.take().unwrap()).lines();
        let mut seen = Vec::new();
        loop {
            let line = log.next().unwrap_or_else(|| panic!("the service has ended: {seen:?}")).unwrap();
            let listens = line.contains("api: listening on");
            seen.push(line);
            if listens {
                break;
            }
        }
        // Read to the end, so that the service never writes to a closed pipe.
        std::thread::spawn(move || log.for_each(drop));
        Self { dir, service }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("run/adaptor.sock")
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_secure-comms-adaptor"));
        command.args(args).env_clear().env("SECURE_COMMS_RUN_DIR", self.dir.path().join("run"));
        command.env("SECURE_COMMS_CONFIG", self.dir.path().join("adaptor.toml"));
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // It may have ended already.
        drop(self.service.kill());
        drop(self.service.wait());
    }
}

#[test]
fn a_service_that_runs_has_no_faults() {
    let node = Node::start();
    let output = node.run(&["doctor", "-o", "json"]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let groups = report["groups"].as_array().unwrap();
    let findings: Vec<&Value> =
        groups.iter().flat_map(|group| group["findings"].as_array().unwrap()).collect();
    let find = |check: &str| findings.iter().find(|finding| finding["check"] == check).unwrap();
    assert_eq!(output.status.code(), Some(0), "{report:#}");
    let title = find("service-reachable")["title"].as_str().unwrap();
    assert!(
        title.ends_with(&format!("{}, process {}", node.socket().display(), node.service.id())),
        "{title}"
    );
    assert!(find("service-files")["title"].as_str().unwrap().contains("are open"));
    assert_eq!(find("store-private")["outcome"], "ok");
}

#[test]
fn pods_and_status_of_a_service_are_shown_until_it_ends() {
    let node = Node::start();
    let output = node.run(&["pod", "list"]);
    assert_eq!((output.status.code(), &*output.stderr), (Some(0), &b"no pods found\n"[..]));
    let status = String::from_utf8(node.run(&["status"]).stdout).unwrap();
    assert!(status.starts_with("secure-comms-adaptor ") && status.contains("\nok api\n"), "{status}");
    assert!(status.ends_with("\npods: 0\na restart of the service would cost nothing now\n"), "{status}");

    let started = node.run(&[
        "pod",
        "start",
        "3f2a0123456789",
        "--address",
        "127.0.0.1:1",
        "-n",
        "shop",
        "--name",
        "web-1",
        "--init-data-digest",
        &"12".repeat(32),
        "--no-wait",
    ]);
    assert_eq!(started.status.code(), Some(0), "{started:?}");
    // Repeated, what is left out stays as it is.
    let again = node.run(&["pod", "start", "3f2a0123456789", "--address", "127.0.0.1:1", "--no-wait"]);
    assert_eq!(again.status.code(), Some(0), "{again:?}");
    let shown = node.run(&["pod", "show", "shop/web-1", "-o", "json"]);
    let shown: Value = serde_json::from_slice(&shown.stdout).unwrap();
    assert_eq!(shown["initDataDigest"], "12".repeat(32));
    let listed = String::from_utf8(node.run(&["pod", "list", "--no-headers"]).stdout).unwrap();
    assert!(listed.starts_with("shop   web-1   3f2a01234567   Connecting   "), "{listed}");
    let shown = String::from_utf8(node.run(&["pod", "show", "shop/web-1"]).stdout).unwrap();
    assert!(shown.contains("\nLaunched by:  api\n") && shown.contains("\n  KATAAGENT   /"), "{shown}");
    let doctor = node.run(&["doctor", "--pod", "3f2a"]);
    let text = String::from_utf8(doctor.stdout).unwrap();
    assert_eq!(doctor.status.code(), Some(1), "{text}");
    assert!(text.contains("\nxx its VM can be reached\n    127.0.0.1:1: TCP connect: "), "{text}");

    let mut watch =
        node.command(&["pod", "watch"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let stopped = node.run(&["pod", "stop", "3f2a"]);
    assert_eq!(String::from_utf8_lossy(&stopped.stdout), "pod 3f2a0123456789: stopped\n", "{stopped:?}");
    assert_eq!(&*node.run(&["pod", "list"]).stderr, b"no pods found\n");

    kill(Pid::from_raw(node.service.id().try_into().unwrap()), Signal::SIGTERM).unwrap();
    let code = watch.wait().unwrap().code();
    let mut line = String::new();
    BufReader::new(watch.stderr.take().unwrap()).read_line(&mut line).unwrap();
    // Either it was connected, or it came too late.
    assert!(code == Some(1) && line.starts_with("secure-comms-adaptor: "), "{code:?} {line}");
}
