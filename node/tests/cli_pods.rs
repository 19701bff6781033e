//! The real binary against a service that answers from a table: what people and programs read, and the exit codes.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "clippy.toml lets tests fail loudly; clippy does not take the helpers of an integration test for tests"
)]

#[path = "cli/service.rs"]
mod service;

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Output, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use service::{Service, command, days_ago, pod};

const A: &str = "3f2a0123456789abcdef";
const B: &str = "3f2b0123456789abcdef";
const C: &str = "770011223344";

fn three_pods() -> Service {
    let mut bare = pod(C, "", "", "Attesting");
    for field in ["namespace", "name", "launcher", "created", "session"] {
        bare.as_object_mut().unwrap().remove(field);
    }
    bare["runtime"] = json!({"state": "None"});
    bare["reason"] = json!("the KBS denies default/pp-77");
    bare["attempt"] = json!(3);
    Service::with_pods(&[pod(A, "shop", "web-1", "Up"), pod(B, "default", "db-0", "Down"), bare])
}

/// The one line on stderr of a command that fails with this exit code.
#[track_caller]
fn fault(output: &Output, code: i32) -> String {
    let text = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(code), "{text}");
    let line = text.strip_prefix("secure-comms-adaptor: ").and_then(|line| line.strip_suffix('\n'));
    let line = line.unwrap_or_else(|| panic!("{text}"));
    assert!(!line.contains('\n'), "one line: {text}");
    line.to_owned()
}

#[test]
fn a_list_is_a_table_as_kubectls() {
    let service = three_pods();
    assert_eq!(
        service.stdout(&["pod", "list"]),
        "NAMESPACE   NAME     ID             PHASE       AGE\n\
         default     db-0     3f2b01234567   Down        10d\n\
         shop        web-1    3f2a01234567   Up          10d\n\
         <none>      <none>   770011223344   Attesting   <none>\n"
    );
    assert_eq!(
        service.stdout(&["pod", "ls", "-o", "wide", "-n", "shop"]),
        "NAMESPACE   NAME    ID             PHASE   AGE   ADDRESS         LANES       RESUMES   RUNTIME     LAUNCHER\n\
         shop        web-1   3f2a01234567   Up      10d   10.0.0.7:2222   main,data   2         Connected   caa\n"
    );
    assert_eq!(
        service.stdout(&["pod", "list", "--no-headers", "--phase", "!up,!attesting"]),
        "default   db-0   3f2b01234567   Down   10d\n"
    );
}

#[test]
fn a_list_for_programs_is_the_apis() {
    let service = three_pods();
    let json: Value = serde_json::from_str(&service.stdout(&["pod", "list", "-o", "json", "-A"])).unwrap();
    let ids: Vec<_> =
        json["items"].as_array().unwrap().iter().map(|pod| pod["id"].as_str().unwrap()).collect();
    assert_eq!(ids, [B, A, C]);
    let shown: Value = serde_json::from_str(&service.stdout(&["pod", "show", A, "-o", "json"])).unwrap();
    assert_eq!(shown["namespace"], "shop");
    assert_eq!(shown["session"], json!({"lanes": ["main", "data"], "resumed": 2}));
    let yaml = service.stdout(&["pod", "show", A, "-o", "yaml"]);
    for line in [&format!("id: {A}"), "phase: Up", "launcher: caa", "  resumed: 2"] {
        assert!(yaml.lines().any(|found| found == line), "{line}: {yaml}");
    }
}

#[test]
fn no_pods_are_said_on_standard_error() {
    let service = Service::with_pods(&[]);
    let output = service.run(&["pod", "list"]);
    assert_eq!(
        (output.status.code(), &*output.stdout, &*output.stderr),
        (Some(0), &b""[..], &b"no pods found\n"[..])
    );
    assert_eq!(service.stdout(&["pod", "list", "-o", "json"]), "{\n  \"items\": []\n}\n");
}

#[test]
fn a_pod_is_shown_in_sections_with_its_events() {
    let service = three_pods();
    let event = |kind: &str, message: &str| {
        let event =
            json!({"time": days_ago(9), "pod": C, "type": kind, "reason": "Keys", "message": message});
        format!("id: 1-1\nevent: pod\ndata: {event}\n\n")
    };
    let events = event("Normal", "published") + &event("Warning", "attempt 3\u{1b}[2J: 403");
    service.answer_text(
        &format!("GET /v1/events?pod={C}"),
        200,
        &format!("event: lost\ndata: {{}}\n\n{events}"),
    );
    let shown = service.stdout(&["pod", "show", "77"]);
    for line in [
        "ID:           770011223344",
        "Phase:        Attesting, for 3d",
        "Next step:    the VM gets its keys from the KBS, attempt 3: the KBS denies default/pp-77",
        "  KATAAGENT   /run/secure-comms/pods/x/agent.ttrpc",
        "  AGE   TYPE      REASON   MESSAGE",
        "  9d    Normal    Keys     published",
        "  9d    Warning   Keys     attempt 3\\u{1b}[2J: 403",
    ] {
        assert!(shown.lines().any(|found| found == line), "{line}:\n{shown}");
    }
}

#[test]
fn a_pod_that_is_not_clear_is_a_fault() {
    let service = three_pods();
    let error = fault(&service.run(&["pod", "show", "3f2"]), 1);
    assert_eq!(error, format!("2 pods are called '3f2': {A}, {B}: give more of the id"));
    let error = fault(&service.run(&["pod", "stop", "9\u{1b}[2J"]), 1);
    assert_eq!(error, "no pod '9\\u{1b}[2J' is here: see secure-comms-adaptor pod list");
    assert!(service.requests().iter().all(|request| request.starts_with("GET ")));
}

#[test]
fn faults_of_usage_end_with_2() {
    let service = three_pods();
    for (args, words) in [
        (&["pod", "list", "--phase", "Running"][..], "--phase 'Running': expected phases of NotPrepared"),
        (&["pod", "list", "-o", "xml"], "invalid value 'xml' for '--output <FORMAT>'"),
        (&["pod", "start", "p"], "required arguments were not provided: --address"),
        (&["pod", "start", "p", "--address", "a b"], "--address 'a b': expected HOST"),
        (&["pod", "start", "p", "--address", "a", "--name", "n"], "--namespace"),
        (&["pod", "show"], "<ID>"),
        (&["status", "--socket", "s"], "--socket 's': expected an absolute path"),
        (&["pod", "wach"], "unrecognized subcommand 'wach'; a similar subcommand exists: 'watch'"),
    ] {
        let error = fault(&service.run(args), 2);
        assert!(error.contains(words), "{args:?}: {error}");
    }
    assert_eq!(service.requests(), Vec::<String>::new());
}

#[test]
fn a_service_that_does_not_run_is_a_fault() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("none");
    for args in
        [&["pod", "list"][..], &["status"], &["pod", "watch"], &["pod", "start", "p", "--address", "a"]]
    {
        let error = fault(&command(&socket, args).output().unwrap(), 1);
        assert!(error.contains("check that secure-comms-adaptor serve runs"), "{error}");
    }
}

#[test]
fn the_flag_may_stand_before_and_after_the_command() {
    let service = three_pods();
    let socket = service.socket();
    let socket = socket.to_str().unwrap();
    let elsewhere = Path::new("/nonexistent/s");
    for args in [["pod", "--socket", socket, "list"], ["pod", "list", "--socket", socket]] {
        assert_eq!(command(elsewhere, &args).output().unwrap().status.code(), Some(0));
    }
}

#[test]
fn a_problem_of_the_service_is_one_line() {
    let service = three_pods();
    let problem = json!({
        "type": "https://example.org#in-use", "title": "In use", "status": 409,
        "detail": "the runtime is connected to the pod", "advice": "stop it with force",
    });
    service.answer(&format!("DELETE /v1/pods/{A}"), 409, &problem);
    let error = fault(&service.run(&["pod", "stop", "3f2a"]), 1);
    assert_eq!(error, "the runtime is connected to the pod; stop it with force");
}

#[test]
fn a_pod_is_started_stopped_and_forgotten() {
    let service = three_pods();
    service.answer(
        "PUT /v1/pods/p1?deadlineSeconds=90",
        200,
        &json!({"pod": pod("p1", "a", "b", "Prepared")}),
    );
    service.answer("POST /v1/pods/p1/start", 200, &pod("p1", "a", "b", "Up"));
    let started = service.stdout(&[
        "pod",
        "start",
        "p1",
        "--address",
        "10.0.0.7",
        "--address",
        "[fd00::1]:22",
        "-n",
        "a",
        "--name",
        "b",
        "--deadline",
        "90s",
        "--no-wait",
    ]);
    assert_eq!(started, "pod p1: Up\n  KATAAGENT /run/secure-comms/pods/x/agent.ttrpc\n");
    let requests = service.requests();
    assert_eq!(requests[0], "GET /v1/pods/p1");
    assert_eq!(requests[1], r#"PUT /v1/pods/p1?deadlineSeconds=90 {"podRef":{"namespace":"a","name":"b"}}"#);
    let order: Value = serde_json::from_str(requests[2].split_once("start ").unwrap().1).unwrap();
    assert_eq!(order["addresses"], json!(["10.0.0.7:2222", "[fd00::1]:22"]));
    assert_eq!(order["wait"], false);

    service.answer_text(&format!("DELETE /v1/pods/{A}?force=true"), 204, "");
    assert_eq!(service.stdout(&["pod", "stop", "shop/web-1", "--force"]), format!("pod {A}: stopped\n"));
    let deletion = json!({"id": B, "resource": "default/pp-x", "reason": "503"});
    service.answer(&format!("DELETE /v1/pods/{B}"), 202, &deletion);
    let output = service.run(&["pod", "stop", "3f2b"]);
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(
        String::from_utf8(output.stderr).unwrap(),
        "default/pp-x is not deleted yet: 503; the service tries again until it is\n"
    );
    service.answer(
        &format!("POST /v1/pods/{C}/forget"),
        200,
        &json!({"id": C, "resources": ["default/pp-y"]}),
    );
    let output = service.run(&["pod", "forget", "77"]);
    assert_eq!(String::from_utf8(output.stdout).unwrap(), format!("pod {C}: forgotten\n"));
    assert_eq!(
        String::from_utf8(output.stderr).unwrap(),
        "default/pp-y may stay in the KBS: delete it there by hand\n"
    );
}

/// A pod that an earlier `pod start` has started: its phase, and what the service answers to another start.
fn started_before(phase: &str) -> Service {
    let service = Service::start();
    let mut started = pod("p1", "a", "b", phase);
    started["initDataDigest"] = json!("12".repeat(32));
    service.answer("GET /v1/pods/p1", 200, &started);
    service.answer("PUT /v1/pods/p1?deadlineSeconds=1", 200, &json!({ "pod": started }));
    let refusal = json!({
        "type": "https://example.org#already-started", "title": "The pod is already started", "status": 409,
        "detail": "pod p1 is already started",
    });
    service.answer("POST /v1/pods/p1/start", 409, &refusal);
    service
}

#[test]
fn a_start_may_be_repeated() {
    const AGAIN: [&str; 7] = ["pod", "start", "p1", "--address", "10.0.0.7", "--deadline", "1s"];
    let service = started_before("Up");
    let again = service.stdout(&AGAIN);
    assert_eq!(again, "pod p1: Up\n  KATAAGENT /run/secure-comms/pods/x/agent.ttrpc\n");
    let spec = service.requests()[1].split_once("=1 ").unwrap().1.to_owned();
    let expected = json!({"podRef": {"namespace": "a", "name": "b"}, "initDataDigest": "12".repeat(32)});
    assert_eq!(serde_json::from_str::<Value>(&spec).unwrap(), expected, "what was left out stays");
    let elsewhere = service.run(&["pod", "start", "p1", "--address", "10.0.0.8", "--deadline", "1s"]);
    assert_eq!(fault(&elsewhere, 1), "pod p1 is already started");

    let comes = started_before("Attesting");
    assert_eq!(fault(&comes.run(&AGAIN), 1), "start pod p1: not up within 1 s; last seen: Attesting");
    let no_wait = comes.stdout(&[&AGAIN[..], &["--no-wait"]].concat());
    assert!(no_wait.starts_with("pod p1: Attesting\n"), "{no_wait}");
    let failed = started_before("Failed");
    assert_eq!(fault(&failed.run(&AGAIN), 1), "pod p1: it was started before, and is Failed now");
}

#[test]
fn orphans_are_listed_and_collected() {
    let service = Service::with_pods(&[]);
    let orphan = |id: &str| json!({"id": id, "since": days_ago(10), "reason": "NeverStarted", "message": "it was never started"});
    service.answer("GET /v1/orphans", 200, &json!({"items": [orphan("o1"), orphan("o2")]}));
    assert_eq!(
        service.stdout(&["pod", "orphans"]),
        "NAMESPACE   NAME     ID   REASON         AGE\n\
         <none>      <none>   o1   NeverStarted   10d\n\
         <none>      <none>   o2   NeverStarted   10d\n"
    );
    service.answer_text("DELETE /v1/orphans/o1", 204, "");
    service.answer(
        "DELETE /v1/orphans/o2",
        202,
        &json!({"id": "o2", "resource": "x", "reason": "the KBS is down"}),
    );
    let output = service.run(&["pod", "orphans", "--collect"]);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "pod o1: collected\n");
    assert_eq!(fault(&output, 1), "1 of 2 orphans are not collected: o2: the KBS is down");
}

fn event_text(namespace: &str, message: &str) -> String {
    let event = json!({
        "time": "2026-11-27T18:57:00.000Z", "pod": A, "namespace": namespace, "name": "web-1", "type": "Normal",
        "reason": "Up", "message": message,
    });
    format!("event: pod\ndata: {event}\n\n")
}

#[test]
fn a_watch_ends_with_0_on_sigint() {
    let service = three_pods();
    let events = event_text("other", "x") + &event_text("shop", "up\nat 10.0.0.7");
    service.answer_text("GET /v1/events", 200, &events);
    let mut watch = service.command(&["pod", "watch", "-n", "shop"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(watch.stdout.take().unwrap()).lines();
    assert_eq!(
        lines.next().unwrap().unwrap(),
        "2026-11-27T18:57:00.000Z Normal  shop/web-1 3f2a01234567 Up: up\\nat 10.0.0.7"
    );
    kill(Pid::from_raw(watch.id().try_into().unwrap()), Signal::SIGINT).unwrap();
    assert_eq!(watch.wait().unwrap().code(), Some(0));
    assert!(lines.next().is_none());
}

#[test]
fn a_watch_ends_with_1_if_the_service_does() {
    let service = three_pods();
    let lost = "event: lost\ndata: {\"count\": 7}\n\n";
    service.answer_text(
        &format!("GET /v1/events?pod={A}"),
        200,
        &format!("{}{lost}END", event_text("shop", "up")),
    );
    let output = service.run(&["pod", "watch", "shop/web-1", "-o", "json"]);
    let error = fault(&output, 1);
    assert!(error.starts_with("the service has ended"), "{error}");
    let lines: Vec<Value> = String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines[0]["message"], "up");
    assert_eq!(lines[1], json!({"lost": {"count": 7}}));
}

#[test]
fn a_watch_ends_with_1_if_the_service_is_killed() {
    let service = three_pods();
    service.answer_text("GET /v1/events", 200, &event_text("shop", "up"));
    let mut watch =
        service.command(&["pod", "watch"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut out = BufReader::new(watch.stdout.take().unwrap());
    out.read_line(&mut String::new()).unwrap();
    service.end();
    let output = watch.wait_with_output().unwrap();
    let error = fault(&output, 1);
    assert!(error.contains("service"), "{error}");
}

#[test]
fn a_watch_whose_reader_is_gone_ends_quietly() {
    let service = three_pods();
    service.answer_text("GET /v1/events", 200, &event_text("shop", "up").repeat(2));
    let mut watch =
        service.command(&["pod", "watch"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(watch.stdout.take());
    let output = watch.wait_with_output().unwrap();
    assert_eq!((output.status.code(), &*output.stderr), (Some(0), &b""[..]));
}

/// What a command writes to a terminal.
fn on_a_terminal(service: &Service, more: &[(&str, &str)]) -> String {
    let pty = nix::pty::openpty(None, None).unwrap();
    let (ours, theirs): (OwnedFd, OwnedFd) = (pty.master, pty.slave);
    let mut child = service
        .command(&["pod", "list", "--no-headers"])
        .env("TERM", "xterm")
        .envs(more.iter().copied())
        .stdout(theirs)
        .spawn()
        .unwrap();
    assert!(child.wait().unwrap().success());
    let mut shown = Vec::new();
    let mut piece = [0; 4096];
    let mut ours = File::from(ours);
    // Reading ends with EIO once no process has the terminal.
    while let Ok(count @ 1..) = ours.read(&mut piece) {
        shown.extend_from_slice(&piece[..count]);
    }
    String::from_utf8(shown).unwrap()
}

#[test]
fn colours_are_for_terminals_only() {
    let service = three_pods();
    assert!(!service.stdout(&["pod", "list"]).contains('\u{1b}'));
    let shown = on_a_terminal(&service, &[]);
    assert!(
        shown.contains("\u{1b}[31mDown\u{1b}[0m") && shown.contains("\u{1b}[32mUp\u{1b}[0m"),
        "{shown:?}"
    );
    assert!(!on_a_terminal(&service, &[("NO_COLOR", "1")]).contains('\u{1b}'));
    assert!(!on_a_terminal(&service, &[("TERM", "dumb")]).contains('\u{1b}'));
}

#[test]
fn the_status_fits_one_screen() {
    let service = Service::start();
    let status = json!({
        "version": "0.1.0", "since": days_ago(10), "ready": false,
        "parts": [{"name": "api", "works": true}, {"name": "rules", "works": false, "reason": "nft is missing: install nftables"}],
        "pods": 3, "podsByPhase": {"Up": 2, "Down": 1},
        "stopCost": {"podsLost": 2, "podsAtRisk": 0, "startsInterrupted": 1},
    });
    service.answer("GET /v1/status", 200, &status);
    assert_eq!(
        service.stdout(&["status"]),
        "secure-comms-adaptor 0.1.0: not ready, up for 10d\n\n\
         ok api\nxx rules: nft is missing: install nftables\n\n\
         pods: 3 (2 Up, 1 Down)\n\
         a restart of the service would cost now: 2 pods that use it (the runtime ends them); 1 start, which goes on \
         afterwards\n"
    );
    let json: Value = serde_json::from_str(&service.stdout(&["status", "-o", "json"])).unwrap();
    assert_eq!(json["stopCost"]["podsLost"], 2);
    let yaml = service.stdout(&["status", "-o", "yaml"]);
    assert!(yaml.contains("\n  podsLost: 2\n"), "{yaml}");
}

#[test]
fn keys_are_listed_rotated_and_pruned() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    let keys = |args: &[&str]| {
        let args = [&["keys"], args, &["--store", store.to_str().unwrap()]].concat();
        command(Path::new("/nonexistent"), &args).output().unwrap()
    };
    let json = || -> Value { serde_json::from_slice(&keys(&["list", "-o", "json"]).stdout).unwrap() };
    assert_eq!(json(), json!({"items": []}));
    let made =
        command(Path::new("/nonexistent"), &["keygen", "--pod-id", "p1", "--store", store.to_str().unwrap()])
            .output()
            .unwrap();
    assert!(made.status.success());
    let first = json()["items"][0]["fingerprint"].as_str().unwrap().to_owned();
    assert_eq!(json()["items"], json!([{"fingerprint": first, "current": true, "pods": ["p1"]}]));

    let rotated = keys(&["rotate"]);
    assert!(String::from_utf8_lossy(&rotated.stdout).starts_with("ssh-ed25519 "), "{rotated:?}");
    let items = json()["items"].clone();
    assert_eq!(items[1], json!({"fingerprint": first, "current": false, "pods": ["p1"]}));
    let table = String::from_utf8(keys(&["list", "--no-headers"]).stdout).unwrap();
    assert_eq!(table.lines().nth(1).unwrap(), format!("{first}   no    1"));

    let pruned = String::from_utf8(keys(&["prune"]).stdout).unwrap();
    assert_eq!(pruned, format!("{first}: kept for p1\n"));
    let second = items[0]["fingerprint"].as_str().unwrap();
    assert!(keys(&["rotate"]).status.success());
    assert_eq!(
        String::from_utf8(keys(&["prune"]).stdout).unwrap().lines().next().unwrap(),
        format!("{second}: removed")
    );
}
