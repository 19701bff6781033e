//! A TCP line between adaptor and agent that a test controls to the byte and to the SSH record: it resets, closes and holds
//! its connections, all or one, and lets new ones hang as a network does that drops their first packets.
//!
//! Records are found in what passes: our programs use AES-GCM, whose packets have their length in clear (RFC 5647 7.3).

mod records;

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::socket::{Backlog, listen};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use records::Records;

/// How a connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// Both ends get a TCP reset.
    Reset,
    /// Both ends get all that was forwarded, and then the end of the stream.
    Close,
}

/// Direction of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the adaptor to the agent.
    ToAgent,
    /// From the agent to the adaptor.
    ToAdaptor,
}

/// What a [`Trap`] does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// Ends the connection on which the record was.
    EndOne(How),
    /// Ends all connections.
    EndAll(How),
    /// Holds the connection on which the record was: it stays open, and nothing passes.
    HoldOne,
}

/// Something that happens once, at a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trap {
    /// Direction in which records count, on all connections together.
    pub direction: Direction,
    /// Records that pass before it, at least one.
    pub records: u64,
    /// Bytes of the next record that pass as well.
    pub bytes: usize,
    /// What happens.
    pub act: Act,
}

/// What a connection has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Carry,
    Hold,
    End(How),
}

/// A line; its connections end when it is dropped.
#[derive(Debug)]
pub struct Line {
    address: SocketAddr,
    shared: Arc<Shared>,
    serving: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Signals a change of the state.
    changed: watch::Sender<()>,
}

#[derive(Debug)]
struct State {
    /// Orders of the connections that exist, by their numbers.
    connections: BTreeMap<u64, watch::Sender<Order>>,
    next: u64,
    /// Further connections hang while this many exist.
    most: usize,
    trap: Option<Trap>,
}

/// Connections that wait to be accepted, in normal times.
const BACKLOG: i32 = 128;
/// Size of a read, in bytes.
const CHUNK: usize = 64 * 1024;

impl Line {
    /// Starts a line to `server`.
    ///
    /// # Errors
    /// If no port is free.
    pub async fn to(server: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.context("line: binding a port")?;
        let address = listener.local_addr()?;
        let state = State { connections: BTreeMap::new(), next: 1, most: usize::MAX, trap: None };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: watch::Sender::default() });
        let serving = tokio::spawn(serve(listener, server, Arc::clone(&shared)));
        Ok(Self { address, shared, serving })
    }

    /// Address that the adaptor connects to.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Numbers of the connections that exist; they are given from 1 on in the order of their accepts.
    #[must_use]
    pub fn connections(&self) -> Vec<u64> {
        self.shared.lock().connections.keys().copied().collect()
    }

    /// Waits until `wanted` accepts the numbers of the connections that exist, and returns them. There is no timeout.
    pub async fn wait_for(&self, wanted: impl Fn(&[u64]) -> bool) -> Vec<u64> {
        let mut changed = self.shared.changed.subscribe();
        loop {
            changed.mark_unchanged();
            let connections = self.connections();
            // The sender lives in this line, so there is always another change to wait for.
            if wanted(&connections) || changed.changed().await.is_err() {
                return connections;
            }
        }
    }

    /// Ends every connection that exists.
    pub fn end_all(&self, how: How) {
        self.shared.lock().order(|_| true, Order::End(how));
    }

    /// Ends one connection.
    pub fn end(&self, connection: u64, how: How) {
        self.shared.lock().order(|number| number == connection, Order::End(how));
    }

    /// Holds every connection that exists: they stay open, and nothing passes. New ones are carried.
    pub fn hold_all(&self) {
        self.shared.lock().order(|_| true, Order::Hold);
    }

    /// Holds one connection.
    pub fn hold(&self, connection: u64) {
        self.shared.lock().order(|number| number == connection, Order::Hold);
    }

    /// Carries every connection again, beginning with what was held back.
    pub fn release(&self) {
        self.shared.lock().order(|_| true, Order::Carry);
    }

    /// From now on, a new connection hangs while `most` exist, as if its first packets were dropped.
    pub fn admit(&self, most: usize) {
        self.shared.lock().most = most;
        self.shared.changed.send_replace(());
    }

    /// Sets the trap, in the place of one that is set.
    pub fn arm(&self, trap: Trap) {
        self.shared.lock().trap = Some(trap);
        self.shared.changed.send_replace(());
    }

    /// Removes the trap; whether it had not happened.
    #[must_use]
    pub fn disarm(&self) -> bool {
        self.shared.lock().trap.take().is_some()
    }

    /// Waits until the trap has happened. There is no timeout.
    pub async fn happened(&self) {
        let mut changed = self.shared.changed.subscribe();
        loop {
            changed.mark_unchanged();
            // As in `wait_for`.
            if self.shared.lock().trap.is_none() || changed.changed().await.is_err() {
                return;
            }
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.serving.abort();
        self.end_all(How::Reset);
    }
}

impl State {
    /// Gives this order to the connections that `to` accepts, unless they have ended.
    fn order(&self, to: impl Fn(u64) -> bool, order: Order) {
        for (_, orders) in self.connections.iter().filter(|(number, _)| to(**number)) {
            orders.send_if_modified(|now| {
                let changes = *now != order && !matches!(now, Order::End(_));
                if changes {
                    *now = order;
                }
                changes
            });
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn admits(&self) -> bool {
        let state = self.lock();
        state.connections.len() < state.most
    }

    fn begin(&self) -> (u64, watch::Receiver<Order>) {
        let (orders, order) = watch::channel(Order::Carry);
        let mut state = self.lock();
        let number = state.next;
        state.next += 1;
        state.connections.insert(number, orders);
        drop(state);
        self.changed.send_replace(());
        (number, order)
    }

    fn over(&self, number: u64) {
        self.lock().connections.remove(&number);
        self.changed.send_replace(());
    }

    /// Counts a record for the trap; if it was the last one before it, the trap and that its bytes count now.
    fn passed(&self, direction: Direction) -> Option<Trap> {
        let mut state = self.lock();
        let trap = state.trap.as_mut().filter(|trap| trap.direction == direction)?;
        trap.records = trap.records.saturating_sub(1);
        (trap.records == 0).then_some(*trap)
    }

    fn happens(&self, number: u64, trap: Trap) {
        let mut state = self.lock();
        // Another connection was faster, or the trap was removed.
        if state.trap != Some(trap) {
            return;
        }
        state.trap = None;
        match trap.act {
            Act::EndOne(how) => state.order(|other| other == number, Order::End(how)),
            Act::EndAll(how) => state.order(|_| true, Order::End(how)),
            Act::HoldOne => state.order(|other| other == number, Order::Hold),
        }
        drop(state);
        self.changed.send_replace(());
    }
}

async fn serve(listener: TcpListener, server: SocketAddr, shared: Arc<Shared>) {
    let mut changed = shared.changed.subscribe();
    loop {
        changed.mark_unchanged();
        let filler = if shared.admits() { None } else { Some(full(&listener).await) };
        let accepted = tokio::select! {
            accepted = listener.accept(), if filler.is_none() => accepted,
            _ = changed.changed() => {
                if filler.is_some() && shared.admits() {
                    open_again(&listener, filler.flatten()).await;
                }
                continue;
            }
        };
        let Ok((client, _)) = accepted else { return };
        let (number, orders) = shared.begin();
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            carry(client, server, &shared, number, orders).await;
            shared.over(number);
        });
    }
}

/// Fills the queue of connections to accept: the kernel drops the first packets of others from now on.
async fn full(listener: &TcpListener) -> Option<TcpStream> {
    set_backlog(listener, 0);
    let address = listener.local_addr().ok()?;
    // If another connection was first, the queue is full without ours.
    timeout(Duration::from_millis(100), TcpStream::connect(address)).await.ok()?.ok()
}

/// Takes our own connection out of the queue.
async fn open_again(listener: &TcpListener, filler: Option<TcpStream>) {
    set_backlog(listener, BACKLOG);
    if filler.is_some() {
        drop(listener.accept().await);
    }
}

fn set_backlog(listener: &TcpListener, backlog: i32) {
    let set = Backlog::new(backlog).and_then(|backlog| listen(listener, backlog));
    if let Err(error) = set {
        eprintln!("line: setting the backlog of its listener: {error}");
    }
}

async fn carry(
    mut client: TcpStream,
    server: SocketAddr,
    shared: &Shared,
    number: u64,
    mut orders: watch::Receiver<Order>,
) {
    let Ok(mut server) = TcpStream::connect(server).await else {
        // A closed socket can't be reset.
        drop(client.set_zero_linger());
        return;
    };
    for stream in [&client, &server] {
        // Each record is to be on its path before the next one is counted.
        drop(stream.set_nodelay(true));
    }
    let how = {
        let ((client_read, client_write), (server_read, server_write)) = (client.split(), server.split());
        let pump = |direction| Pump { shared, number, direction, orders: orders.clone() };
        let there = pump(Direction::ToAgent).run(client_read, server_write);
        let back = pump(Direction::ToAdaptor).run(server_read, client_write);
        let both = async { tokio::join!(there, back) };
        tokio::select! {
            // The pumps are dropped with all that they have read and not forwarded.
            order = orders.wait_for(|order| matches!(order, Order::End(_))) => order.map(|order| *order).ok(),
            _ = both => None,
        }
    };
    match how {
        None => {}
        Some(Order::End(How::Close)) => {
            tokio::join!(close(&mut client), close(&mut server));
        }
        Some(_) => {
            // As above.
            drop((client.set_zero_linger(), server.set_zero_linger()));
        }
    }
}

/// Closes the socket for writing, and reads until its other end does: closed with unread bytes, it would be reset.
async fn close(stream: &mut TcpStream) {
    // It may have been closed by its other end.
    drop(stream.shutdown().await);
    let mut rest = [0; 4096];
    while let Ok(1..) = stream.read(&mut rest).await {}
}

/// One direction of a connection.
struct Pump<'a> {
    shared: &'a Shared,
    number: u64,
    direction: Direction,
    orders: watch::Receiver<Order>,
}

impl Pump<'_> {
    async fn run(mut self, mut from: ReadHalf<'_>, mut to: WriteHalf<'_>) {
        let mut records = Records::default();
        let mut buffer = vec![0; CHUNK];
        // The trap that waits for its bytes of the record that is passing, and how many of them are missing.
        let mut sprung: Option<(Trap, usize)> = None;
        // The end of the stream and an error both end the direction.
        while let Ok(size @ 1..) = from.read(&mut buffer).await {
            let mut rest = buffer.get(..size).unwrap_or_default();
            while !rest.is_empty() {
                if !self.carries().await {
                    return;
                }
                let most = sprung.map_or(rest.len(), |(_, missing)| missing.min(rest.len()));
                let (taken, ends) = records.take(rest.get(..most).unwrap_or_default());
                let (piece, after) = rest.split_at(taken);
                if to.write_all(piece).await.is_err() {
                    return;
                }
                rest = after;
                sprung = match sprung {
                    Some((trap, missing)) => Some((trap, missing - taken)),
                    None if ends => self.shared.passed(self.direction).map(|trap| (trap, trap.bytes)),
                    None => None,
                };
                if let Some((trap, 0)) = sprung {
                    sprung = None;
                    self.shared.happens(self.number, trap);
                }
            }
        }
        if self.carries().await {
            // The other end may be closed already.
            drop(to.shutdown().await);
        }
    }

    /// Waits until bytes may pass. It never returns once the connection ends: the pump is dropped then.
    async fn carries(&mut self) -> bool {
        self.orders.wait_for(|order| *order == Order::Carry).await.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::sleep;

    const SOON: Duration = Duration::from_secs(10);

    /// A line to a server that keeps what it gets.
    async fn line() -> (Line, TcpListener) {
        let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        (Line::to(server.local_addr().unwrap()).await.unwrap(), server)
    }

    async fn connected(line: &Line, server: &TcpListener) -> (TcpStream, TcpStream) {
        let client = TcpStream::connect(line.address()).await.unwrap();
        (client, server.accept().await.unwrap().0)
    }

    #[tokio::test]
    async fn a_trap_ends_the_connection_within_the_next_record() {
        let (line, server) = line().await;
        let (direction, act) = (Direction::ToAgent, Act::EndAll(How::Close));
        line.arm(Trap { direction, records: 1, bytes: 3, act });
        let (mut client, mut end) = connected(&line, &server).await;
        client.write_all(b"SSH-2.0-x\r\n\0\0\0\x0c\x0a and more").await.unwrap();
        let mut got = Vec::new();
        timeout(SOON, end.read_to_end(&mut got)).await.unwrap().unwrap();
        assert_eq!(got, b"SSH-2.0-x\r\n\0\0\0");
        assert!(!line.disarm());
        assert_eq!(timeout(SOON, client.read(&mut [0])).await.unwrap().unwrap(), 0);
    }

    #[tokio::test]
    async fn a_held_connection_goes_on_and_others_are_carried() {
        let (line, server) = line().await;
        let (mut held, mut held_end) = connected(&line, &server).await;
        held.write_all(b"a").await.unwrap();
        assert_eq!(timeout(SOON, held_end.read_u8()).await.unwrap().unwrap(), b'a');
        line.hold_all();
        held.write_all(b"b").await.unwrap();
        let (mut client, mut end) = connected(&line, &server).await;
        client.write_all(b"c").await.unwrap();
        assert_eq!(timeout(SOON, end.read_u8()).await.unwrap().unwrap(), b'c');
        assert!(timeout(Duration::from_millis(50), held_end.read_u8()).await.is_err());
        line.release();
        assert_eq!(timeout(SOON, held_end.read_u8()).await.unwrap().unwrap(), b'b');
    }

    #[tokio::test]
    async fn a_connection_that_is_not_admitted_hangs() {
        let (line, server) = line().await;
        let (_client, _end) = connected(&line, &server).await;
        line.admit(1);
        // The line needs a moment to fill its queue; a connection before that would be the one in the queue.
        sleep(Duration::from_millis(200)).await;
        let mut second = tokio::spawn(TcpStream::connect(line.address()));
        assert!(timeout(Duration::from_millis(300), &mut second).await.is_err());
        line.admit(2);
        timeout(SOON, second).await.unwrap().unwrap().unwrap();
        timeout(SOON, server.accept()).await.unwrap().unwrap();
        assert_eq!(line.connections().len(), 2);
    }

    #[tokio::test]
    async fn a_reset_reaches_both_ends() {
        let (line, server) = line().await;
        let (mut client, mut end) = connected(&line, &server).await;
        line.wait_for(|connections| connections.len() == 1).await;
        line.end_all(How::Reset);
        for stream in [&mut client, &mut end] {
            let error = timeout(SOON, stream.read(&mut [0])).await.unwrap().unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        }
        line.wait_for(<[u64]>::is_empty).await;
    }
}
