//! The API and clients that are slow, large, strange, or not allowed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod api_support;
#[path = "../../adaptor/tests/support/mod.rs"]
mod support;

use std::fs::{self, Permissions};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::process::Command;

use api_support::{Answer, Node, PATIENCE, id, node, node_for};
use nix::unistd::geteuid;
use secure_comms_adaptor::pod::PodEvent;
use secure_comms_node::api::ApiError;
use secure_comms_node::api::client::{ClientError, StreamItem};
use secure_comms_node::api::types::{PodSpec, StartOrder};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::time::timeout;

/// What user 65534 reads from the API; empty if it cannot connect.
fn stranger(node: &Node) -> String {
    use std::os::unix::process::CommandExt as _;
    assert!(geteuid().is_root(), "only root can start a process of another user: run the test as root");
    let script = r#"use IO::Socket::UNIX; my $s = IO::Socket::UNIX->new(Peer => $ARGV[0]) or do { print STDERR "$!\n"; exit 0 };
        $s->print("GET /v1/pods HTTP/1.1\r\nHost: x\r\n\r\n"); $s->flush; print while <$s>;"#;
    let output =
        Command::new("/usr/bin/perl").args(["-e", script]).arg(&node.socket).uid(65534).gid(65534).output();
    let output = output.unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    println!("user 65534: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

fn let_others_pass(node: &Node) {
    for directory in [node.path(), node.socket.parent().unwrap()] {
        fs::set_permissions(directory, Permissions::from_mode(0o711)).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn another_user_is_refused() {
    let private = node(None).await;
    assert_eq!(fs::metadata(&private.socket).unwrap().mode() & 0o777, 0o600);
    assert_eq!(fs::metadata(private.socket.parent().unwrap()).unwrap().mode() & 0o777, 0o700);
    let_others_pass(&private);
    assert_eq!(stranger(&private), "");

    let shared = node_for(None, &[1]).await;
    let_others_pass(&shared);
    let answer = Answer::read(&stranger(&shared));
    assert_eq!((answer.status, answer.problem().word()), (403, "forbidden"));
    assert!(answer.body.contains("user 65534 may not use the API"));

    let open = node_for(None, &[65534]).await;
    let_others_pass(&open);
    assert_eq!(Answer::read(&stranger(&open)).status, 200);
}

#[tokio::test]
async fn strange_requests_are_refused_with_a_reason() {
    let node = node(None).await;
    for (method, path, body, status, word) in [
        ("GET", "/", "", 404, "no-route"),
        ("GET", "/v1/pods/", "", 404, "no-route"),
        ("GET", "/v1//pods", "", 404, "no-route"),
        ("GET", "/v1/pods/../status", "", 404, "no-route"),
        ("GET", "/v1/pods/a/b/c", "", 404, "no-route"),
        ("GET", "/v1/pods/none", "", 404, "not-found"),
        ("GET", "/v1/pods/%2e%2e", "", 422, "invalid-request"),
        ("GET", "/v1/pods/a%2Fb", "", 422, "invalid-request"),
        ("GET", "/v1/pods/a%00b", "", 422, "invalid-request"),
        ("GET", "/v1/pods/%0a%1b[2J", "", 422, "invalid-request"),
        ("GET", "/v1/pods/%ff", "", 400, "malformed-request"),
        ("DELETE", "/v1/pods/-x", "", 422, "invalid-request"),
        ("DELETE", "/v1/pods/p1?force=yes", "", 422, "invalid-request"),
        ("DELETE", "/v1/pods/p1?forced=true", "", 422, "invalid-request"),
        ("DELETE", "/v1/orphans/p1", "", 404, "no-orphan"),
        ("POST", "/v1/pods", "{}", 405, "method-not-allowed"),
        ("PATCH", "/v1/pods/p1", "{}", 405, "method-not-allowed"),
        ("PUT", "/v1/pods/p1", "", 400, "malformed-request"),
        ("PUT", "/v1/pods/p1", "{", 400, "malformed-request"),
        ("PUT", "/v1/pods/p1", "[]", 422, "invalid-request"),
        ("PUT", "/v1/pods/p1", r#"{"mode": 1}"#, 422, "invalid-request"),
        ("PUT", "/v1/pods/p1", r#"{"initDataDigest": "0a"}"#, 422, "invalid-request"),
        ("PUT", "/v1/pods/p1", r#"{"podRef": {"namespace": "a/b", "name": "c"}}"#, 422, "invalid-request"),
        ("PUT", "/v1/pods/p1?deadlineSeconds=-1", "{}", 422, "invalid-request"),
        ("PUT", "/v1/pods/p1?deadlineSeconds=0", "{}", 422, "invalid-request"),
        ("POST", "/v1/pods/p1/start", r#"{"addresses": []}"#, 422, "invalid-request"),
        ("POST", "/v1/pods/p1/start", r#"{"addresses": ["a b"]}"#, 422, "invalid-request"),
        ("POST", "/v1/pods/p1/start", r#"{"addresses": ["vm"]}"#, 404, "not-found"),
        ("GET", "/v1/events?pod=%2F", "", 422, "invalid-request"),
    ] {
        let answer = node.ask(method, path, body).await;
        let problem = answer.problem();
        assert_eq!((answer.status, problem.word()), (status, word), "{method} {path} {body}");
        assert_eq!(problem.faults.is_empty(), status != 422, "{method} {path} {body}");
        assert!(problem.instance.is_some_and(|at| path.starts_with(&at)), "{method} {path}");
        assert!(!problem.detail.is_empty() && !problem.detail.contains(['\n', '\x1b', '\0']));
    }
    let answer = node.ask("PATCH", "/v1/pods/p1", "").await;
    let allow = answer.head.lines().find(|line| line.starts_with("allow: ")).unwrap().to_owned();
    assert!(["get", "put", "delete"].iter().all(|method| allow.contains(method)), "{allow}");
    let form = node
        .raw(b"PUT /v1/pods/p1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}")
        .await;
    assert_eq!(Answer::read(&form).problem().word(), "media-type");
    assert!(node.client.pods().await.unwrap().is_empty());
}

#[tokio::test]
async fn what_is_too_large_is_refused() {
    let node = node(None).await;
    let large = format!(r#"{{"podRef": "{}"}}"#, "x".repeat(64 * 1024));
    assert_eq!(node.ask("PUT", "/v1/pods/p1", &large).await.problem().word(), "too-large");
    // Its length is not announced.
    let chunk = format!("10000\r\n{}\r\n1\r\n \r\n0\r\n\r\n", "x".repeat(0x10000));
    let head = "PUT /v1/pods/p1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n\
                Transfer-Encoding: chunked\r\n\r\n";
    assert_eq!(Answer::read(&node.raw(format!("{head}{chunk}").as_bytes()).await).status, 413);
    let long = format!("GET /v1/pods HTTP/1.1\r\nHost: x\r\nX: {}\r\n\r\n", "x".repeat(17 * 1024));
    assert_eq!(Answer::read(&node.raw(long.as_bytes()).await).status, 431);
    let many = format!("GET /v1/pods HTTP/1.1\r\nHost: x\r\n{}\r\n", "X: y\r\n".repeat(70));
    assert_eq!(Answer::read(&node.raw(many.as_bytes()).await).status, 431);
    let deep = format!("{}{}", "[".repeat(20_000), "]".repeat(20_000));
    assert!([400, 422].contains(&node.ask("PUT", "/v1/pods/p1", &deep).await.status));
    assert!(node.client.pods().await.unwrap().is_empty());
}

#[tokio::test]
async fn garbage_harms_nobody() {
    let node = node(None).await;
    for garbage in [
        &b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"[..],
        b"\0\0\0\0\r\n\r\n",
        b"HELO\r\n\r\n",
        b"SSH-2.0-x\r\n",
    ] {
        let back = node.raw(&[garbage, b"\r\n\r\n"].concat()).await;
        assert!(back.is_empty() || Answer::read(&back).status == 400, "{back}");
    }
    let get = "GET /v1/pods HTTP/1.1\r\nHost: x\r\n\r\n";
    let last = "GET /v1/status HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    let back = node.raw(format!("{get}{get}{last}").as_bytes()).await;
    assert_eq!(back.matches("HTTP/1.1 200 OK").count(), 3, "{back}");
    assert!(back.contains("podsByPhase"));
}

#[tokio::test(start_paused = true)]
async fn a_client_that_is_slow_is_cut_off() {
    let node = node(None).await;
    // The clock moves on whenever nothing else happens.
    assert_eq!(node.raw(b"GET /v1/pods HTTP/1.1\r\nHost:").await, "");
    assert_eq!(node.raw(b"").await, "");
    let head =
        "PUT /v1/pods/p1 HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{";
    assert_eq!(Answer::read(&node.raw(head.as_bytes()).await).problem().word(), "slow-request");
}

#[tokio::test]
async fn a_slow_reader_of_events_learns_what_it_lost() {
    const EVENTS: u64 = 20_000;
    let node = node(None).await;
    let mut slow = node.client.events(None, None).await.unwrap();
    // Its place is the end of the events, once it has begun.
    let mut quick = node.client.events(None, None).await.unwrap();
    for _ in 0..EVENTS / 100 {
        (0..100).for_each(|_| (node.observer)(&id("p1"), &PodEvent::Published));
        // Each event is kept, or counts as lost.
        tokio::task::yield_now().await;
    }
    (node.observer)(&id("p1"), &PodEvent::Stopped);
    for reader in [&mut slow, &mut quick] {
        let (mut read, mut lost) = (0, 0);
        loop {
            match timeout(PATIENCE, reader.next()).await.unwrap().unwrap().unwrap() {
                StreamItem::Event(event) if event.reason == "Stopped" => break,
                StreamItem::Event(_) => read += 1,
                StreamItem::Lost(gap) => lost += gap.count.unwrap(),
            }
        }
        assert_eq!(read + lost, EVENTS);
    }
}

#[tokio::test]
async fn there_are_not_too_many_readers() {
    let node = node(None).await;
    let mut readers = Vec::new();
    for _ in 0..32 {
        readers.push(node.client.events(None, None).await.unwrap());
    }
    let Err(ClientError::Problem(busy)) = node.client.events(None, None).await else {
        panic!("one too many")
    };
    assert_eq!((busy.status, busy.word(), busy.retry_after), (503, "busy", Some(5)));
    assert!(node.client.pods().await.unwrap().is_empty());
    drop(readers.pop());
    // Its place is free once the service has seen that it is gone.
    timeout(PATIENCE, async { while node.client.events(None, None).await.is_err() {} }).await.unwrap();
}

#[tokio::test]
async fn a_second_service_is_refused() {
    let mut node = node(None).await;
    let error = node.serve_again().await.unwrap_err();
    assert!(matches!(error, ApiError::InUse(_)), "{error}");
    assert!(error.to_string().contains("end the other secure-comms-adaptor serve first"));
    assert!(node.client.pods().await.unwrap().is_empty());
    node.end().await;
    assert!(!node.socket.exists());
    let error = node.client.pods().await.unwrap_err();
    assert!(error.to_string().contains("check that secure-comms-adaptor serve runs"), "{error}");
}

#[tokio::test]
async fn a_stale_socket_is_replaced_and_a_file_is_not() {
    let mut node = node(None).await;
    node.end().await;
    drop(std::os::unix::net::UnixListener::bind(&node.socket).unwrap());
    assert!(fs::metadata(&node.socket).unwrap().file_type().is_socket());
    // `stop` is true already: it ends once it has listened.
    node.serve_again().await.unwrap();
    assert!(!node.socket.exists());
    fs::write(&node.socket, "precious").unwrap();
    assert!(matches!(node.serve_again().await, Err(ApiError::InUse(_))));
    assert_eq!(fs::read_to_string(&node.socket).unwrap(), "precious");
}

#[tokio::test]
async fn the_end_of_the_service_ends_waits() {
    let mut node = node(None).await;
    node.client.prepare(&id("p1"), &PodSpec::default(), None).await.unwrap();
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut events = node.client.events(None, None).await.unwrap();
    let addresses = vec![silent.local_addr().unwrap().to_string()];
    let order = StartOrder { addresses, deadline_seconds: Some(300), wait: true };
    let client = node.client.clone();
    let start = tokio::spawn(async move { client.start(&id("p1"), &order).await });
    let mut idle = UnixStream::connect(&node.socket).await.unwrap();
    idle.write_all(b"GET /v1/pods HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    let answered = idle.read(&mut [0; 64]).await.unwrap();
    assert!(answered > 0);
    let mut changes = node.pods.subscribe(&id("p1")).unwrap();
    let connecting = changes.wait_for(|now| !now.addresses.is_empty());
    assert!(timeout(PATIENCE, connecting).await.unwrap().is_ok());
    node.end().await;
    let Err(ClientError::Problem(ending)) = start.await.unwrap() else { panic!("the start waited") };
    assert_eq!((ending.status, ending.word()), (503, "service-ending"));
    while events.next().await.unwrap().is_some() {}
    // The start itself goes on.
    assert!(node.pods.get(&id("p1")).is_some());
}
