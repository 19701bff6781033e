//! A TCP path that changes the bytes it carries: flipped, dropped, repeated, swapped, inserted or delayed.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::sleep;

/// A change, made once in a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Inverts a bit.
    Flip,
    /// Drops some bytes.
    Drop,
    /// Repeats some bytes.
    Repeat,
    /// Swaps two pieces.
    Swap,
    /// Inserts bytes that neither end sent.
    Insert,
    /// Delays all that follows, which is no fault.
    Delay,
}

/// Every change.
pub const CHANGES: [Change; 6] =
    [Change::Flip, Change::Drop, Change::Repeat, Change::Swap, Change::Insert, Change::Delay];

/// A change and its position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Kind of change.
    pub change: Change,
    /// Direction: from the client to the server, or back.
    pub to_server: bool,
    /// Position in the bytes of that direction.
    pub after: usize,
}

/// Change of a connection that has ended.
pub type Ended = Plan;

/// The path; its connections end when it is dropped.
#[derive(Debug)]
pub struct Tamper {
    address: SocketAddr,
    plan: watch::Sender<Option<Plan>>,
    ended: mpsc::UnboundedReceiver<Ended>,
    carried: Arc<AtomicU64>,
    serving: JoinHandle<()>,
}

impl Drop for Tamper {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Tamper {
    /// Starts a path to `server`, without changes.
    ///
    /// # Errors
    /// If no port is free.
    pub async fn to(server: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let (plan, plans) = watch::channel(None);
        let (report, ended) = mpsc::unbounded_channel();
        let carried = Arc::new(AtomicU64::new(0));
        let counted = carried.clone();
        let serving = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                counted.fetch_add(1, Ordering::Relaxed);
                tokio::spawn(carry(client, server, plans.clone(), report.clone()));
            }
        });
        Ok(Self { address, plan, ended, carried, serving })
    }

    /// Address that clients connect to.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Connections so far.
    #[must_use]
    pub fn connections(&self) -> u64 {
        self.carried.load(Ordering::Relaxed)
    }

    /// Changes the byte at the position in every connection, old or new, that reaches it from now on.
    pub fn change(&self, plan: Plan) {
        self.plan.send_replace(Some(plan));
    }

    /// Waits until a changed connection has ended.
    ///
    /// # Errors
    /// If it does not end in time.
    pub async fn ended(&mut self, patience: Duration) -> Result<Ended> {
        tokio::time::timeout(patience, self.ended.recv())
            .await
            .context("a changed connection stays")?
            .context("the path is gone")
    }

    /// Whether a change is set.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        self.plan.borrow().is_some()
    }

    /// Makes no more changes.
    pub fn leave(&self) {
        self.plan.send_replace(None);
    }
}

async fn carry(
    client: TcpStream,
    server: SocketAddr,
    plans: watch::Receiver<Option<Plan>>,
    report: mpsc::UnboundedSender<Ended>,
) {
    let Ok(server) = TcpStream::connect(server).await else { return };
    let ((client_read, client_write), (server_read, server_write)) =
        (client.into_split(), server.into_split());
    let changed = std::sync::Mutex::new(None);
    let there = pump(client_read, server_write, true, plans.clone(), &changed);
    let back = pump(server_read, client_write, false, plans, &changed);
    // The end of either direction ends the connection.
    tokio::select! {
        () = there => {}
        () = back => {}
    }
    let changed = *changed.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some(plan) = changed.filter(|plan| plan.change != Change::Delay) {
        // The receiver may be gone.
        let _ = report.send(plan);
    }
}

async fn pump(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    to_server: bool,
    plans: watch::Receiver<Option<Plan>>,
    changed: &std::sync::Mutex<Option<Plan>>,
) {
    let mut seen = 0;
    let mut buffer = vec![0; 16 * 1024];
    while let Ok(read @ 1..) = from.read(&mut buffer).await {
        let mut chunk = buffer.get(..read).unwrap_or_default().to_vec();
        let plan = *plans.borrow();
        let done = *changed.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let due =
            |plan: &Plan| done != Some(*plan) && plan.to_server == to_server && plan.after < seen + read;
        if let Some(plan) = plan.filter(due) {
            let at = plan.after.saturating_sub(seen).min(read - 1);
            if plan.change == Change::Delay {
                sleep(Duration::from_millis(300)).await;
            } else {
                spoil(&mut chunk, at, plan.change);
            }
            *changed.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(plan);
        }
        seen += read;
        if to.write_all(&chunk).await.is_err() {
            return;
        }
    }
}

/// Makes a change at a position of a chunk.
fn spoil(chunk: &mut Vec<u8>, at: usize, change: Change) {
    let piece: Vec<u8> = chunk.iter().skip(at).take(16).copied().collect();
    match change {
        Change::Flip => {
            if let Some(byte) = chunk.get_mut(at) {
                *byte ^= 1 << (at % 8);
            }
        }
        Change::Drop => drop(chunk.drain(at..at + piece.len())),
        Change::Repeat => drop(chunk.splice(at..at, piece)),
        // A single byte can't be swapped.
        Change::Swap if chunk.len() - at < 2 => spoil(chunk, at, Change::Flip),
        Change::Swap => {
            let half = chunk.len() - (chunk.len() - at) / 2;
            let tail = chunk.split_off(half);
            let head = chunk.split_off(at);
            chunk.extend(tail);
            chunk.extend(head);
        }
        Change::Insert => drop(chunk.splice(at..at, *b"inserted bytes")),
        Change::Delay => {}
    }
}
