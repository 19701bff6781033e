//! The service over streams and sockets.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "clippy.toml lets tests fail loudly; clippy does not take the helpers of an integration test for tests"
)]

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;

use metadata::{Behaviour, Cloud, Server, Step, serve_streams};

const REQUEST: &str = "GET /openstack/latest/user_data HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n";

/// What one connection over streams is answered, as qemu's guestfwd has it.
fn answered(behaviour: &str) -> Vec<u8> {
    let script = Behaviour::parse(behaviour).unwrap().script(Cloud::OpenStack, b"the user data".to_vec());
    let mut output = Vec::new();
    serve_streams(REQUEST.as_bytes(), &mut output, &script).unwrap();
    output
}

#[test]
fn one_connection_is_served_over_streams() {
    let answer = String::from_utf8(answered("ok")).unwrap();
    assert!(
        answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("\r\n\r\nthe user data"),
        "{answer}"
    );
}

#[test]
fn each_behaviour_is_wrong_as_named() {
    for (behaviour, expected) in [
        ("status-500", "HTTP/1.1 500 "),
        ("slow-0", "HTTP/1.1 200 "),
        ("stall", ""),
        ("garbage", "\x16\x03\x01\0garbage"),
        ("wrong-text", "HTTP/1.1 200 "),
        ("cut", "HTTP/1.1 200 "),
        ("big", "HTTP/1.1 200 "),
        ("redirect", "HTTP/1.1 302 "),
        ("encoded", "HTTP/1.1 200 OK\r\nContent-Encoding: gzip"),
        ("empty", "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n"),
    ] {
        assert!(answered(behaviour).starts_with(expected.as_bytes()), "{behaviour}");
    }
    assert!(!answered("cut").ends_with(b"data") && answered("big").len() > 70_000);
    for unknown in ["", "status-", "status-x", "slow-", "nope"] {
        assert!(Behaviour::parse(unknown).is_err(), "{unknown:?}");
    }
}

#[test]
fn a_reset_is_seen_as_one() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let server = Server::start(listener, Arc::new(|_, _| vec![Step::Reset])).unwrap();
    let mut client = TcpStream::connect(server.address()).unwrap();
    client.write_all(REQUEST.as_bytes()).unwrap();
    let error = client.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    assert_eq!(server.requests().len(), 1);
}
