//! Clients that send known bytes through an inbound all the time, and check what comes back.
//!
//! Faults may end a connection at any moment. A connection must neither deliver other bytes than those that were
//! sent, nor hang.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::simulators::kata::client::{EchoSession, Surplus};
use crate::simulators::kata::framed::Framed;
use crate::simulators::kata::pattern::Mismatch;

/// Bytes of a short request.
const SHORT: u64 = 200;
/// Pauses between connections, so that many lifetimes fit on a small machine.
const SHORT_PAUSE: Duration = Duration::from_millis(100);
const LONG_PAUSE: Duration = Duration::from_millis(20);
/// Longest time for which a client may hang: for a peer (30 s), for a dead connection (20 s), plus some for a slow machine.
const HANG: Duration = Duration::from_secs(75);

/// What the clients of a lifetime have seen.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Connections that completed.
    pub finished: u64,
    /// Connections that ended early.
    pub broken: Vec<Broken>,
    /// Bytes that were sent and came back.
    pub bytes: u64,
    /// Violated requirements.
    pub violations: Vec<String>,
}

/// A connection that ended early.
#[derive(Clone, Debug)]
pub struct Broken {
    /// When the client noticed.
    pub at: Instant,
    /// The tunnel, and what the client got instead of its answer.
    pub what: String,
}

/// Running clients.
#[derive(Debug)]
pub(super) struct Traffic {
    seen: Arc<Mutex<Seen>>,
    calm: watch::Sender<Calm>,
    clients: JoinSet<()>,
}

/// What connections may do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Calm {
    /// Any connection may break.
    No,
    /// No connection that begins now may break.
    Yes,
    /// Clients complete their requests and leave.
    Over,
}

/// What the clients of one inbound have in common.
#[derive(Clone)]
struct Place {
    name: &'static str,
    address: SocketAddr,
    seen: Arc<Mutex<Seen>>,
    calm: watch::Receiver<Calm>,
}

impl Traffic {
    /// Starts clients at each of these inbounds: short ones, and a long-lived one with requests of `request` bytes.
    #[must_use]
    pub(super) fn start(places: &[(&'static str, SocketAddr)], seed: u64, request: u64) -> Self {
        let (calm, _) = watch::channel(Calm::No);
        let mut traffic = Self { seen: Arc::default(), calm, clients: JoinSet::new() };
        for &(name, address) in places {
            let place =
                Place { name, address, seen: Arc::clone(&traffic.seen), calm: traffic.calm.subscribe() };
            traffic.clients.spawn(place.clone().again_and_again(seed, SHORT, 1, SHORT_PAUSE));
            traffic.clients.spawn(place.again_and_again(!seed, request, u64::MAX, LONG_PAUSE));
        }
        traffic
    }

    /// From now on, no new connection may break.
    pub(super) fn calm(&self) {
        self.calm.send_replace(Calm::Yes);
    }

    /// Lets the clients complete and leave; returns what they have seen.
    pub(super) async fn end(mut self) -> Seen {
        self.calm.send_replace(Calm::Over);
        while let Some(ended) = self.clients.join_next().await {
            if let Err(error) = ended {
                lock(&self.seen).violations.push(format!("a client: {error}"));
            }
        }
        lock(&self.seen).clone()
    }

    /// What they have seen so far.
    #[must_use]
    pub(super) fn seen(&self) -> Seen {
        lock(&self.seen).clone()
    }
}

impl Place {
    /// Opens connections, one after the other, each with at most `requests` requests.
    async fn again_and_again(self, seed: u64, bytes: u64, requests: u64, pause: Duration) {
        let mut number = seed;
        while *self.calm.borrow() != Calm::Over {
            let calm = *self.calm.borrow() == Calm::Yes;
            let result = self.connection(&mut number, bytes, requests, pause).await;
            self.note(result, calm);
            sleep(pause).await;
        }
    }

    fn note(&self, result: Result<()>, calm: bool) {
        let mut seen = lock(&self.seen);
        let Err(error) = result else {
            seen.finished += 1;
            return;
        };
        seen.broken
            .push(Broken { at: Instant::now(), what: format!("a client of {}: {error:#}", self.name) });
        if calm || is_violation(&error) {
            let when = if calm { ", when all was calm" } else { "" };
            seen.violations.push(format!("a client of {}{when}: {error:#}", self.name));
        }
    }

    async fn connection(&self, number: &mut u64, bytes: u64, requests: u64, pause: Duration) -> Result<()> {
        let stream = TcpStream::connect(self.address).await.context("connecting to the inbound")?;
        let mut session = EchoSession::open(Framed::new(stream)).await?;
        for done in 0..requests {
            if done > 0 {
                sleep(pause).await;
                if *self.calm.borrow() == Calm::Over {
                    break;
                }
            }
            *number = number.wrapping_add(1);
            in_time(HANG, session.roundtrip(bytes, *number)).await?;
            lock(&self.seen).bytes += bytes;
        }
        in_time(HANG, session.finish()).await
    }
}

async fn in_time<T>(limit: Duration, what: impl Future<Output = Result<T>>) -> Result<T> {
    timeout(limit, what).await.map_err(|_| anyhow!(Hang(limit)))?
}

/// Error of a client that got neither an answer nor an end in time.
#[derive(Debug)]
struct Hang(Duration);

impl std::fmt::Display for Hang {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "neither an answer nor an end within {} s", self.0.as_secs())
    }
}

impl std::error::Error for Hang {}

/// One request through an inbound.
///
/// # Errors
/// If the answer does not come, or differs from the request.
pub(super) async fn request(address: SocketAddr, seed: u64) -> Result<()> {
    let stream = TcpStream::connect(address).await.context("connecting to the inbound")?;
    request_over(Framed::new(stream), seed).await
}

async fn request_over(stream: impl AsyncRead + AsyncWrite + Unpin, seed: u64) -> Result<()> {
    let mut session = EchoSession::open(stream).await?;
    session.roundtrip(SHORT, seed).await?;
    session.finish().await
}

/// Whether bytes were wrong or a client hung; any other error only ends its connection.
#[must_use]
pub(super) fn is_violation(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause.is::<Mismatch>()
            || cause.is::<Surplus>()
            || cause.is::<Hang>()
            || cause.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == ErrorKind::InvalidData)
    })
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

    use super::*;

    /// Sends a request to a server whose answer `spoil` changes.
    async fn answered(spoil: fn(Vec<u8>) -> Vec<u8>) -> anyhow::Error {
        let (client, mut server) = duplex(64 * 1024);
        let server = async move {
            server.read_exact(&mut [0; 8]).await.unwrap();
            let mut sent = vec![0; 200];
            server.read_exact(&mut sent).await.unwrap();
            server.write_all(&spoil(sent)).await.unwrap();
            server.shutdown().await.unwrap();
            // Held until the client has left.
            drop(server.read_to_end(&mut Vec::new()).await);
        };
        tokio::join!(request_over(client, 5), server).0.unwrap_err()
    }

    #[tokio::test]
    async fn a_byte_changed_lost_doubled_or_added_is_a_violation() {
        let spoils: [fn(Vec<u8>) -> Vec<u8>; 4] = [
            |mut bytes| {
                bytes[77] ^= 1;
                bytes
            },
            |mut bytes| {
                bytes.remove(77);
                bytes
            },
            |mut bytes| {
                bytes.insert(77, bytes[77]);
                bytes
            },
            |mut bytes| {
                bytes.push(0);
                bytes
            },
        ];
        for spoil in spoils {
            let error = answered(spoil).await;
            assert!(is_violation(&error), "{error:#}");
        }
    }

    #[tokio::test]
    async fn an_end_is_none() {
        let error = answered(|bytes| bytes[..100].to_vec()).await;
        assert!(!is_violation(&error), "{error:#}");
        let (client, server) = duplex(64);
        drop::<DuplexStream>(server);
        assert!(!is_violation(&request_over(client, 1).await.unwrap_err()));
    }

    #[tokio::test]
    async fn a_frame_that_is_none_is_a_violation() {
        let (client, mut server) = duplex(64 * 1024);
        let server = async move {
            server.read_exact(&mut [0; 200]).await.unwrap();
            server.write_all(&[0xff; 200]).await.unwrap();
            drop(server.read_to_end(&mut Vec::new()).await);
        };
        let error = tokio::join!(request_over(Framed::new(client), 5), server).0.unwrap_err();
        assert!(is_violation(&error), "{error:#}");
    }

    #[tokio::test]
    async fn a_client_that_hangs_is_a_violation() {
        let error = in_time(Duration::ZERO, std::future::pending::<Result<()>>()).await.unwrap_err();
        assert!(is_violation(&error));
    }

    #[tokio::test]
    async fn what_breaks_when_all_is_calm_is_a_violation() {
        // A port that is not listened on.
        let address = crate::harness::scene::free_port().unwrap();
        let traffic = Traffic::start(&[("CLOSED", address)], 1, 200);
        while traffic.seen().broken.is_empty() {
            tokio::task::yield_now().await;
        }
        assert!(traffic.seen().violations.is_empty());
        traffic.calm();
        while traffic.seen().violations.is_empty() {
            sleep(Duration::from_millis(1)).await;
        }
        let seen = traffic.end().await;
        assert!(seen.violations[0].contains("CLOSED, when all was calm"), "{:?}", seen.violations);
    }
}
