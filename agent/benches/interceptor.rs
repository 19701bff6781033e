//! What the interceptor itself costs, a frame or a request at a time, without sockets.
//!
//! `cargo bench -p agent-protocol-forwarder --bench interceptor`
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "clippy.toml lets tests fail loudly; criterion's macros make the rest"
)]

#[path = "../src/kata/messages.rs"]
#[allow(dead_code, reason = "the unit tests use the rest")]
mod messages;

use std::hint::black_box;

// The modules that messages.rs imports.
use agent_protocol_forwarder::kata::sources::MountPrefixes;
use agent_protocol_forwarder::kata::{KataAgent, edit, frame};
use bytes::Bytes;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use frame::REQUEST;
use messages::{CreateContainer, CreateSandbox, Linux, LinuxNamespace, Mount, Oci, request};
use prost::Message;
use secure_comms_protocol::limits::MESSAGE_MAX;
use secure_comms_tunnel::intercept::{Interceptor, ToServer};

/// Passes the messages of a stream through the interceptor; returns the number of bytes that passed.
fn take(messages: &[Bytes]) -> usize {
    let (mut to, _from) = KataAgent::new(Some("/run/netns/podns"), MountPrefixes::default()).begin();
    let mut passed = 0;
    for message in messages {
        to.on_message(message.clone(), &mut |piece| passed += piece.len()).unwrap();
    }
    assert!(!to.has_pending());
    passed
}

/// A stream as the relay receives it: in messages, the last of which may be shorter.
fn messages_of(stream: &[u8]) -> Vec<Bytes> {
    let stream = Bytes::copy_from_slice(stream);
    (0..stream.len())
        .step_by(MESSAGE_MAX)
        .map(|at| stream.slice(at..stream.len().min(at + MESSAGE_MAX)))
        .collect()
}

/// A typical container request: some 8 KiB, without bind mounts, which would wait for a file system.
fn container() -> Vec<u8> {
    let namespace =
        |kind: &str| LinuxNamespace { kind: kind.into(), path: "/proc/1/ns".into(), later: String::new() };
    let mount = |number| Mount {
        destination: format!("/mnt/{number}"),
        source: "tmpfs".into(),
        kind: "tmpfs".into(),
        options: vec!["nosuid".into(), "mode=755".into(), "size=65536k".into()],
    };
    let oci = Oci {
        version: "1.1.0".into(),
        mounts: (0..24).map(mount).collect(),
        annotations: (0..24).map(|number| (format!("io.kubernetes.cri.{number}"), "x".repeat(64))).collect(),
        linux: Some(Linux {
            namespaces: ["ipc", "uts", "mount", "network", "pid"].map(namespace).into(),
            later: vec![3; 256],
        }),
        later: vec![7; 3000],
    };
    let container = CreateContainer { container_id: "c".repeat(64), oci: Some(oci), later: 7 };
    request(5, "CreateContainer", &container.encode_to_vec())
}

fn interceptor(criterion: &mut Criterion) {
    let small = messages::frame(3, 3, &[1; 200]);
    let sandbox = CreateSandbox {
        dns: vec!["10.0.0.1".into()],
        sandbox_id: "s".repeat(64),
        ..CreateSandbox::default()
    };
    let streams = [
        ("passes, frames of 32 KiB", messages::frame(REQUEST + 2, 3, &[1; 32 * 1024]).repeat(32)),
        ("passes, frames of 200 bytes", small.repeat(1000)),
        ("passes, requests of 200 bytes", request(7, "WriteStdin", &[2; 200]).repeat(1000)),
        ("edited, CreateContainer of 8 KiB", container()),
        ("edited, CreateSandbox", request(3, "CreateSandbox", &sandbox.encode_to_vec())),
    ];
    let mut group = criterion.benchmark_group("interceptor");
    for (name, stream) in streams {
        let pieces = messages_of(&stream);
        let passed = take(&pieces);
        assert_eq!(
            passed == stream.len(),
            name.starts_with("passes"),
            "{name}: {passed} of {}",
            stream.len()
        );
        group.throughput(Throughput::Bytes(stream.len() as u64));
        group.bench_function(name, |bencher| bencher.iter(|| take(black_box(&pieces))));
    }
    group.finish();
}

criterion_group!(benches, interceptor);
criterion_main!(benches);
