//! A TCP proxy between the worker node and the VM, which can reset, freeze and delay its connections.

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

/// What the proxy does with its connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Forwards them.
    Carries,
    /// Keeps them open and forwards nothing: half-open to both sides.
    Frozen,
}

/// A proxy from a local address to a server; its connections end when it is dropped.
#[derive(Debug)]
pub struct TcpProxy {
    address: SocketAddr,
    state: watch::Sender<State>,
    cuts: watch::Sender<u64>,
    serving: JoinHandle<()>,
}

impl TcpProxy {
    /// Starts a proxy to `server`.
    ///
    /// # Errors
    /// If no port is free.
    pub async fn to(server: SocketAddr) -> Result<Self> {
        Self::with_delay(server, Duration::ZERO).await
    }

    /// Starts a proxy to `server` that delivers each byte `delay` later; up to `CHUNKS` chunks are in flight.
    ///  of its queue.
    ///
    /// # Errors
    /// If no port is free.
    pub async fn with_delay(server: SocketAddr, delay: Duration) -> Result<Self> {
        let listener =
            TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.context("TCP proxy: binding a port")?;
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

    /// Address that clients connect to.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Resets every connection; new ones are forwarded.
    pub fn cut(&self) {
        self.cuts.send_modify(|cuts| *cuts += 1);
    }

    /// Forwards nothing from now on; both ends see a silent peer.
    pub fn freeze(&self) {
        self.state.send_replace(State::Frozen);
    }

    /// Forwards again, beginning with what was held back.
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

/// Makes the kernel reset the connection when its socket is dropped.
fn reset(stream: TcpStream) {
    // A closed socket can't be reset.
    drop(stream.set_zero_linger());
}

/// Limit of the bytes in flight in one direction, in chunks of at most [`CHUNK`] bytes.
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
        // The end of the stream and an error both end the direction.
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
        // The other side may be closed already.
        drop(to.shutdown().await);
    }
}
