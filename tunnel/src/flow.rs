//! Flow control by credits: what a peer may have on its way to us on each stream.
//!
//! An SSH window is re-opened by the library as soon as a message has arrived, not when it has been consumed
//! (RUSSH_NOTES D1), so it bounds nothing. Credits do: a sender spends them, and gets them back over the control
//! channel once the receiver's socket has taken the bytes. A message costs its length, at least
//! [`MESSAGE_COST_MIN`]. A peer that does not speak credits gets plain channels.

use std::collections::HashMap;
use std::sync::atomic::{AtomicI64, AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use secure_comms_protocol::RefusalReason;
use secure_comms_protocol::control::Credit;
use secure_comms_protocol::limits::{CreditLimits, MESSAGE_COST_MIN, MESSAGE_MAX};
use tokio::sync::{Notify, watch};

use self::window::Window;

mod window;

/// Below this much credit a sender waits until a good deal has come back, rather than send splinters.
const LOW_WATER: i64 = 4096;
/// More than any honest peer ever grants one stream, in bytes.
const GRANT_MAX: i64 = 1 << 30;

/// How the peer of a connection does flow control.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerFlow {
    /// By credits; what it grants each stream to begin with, in bytes.
    Credits(u32),
    /// By SSH windows alone (stock OpenSSH).
    WindowOnly,
}

/// Which end of the connection numbers its streams how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The adaptor: odd stream ids.
    Adaptor,
    /// The agent: even stream ids.
    Agent,
}

/// Why a stream can't be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// The limit of the connection.
    #[error("{}", RefusalReason::TooManyStreams)]
    TooMany,
    /// The peer used a stream id that is in use, or not its own to give.
    #[error("{}", RefusalReason::BadStreamId(*.0))]
    BadId(u32),
    /// The connection is gone.
    #[error("{}", RefusalReason::ConnectionGone)]
    Gone,
}

impl From<StreamError> for RefusalReason {
    fn from(error: StreamError) -> Self {
        match error {
            StreamError::TooMany => Self::TooManyStreams,
            StreamError::BadId(id) => Self::BadStreamId(id),
            StreamError::Gone => Self::ConnectionGone,
        }
    }
}

/// The peer sent more than it was granted: it must not be trusted to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the peer overran the credit of stream {0}")]
pub struct Overrun(pub u32);

/// The flow control of one connection.
#[derive(Clone, Debug)]
pub struct Credits(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    limits: CreditLimits,
    side: Side,
    peer: watch::Sender<Option<PeerFlow>>,
    gone: watch::Sender<bool>,
    table: Mutex<Table>,
    grants_waiting: Notify,
    slot_free: Notify,
    window_only_room: Notify,
}

#[derive(Debug, Default)]
struct Table {
    /// Those with credits.
    streams: HashMap<u32, Arc<SendState>>,
    next_id: u32,
    /// All streams, those too that wait for the peer's hello.
    slots: usize,
    grants: HashMap<u32, u32>,
    pool_used: u32,
    /// The shortest seen; the others have waited in our own queues.
    round_trip: Option<Duration>,
}

/// What the peer lets us send on a stream.
#[derive(Debug)]
struct SendState {
    available: AtomicI64,
    more: Notify,
}

impl Credits {
    /// The flow control of a new connection.
    pub fn new(side: Side, limits: CreditLimits) -> Self {
        let next_id = if side == Side::Adaptor { 1 } else { 2 };
        let table = Table { next_id, ..Table::default() };
        Self(Arc::new(Shared {
            limits,
            side,
            peer: watch::Sender::new(None),
            gone: watch::Sender::new(false),
            table: Mutex::new(table),
            grants_waiting: Notify::new(),
            slot_free: Notify::new(),
            window_only_room: Notify::new(),
        }))
    }

    /// What we grant each stream to begin with: the `credit` of our hello.
    pub fn initial(&self) -> u32 {
        self.0.limits.initial
    }

    /// The peer has said, or will never say, what it grants. The first word counts.
    pub fn set_peer_mode(&self, peer: PeerFlow) {
        self.0.peer.send_if_modified(|current| {
            let first = current.is_none();
            current.get_or_insert(peer);
            first
        });
    }

    /// Whether the peer's flow control was settled as this.
    pub fn peer_mode_is(&self, peer: PeerFlow) -> bool {
        *self.0.peer.borrow() == Some(peer)
    }

    /// Waits until the peer's flow control is known.
    ///
    /// # Errors
    /// The connection ends first.
    pub async fn peer(&self) -> Result<PeerFlow, StreamError> {
        let mut peer = self.0.peer.subscribe();
        tokio::select! {
            // First: no stream begins on a connection that has ended.
            biased;
            () = self.gone() => Err(StreamError::Gone),
            peer = peer.wait_for(Option::is_some) => peer.ok().and_then(|peer| *peer).ok_or(StreamError::Gone),
        }
    }

    /// A message to the peer and its answer took this long.
    pub fn round_trip(&self, took: Duration) {
        let mut table = self.table();
        table.round_trip = Some(table.round_trip.map_or(took, |shortest| shortest.min(took)));
    }

    /// The shortest round trip of which we were told.
    pub fn shortest_round_trip(&self) -> Option<Duration> {
        self.table().round_trip
    }

    /// The connection has ended, or must: nobody will grant anything any more.
    pub fn end(&self) {
        self.0.gone.send_replace(true);
    }

    /// Waits until no stream is open. For one caller at a time.
    pub async fn idle(&self) {
        while self.open_streams() > 0 {
            self.0.slot_free.notified().await;
        }
    }

    /// Whether the connection has ended.
    pub fn is_gone(&self) -> bool {
        *self.0.gone.borrow()
    }

    /// Waits until the connection has ended.
    pub async fn gone(&self) {
        // The sender lives in self, so this only ends by the value.
        drop(self.0.gone.subscribe().wait_for(|gone| *gone).await);
    }

    /// Registers a stream that we are about to open.
    ///
    /// # Errors
    /// Too many are open, or the connection ended before the peer said hello.
    pub async fn open(&self) -> Result<Flow, StreamError> {
        let slot = self.slot()?;
        let peer = self.peer().await?;
        let mut table = self.table();
        let mut id = table.next_id;
        while table.streams.contains_key(&id) {
            id = next_id(id, self.0.side);
        }
        table.next_id = next_id(id, self.0.side);
        Ok(self.register(table, slot, id, peer))
    }

    /// Registers a stream that the peer asks for.
    ///
    /// # Errors
    /// Too many are open, or the id is not one it may use.
    pub async fn accept(&self, id: u32) -> Result<Flow, StreamError> {
        let slot = self.slot()?;
        let peer = self.peer().await?;
        let table = self.table();
        if matches!(peer, PeerFlow::Credits(_)) {
            let odd = id % 2 == 1;
            if id == 0 || odd != (self.0.side == Side::Agent) || table.streams.contains_key(&id) {
                return Err(StreamError::BadId(id));
            }
        }
        Ok(self.register(table, slot, id, peer))
    }

    /// Room for one stream. Taken before the peer has said hello: a peer that never does can't pile up opens.
    fn slot(&self) -> Result<Slot, StreamError> {
        let mut table = self.table();
        if table.slots >= self.0.limits.streams {
            return Err(StreamError::TooMany);
        }
        table.slots += 1;
        Ok(Slot(self.clone()))
    }

    fn register(&self, mut table: MutexGuard<'_, Table>, slot: Slot, id: u32, peer: PeerFlow) -> Flow {
        let credit = match peer {
            PeerFlow::WindowOnly => None,
            PeerFlow::Credits(initial) => {
                let send =
                    Arc::new(SendState { available: AtomicI64::new(initial.into()), more: Notify::new() });
                table.streams.insert(id, send.clone());
                Some(StreamCredit::new(send, initial, self.0.limits.initial))
            }
        };
        Flow { id, slot, credit, window_only_held: AtomicU32::new(0) }
    }

    /// The peer has granted more; for streams that are gone it means nothing.
    pub fn granted(&self, credit: Credit) {
        let send = self.table().streams.get(&credit.stream).cloned();
        if let Some(send) = send {
            let before = send.available.fetch_add(credit.bytes.into(), Relaxed);
            if before > GRANT_MAX {
                send.available.store(GRANT_MAX, Relaxed);
            }
            send.more.notify_one();
        }
    }

    /// Waits for credit to give back, coalesced by stream.
    pub async fn grants(&self) -> Vec<Credit> {
        loop {
            let grants = std::mem::take(&mut self.table().grants);
            if !grants.is_empty() {
                return grants.into_iter().map(|(stream, bytes)| Credit { stream, bytes }).collect();
            }
            self.0.grants_waiting.notified().await;
        }
    }

    /// How many streams are open, or wait for the peer's hello.
    pub fn open_streams(&self) -> usize {
        self.table().slots
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ids go up in steps of two and start over before they leave u32; 0 is nobody's.
fn next_id(id: u32, side: Side) -> u32 {
    id.checked_add(2).unwrap_or(if side == Side::Adaptor { 1 } else { 2 })
}

/// The room that one stream takes up on its connection.
#[derive(Debug)]
struct Slot(Credits);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.table().slots -= 1;
        self.0.0.slot_free.notify_one();
    }
}

/// The flow control of one stream; gives everything back when it is dropped.
#[derive(Debug)]
pub struct Flow {
    id: u32,
    slot: Slot,
    credit: Option<StreamCredit>,
    /// What a stream without credits holds, in bytes; changed only with the table locked.
    window_only_held: AtomicU32,
}

#[derive(Debug)]
struct StreamCredit {
    send: Arc<SendState>,
    /// A sender that has run dry waits for this much.
    high_water: i64,
    /// What the peer may still send us.
    outstanding: AtomicI64,
    /// What the peer may have on its way to us at a time; never contended, and locked for no await.
    window: Mutex<Window>,
}

impl StreamCredit {
    fn new(send: Arc<SendState>, theirs: u32, ours: u32) -> Self {
        Self {
            send,
            // Nobody waits for ever: once the peer's socket has taken all we sent, the peer withholds less than half
            // of the window (a batch), the window never shrinks below `theirs`, so more than this has come back.
            high_water: i64::from(theirs / 2).clamp(MESSAGE_COST_MIN.into(), MESSAGE_MAX as i64),
            outstanding: AtomicI64::new(ours.into()),
            window: Mutex::new(Window::new(ours)),
        }
    }

    fn window(&self) -> MutexGuard<'_, Window> {
        self.window.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a message of `len` bytes costs.
pub fn cost(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX).max(MESSAGE_COST_MIN)
}

impl Flow {
    /// The stream id: the originator port of its channel open.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Whether the stream has credits.
    pub fn has_credit(&self) -> bool {
        self.credit.is_some()
    }

    /// Waits until more may be taken from a stream without credits: it may hold what one with credits is granted to begin
    /// with, and beyond that what is left of the pool that those grow from. A peer that says no hello must not cost more
    /// than one that does; and a two-way stream needs room, for a connection that is held up takes what we send no more.
    pub(crate) async fn window_only_room(&self) {
        let shared = &self.slot.0.0;
        loop {
            let room = shared.window_only_room.notified();
            tokio::pin!(room);
            room.as_mut().enable();
            let pool_used = self.slot.0.table().pool_used;
            if self.window_only_held.load(Relaxed) < shared.limits.initial
                || pool_used < shared.limits.growth_pool
            {
                return;
            }
            room.await;
        }
    }

    /// A stream without credits holds this much now.
    fn hold_window_only(&self, change: impl Fn(u32) -> u32) {
        let initial = self.slot.0.0.limits.initial;
        let mut table = self.slot.0.table();
        let before = self.window_only_held.load(Relaxed);
        let after = change(before);
        self.window_only_held.store(after, Relaxed);
        table.pool_used =
            (table.pool_used + after.saturating_sub(initial)).saturating_sub(before.saturating_sub(initial));
        drop(table);
        if after < before {
            self.slot.0.0.window_only_room.notify_waiters();
        }
    }

    /// Waits until something may be sent; how much, at most [`MESSAGE_MAX`] bytes. One task only may wait.
    pub async fn ready(&self) -> usize {
        let Some(credit) = &self.credit else { return MESSAGE_MAX };
        let mut available = credit.send.available.load(Relaxed);
        if available < LOW_WATER.min(credit.high_water) {
            while available < credit.high_water {
                credit.send.more.notified().await;
                available = credit.send.available.load(Relaxed);
            }
        }
        usize::try_from(available).unwrap_or(0).min(MESSAGE_MAX)
    }

    /// A message of `len` bytes is about to be sent.
    pub fn spend(&self, len: usize) {
        if let Some(credit) = &self.credit {
            credit.send.available.fetch_sub(cost(len).into(), Relaxed);
        }
    }

    /// A message of `len` bytes has arrived; what it cost the peer.
    ///
    /// # Errors
    /// The peer had no credit for it, one message of slack aside: then the connection is ended too.
    pub fn arrived(&self, len: usize) -> Result<u32, Overrun> {
        let cost = cost(len);
        let Some(credit) = &self.credit else {
            self.hold_window_only(|held| held.saturating_add(cost));
            return Ok(cost);
        };
        let left = credit.outstanding.fetch_sub(cost.into(), Relaxed) - i64::from(cost);
        if left < -(MESSAGE_MAX as i64) {
            self.slot.0.end();
            return Err(Overrun(self.id));
        }
        Ok(cost)
    }

    /// The socket has taken messages that cost this much.
    pub fn consumed(&self, cost: u32) {
        let Some(credit) = &self.credit else {
            return self.hold_window_only(|held| held.saturating_sub(cost));
        };
        let mut window = credit.window();
        if !window.consumed(cost) {
            return;
        }
        let mut table = self.slot.0.table();
        let limits = &self.slot.0.0.limits;
        let before = window.grown(limits);
        let grant = window.batch(limits, limits.growth_pool - table.pool_used, table.round_trip);
        table.pool_used = table.pool_used - before + window.grown(limits);
        credit.outstanding.fetch_add(grant.into(), Relaxed);
        if grant > 0 {
            *table.grants.entry(self.id).or_default() += grant;
        }
        drop(table);
        self.slot.0.0.grants_waiting.notify_one();
    }

    /// Waits until the connection has ended.
    pub async fn gone(&self) {
        self.slot.0.gone().await;
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        let Some(credit) = &self.credit else { return self.hold_window_only(|_| 0) };
        let mut table = self.slot.0.table();
        table.streams.remove(&self.id);
        table.grants.remove(&self.id);
        table.pool_used -= credit.window().grown(&self.slot.0.0.limits);
    }
}
