//! A TCP path that can be cut and frozen: what lies between the worker node and the VM, in hostile hands.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};

/// What the path does with the connections on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Carries them.
    Carries,
    /// Takes them and moves nothing: half-open to both sides.
    Frozen,
}

/// A path from a local address to a server; ends with its connections when dropped.
#[derive(Debug)]
pub struct TcpProxy {
    address: SocketAddr,
    state: watch::Sender<State>,
    cuts: watch::Sender<u64>,
    serving: JoinHandle<()>,
}

impl TcpProxy {
    /// Lays it to `server`.
    ///
    /// # Errors
    /// No port is free.
    pub async fn to(server: SocketAddr) -> Result<Self> {
        Self::with_delay(server, Duration::ZERO).await
    }

    /// Lays a long one: what goes in comes out so much later, however much of it is under way.
    ///
    /// # Errors
    /// No port is free.
    pub async fn with_delay(server: SocketAddr, delay: Duration) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.context("laying a proxy")?;
        let address = listener.local_addr()?;
        let (state, cuts) = (watch::Sender::new(State::Carries), watch::Sender::new(0));
        let ends = Arc::new((state.subscribe(), cuts.subscribe()));
        let serving = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (state, cuts) = (ends.0.clone(), ends.1.clone());
                tokio::spawn(carry(client, server, delay, state, cuts));
            }
        });
        Ok(Self { address, state, cuts, serving })
    }

    /// Where clients connect.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Resets every connection; new ones are carried.
    pub fn cut(&self) {
        self.cuts.send_modify(|cuts| *cuts += 1);
    }

    /// Carries nothing from now on, and tells nobody.
    pub fn freeze(&self) {
        self.state.send_replace(State::Frozen);
    }

    /// Carries again, what was held back first.
    pub fn thaw(&self) {
        self.state.send_replace(State::Carries);
    }
}

impl Drop for TcpProxy {
    fn drop(&mut self) {
        self.serving.abort();
        self.cut();
    }
}

async fn carry(
    client: TcpStream,
    server: SocketAddr,
    delay: Duration,
    state: watch::Receiver<State>,
    mut cuts: watch::Receiver<u64>,
) {
    cuts.mark_unchanged();
    let Ok(server) = TcpStream::connect(server).await else { return reset(client) };
    let ((client_read, client_write), (server_read, server_write)) =
        (client.into_split(), server.into_split());
    let up = pump(client_read, server_write, delay, state.clone());
    let down = pump(server_read, client_write, delay, state);
    tokio::pin!(up, down);
    tokio::select! {
        _ = cuts.changed() => {}
        _ = async { tokio::join!(&mut up, &mut down) } => {}
    }
}

/// Dropping a socket after this resets its connection.
fn reset(stream: TcpStream) {
    // A socket that is dead already can't be reset.
    drop(stream.set_zero_linger());
}

/// What a long proxy may have under way in a direction, in chunks of at most [`CHUNK`] bytes.
const CHUNKS: usize = 4096;
const CHUNK: usize = 64 * 1024;

async fn pump(from: OwnedReadHalf, to: OwnedWriteHalf, delay: Duration, state: watch::Receiver<State>) {
    drop(from.as_ref().set_zero_linger());
    let (into, out) = mpsc::channel(CHUNKS);
    tokio::join!(take_in(from, into, delay), give_out(out, to, state));
}

async fn take_in(mut from: OwnedReadHalf, into: mpsc::Sender<(Instant, Bytes)>, delay: Duration) {
    loop {
        let mut chunk = BytesMut::with_capacity(CHUNK);
        // An end and an error both end the direction.
        let Ok(1..) = from.read_buf(&mut chunk).await else { return };
        if into.send((Instant::now() + delay, chunk.freeze())).await.is_err() {
            return;
        }
    }
}

async fn give_out(
    mut out: mpsc::Receiver<(Instant, Bytes)>,
    mut to: OwnedWriteHalf,
    mut state: watch::Receiver<State>,
) {
    while let Some((due, chunk)) = out.recv().await {
        sleep_until(due).await;
        let carries = state.wait_for(|state| *state == State::Carries).await.is_ok();
        if !carries || to.write_all(&chunk).await.is_err() {
            return;
        }
    }
    if state.wait_for(|state| *state == State::Carries).await.is_ok() {
        // That the other side is dead already makes no difference.
        drop(to.shutdown().await);
    }
}
