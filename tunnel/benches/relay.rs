//! Cost of the relay itself, over streams in memory without a transport. Both ends and their programs share one thread,
//! as in the agent.
//!
//! `cargo bench -p secure-comms-tunnel --bench relay`
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "the harness of the tests, and what criterion's macros make"
)]

#[path = "../tests/harness/mod.rs"]
mod harness;

use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use harness::{Connection, Io, both_kinds};
use secure_comms_protocol::limits::CreditLimits;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::runtime::{Builder, Runtime};

/// Bytes of one round of the bulk benchmark.
const BULK: usize = 16 * 1024 * 1024;
/// Bytes of a request and of its answer.
const MESSAGE: usize = 200;

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

/// Two programs joined by a tunnel between their sockets; `kind` 0 is TCP, 1 is unix.
async fn tunnel(kind: usize) -> (Connection, Box<dyn Io>, Box<dyn Io>) {
    let (client, near) = both_kinds().await.swap_remove(kind);
    let (server, far) = both_kinds().await.swap_remove(kind);
    let connection = Connection::new(CreditLimits::KUBERNETES);
    drop(connection.join(near, far).await);
    (connection, client, server)
}

/// Time of this number of bulk transfers in one direction.
async fn bulk(rounds: u64, kind: usize) -> Duration {
    let (_connection, mut client, mut server) = tunnel(kind).await;
    let data = vec![7; 64 * 1024];
    let start = Instant::now();
    for _ in 0..rounds {
        let send = async {
            for _ in 0..BULK / data.len() {
                client.write_all(&data).await.unwrap();
            }
        };
        let receive = async {
            let mut buffer = vec![0; 64 * 1024];
            let mut left = BULK;
            while left > 0 {
                let got = server.read(&mut buffer).await.unwrap();
                assert_ne!(got, 0, "an end");
                left -= got;
            }
        };
        tokio::join!(send, receive);
    }
    start.elapsed()
}

/// Time of this number of requests, each sent after the previous answer.
async fn ping_pong(rounds: u64, kind: usize) -> Duration {
    let (_connection, mut client, mut server) = tunnel(kind).await;
    let (mut request, mut answer) = ([1; MESSAGE], [2; MESSAGE]);
    let start = Instant::now();
    for _ in 0..rounds {
        client.write_all(&request).await.unwrap();
        server.read_exact(&mut answer).await.unwrap();
        server.write_all(&answer).await.unwrap();
        client.read_exact(&mut request).await.unwrap();
    }
    start.elapsed()
}

fn relay(criterion: &mut Criterion) {
    for (kind, name) in ["tcp", "unix"].into_iter().enumerate() {
        let mut group = criterion.benchmark_group(format!("relay/{name}"));
        group.throughput(Throughput::Bytes(BULK as u64));
        group.sample_size(10);
        group.bench_function("bulk, 16 MiB one way", |bencher| {
            bencher.iter_custom(|rounds| runtime().block_on(bulk(rounds, kind)));
        });
        group.throughput(Throughput::Elements(1));
        group.sample_size(50);
        group.bench_function("200 bytes there and back", |bencher| {
            bencher.iter_custom(|rounds| runtime().block_on(ping_pong(rounds, kind)));
        });
        group.finish();
    }
}

criterion_group!(benches, relay);
criterion_main!(benches);
