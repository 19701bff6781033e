//! Flow control by credits: limits the bytes that a peer may have in flight to us on each stream.
//!
//! The SSH library reopens its window as soon as a message has arrived, not when it has been consumed (D1 in
//! docs/PROTOCOL.md, section 12), so the SSH window bounds nothing. Credits do. A sender spends credit with each
//! message, and receives it back over the control channel once the receiver's socket has taken the bytes. A message
//! costs its length, at least [`MESSAGE_COST_MIN`]. A peer that does not use credits gets channels with SSH windows
//! only.
//!
//! [`Credits`] is the flow control of a connection, [`Flow`] that of one stream. [`Credit`] is the control message
//! that gives credit back.
//!
//! Locks: the table of a connection and the window of a stream are both locked by [`Flow::consumed`] (window, then
//! table) and by the drop of a [`Flow`] (table, then window). The opposite orders can't deadlock: a window belongs to
//! one flow, and while that flow is dropped no other borrow of it exists.

use std::collections::HashMap;
use std::sync::atomic::{AtomicI64, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use secure_comms_protocol::control::Credit;
use secure_comms_protocol::limits::{CreditLimits, MESSAGE_COST_MIN, MESSAGE_MAX};
use secure_comms_protocol::{RefusalReason, TunnelName};
use tokio::sync::{Notify, watch};

use crate::account::Account;

use self::places::Places;
use self::window::Window;

mod places;
mod window;

/// Low watermark of a sender, in bytes of credit: below it the sender waits for its high watermark, so that it does not
/// send many small messages.
const LOW_WATER: i64 = 4096;
/// Most credit that a stream keeps, in bytes. No honest peer grants this much.
const GRANT_MAX: i64 = 1 << 30;

/// Flow control that the peer of a connection uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerFlow {
    /// Credits; with the initial credit of each stream, in bytes.
    Credits(u32),
    /// SSH windows only (stock OpenSSH).
    WindowOnly,
}

/// The end of the connection that we are. It decides which stream ids we use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The adaptor: odd stream ids.
    Adaptor,
    /// The agent: even stream ids.
    Agent,
}

/// Why a stream can't be registered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// The connection has as many streams as it may have.
    #[error("{}", RefusalReason::TooManyStreams)]
    TooMany,
    /// The peer used a stream id that is in use, or that belongs to our range.
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

/// The peer sent more than its credit on this stream. The connection must end: nothing makes such a peer stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the peer overran the credit of stream {0}")]
pub struct Overrun(pub u32);

/// The flow control of one connection.
#[derive(Clone, Debug)]
pub struct Credits(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    limits: CreditLimits,
    account: Account,
    side: Side,
    peer: watch::Sender<Option<PeerFlow>>,
    gone: watch::Sender<bool>,
    table: Mutex<Table>,
    slot_free: Notify,
    window_only_room: Notify,
}

/// Number of a connection of a session; unique in the session. Without a session, all streams are on
/// [`LaneNumber::ALONE`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LaneNumber(pub(crate) u64);

impl LaneNumber {
    /// The connection of streams without a session; in a session, none.
    pub const ALONE: Self = Self(0);
}

/// Credit to give back on one connection.
#[derive(Debug, Default)]
struct Due {
    /// In bytes, by stream id.
    grants: HashMap<u32, u32>,
    waiting: Arc<Notify>,
}

#[derive(Debug, Default)]
struct Table {
    /// Streams with credits, by stream id.
    streams: HashMap<u32, Arc<SendState>>,
    next_id: u32,
    /// Places of the streams, with those that wait for the peer's hello.
    places: Places,
    /// Credit to give back, by the connection that carries the streams.
    due: HashMap<LaneNumber, Due>,
    /// Bytes of the growth pool that windows have taken.
    pool_used: u32,
    /// Shortest round trip seen; longer ones include time in our own queues.
    round_trip: Option<Duration>,
}

/// Credit of a stream, in bytes.
#[derive(Debug)]
struct SendState {
    /// What we may spend.
    available: AtomicI64,
    /// All that the peer has ever granted; counted in a session only.
    granted: AtomicU64,
    more: Notify,
    /// All that we have ever granted.
    given: AtomicU64,
    /// The connection that carries the stream.
    lane: AtomicU64,
}

impl SendState {
    fn add(&self, bytes: i64) {
        let before = self.available.fetch_add(bytes.min(GRANT_MAX), Relaxed);
        if before > GRANT_MAX {
            self.available.store(GRANT_MAX, Relaxed);
        }
        self.more.notify_one();
    }
}

impl Credits {
    /// Makes the flow control of a new connection, or of a new session.
    pub fn new(side: Side, limits: CreditLimits) -> Self {
        Self::charged_to(Account::unlimited(), side, limits)
    }

    /// As [`Credits::new`]. The growth of the windows is taken from the account, and what the streams move is counted there.
    pub fn charged_to(account: Account, side: Side, limits: CreditLimits) -> Self {
        let next_id = if side == Side::Adaptor { 1 } else { 2 };
        let due = HashMap::from([(LaneNumber::ALONE, Due::default())]);
        let table = Table { next_id, due, ..Table::default() };
        Self(Arc::new(Shared {
            limits,
            account,
            side,
            peer: watch::Sender::new(None),
            gone: watch::Sender::new(false),
            table: Mutex::new(table),
            slot_free: Notify::new(),
            window_only_room: Notify::new(),
        }))
    }

    /// Credit that we grant each new stream, in bytes: the `credit` of our hello.
    pub fn initial(&self) -> u32 {
        self.0.limits.initial
    }

    /// Sets the flow control that the peer uses: that of its hello, or [`PeerFlow::WindowOnly`] if it will send none.
    /// Streams wait for it. Only the first call has an effect.
    pub fn set_peer_mode(&self, peer: PeerFlow) {
        self.0.peer.send_if_modified(|current| {
            let first = current.is_none();
            current.get_or_insert(peer);
            first
        });
    }

    /// Whether the peer's flow control is known, and is this.
    pub fn peer_mode_is(&self, peer: PeerFlow) -> bool {
        *self.0.peer.borrow() == Some(peer)
    }

    /// Whether the peer's flow control is known.
    pub fn knows_peer_mode(&self) -> bool {
        self.0.peer.borrow().is_some()
    }

    /// Waits until the peer's flow control is known. Cancellation safe.
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

    /// Records the time from a ping to its pong.
    pub fn round_trip(&self, took: Duration) {
        let mut table = self.table();
        table.round_trip = Some(table.round_trip.map_or(took, |shortest| shortest.min(took)));
    }

    /// Shortest round trip recorded; none before the first.
    pub fn shortest_round_trip(&self) -> Option<Duration> {
        self.table().round_trip
    }

    /// Ends the connection for its streams: waits for credit or for room end.
    pub fn end(&self) {
        self.0.gone.send_replace(true);
    }

    /// Waits until no stream is open. Only one task may wait. Cancellation safe.
    pub async fn idle(&self) {
        while self.open_streams() > 0 {
            self.0.slot_free.notified().await;
        }
    }

    /// Whether the connection has ended.
    pub fn is_gone(&self) -> bool {
        *self.0.gone.borrow()
    }

    /// Waits until the connection has ended. Cancellation safe.
    pub async fn gone(&self) {
        // The sender lives in self, so the wait ends only with the value.
        drop(self.0.gone.subscribe().wait_for(|gone| *gone).await);
    }

    /// Registers a stream of `tunnel` that we are about to open, and gives it a stream id. Waits for the peer's flow
    /// control; cancellation safe.
    ///
    /// # Errors
    /// Too many streams are open, or the connection ended before the peer's flow control was known.
    pub async fn open(&self, tunnel: &TunnelName) -> Result<Flow, StreamError> {
        let slot = self.slot(self.0.side, tunnel)?;
        let peer = self.peer().await?;
        let mut table = self.table();
        let mut id = table.next_id;
        while table.streams.contains_key(&id) {
            id = next_id(id, self.0.side);
        }
        table.next_id = next_id(id, self.0.side);
        Ok(self.register(table, slot, id, peer))
    }

    /// Takes the place of a stream of `tunnel` that the peer asks to open, at once; [`Credits::accept`] registers it.
    ///
    /// # Errors
    /// Too many streams are open.
    pub fn admit(&self, tunnel: &TunnelName) -> Result<Slot, StreamError> {
        let peer = if self.0.side == Side::Adaptor { Side::Agent } else { Side::Adaptor };
        self.slot(peer, tunnel)
    }

    /// Registers a stream that the peer opens with this stream id, at its place. Waits for the peer's flow control;
    /// cancellation safe.
    ///
    /// # Errors
    /// The peer may not use the id, or the connection ended.
    pub async fn accept(&self, slot: Slot, id: u32) -> Result<Flow, StreamError> {
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

    /// Takes the place of one stream. It is taken before the peer's hello, so that a peer without a hello can't pile up
    /// opens.
    fn slot(&self, opener: Side, tunnel: &TunnelName) -> Result<Slot, StreamError> {
        if self.table().places.take(&self.0.limits, opener, tunnel) {
            Ok(Slot { credits: self.clone(), opener, tunnel: tunnel.clone() })
        } else {
            Err(StreamError::TooMany)
        }
    }

    fn register(&self, mut table: MutexGuard<'_, Table>, slot: Slot, id: u32, peer: PeerFlow) -> Flow {
        let credit = match peer {
            PeerFlow::WindowOnly => None,
            PeerFlow::Credits(initial) => {
                let send = Arc::new(SendState {
                    available: AtomicI64::new(initial.into()),
                    granted: AtomicU64::new(initial.into()),
                    more: Notify::new(),
                    given: AtomicU64::new(self.0.limits.initial.into()),
                    lane: AtomicU64::new(LaneNumber::ALONE.0),
                });
                table.streams.insert(id, send.clone());
                Some(StreamCredit::new(send, initial, self.0.limits.initial))
            }
        };
        Flow { id, slot, credit, window_only_held: AtomicU32::new(0) }
    }

    /// Adds credit that the peer gave back. Credit for a stream that is gone is ignored.
    pub fn granted(&self, credit: Credit) {
        let send = self.table().streams.get(&credit.stream).cloned();
        if let Some(send) = send {
            send.add(credit.bytes.into());
        }
    }

    /// Takes note of all the credit that the peer has ever granted a stream, in bytes. A smaller number than before comes
    /// late, and has no effect.
    pub(crate) fn granted_in_all(&self, stream: u32, bytes: u64) {
        let send = self.table().streams.get(&stream).cloned();
        if let Some(send) = send {
            let before = send.granted.fetch_max(bytes, Relaxed);
            send.add(i64::try_from(bytes.saturating_sub(before)).unwrap_or(i64::MAX));
        }
    }

    /// All the credit that we have ever granted a stream, in bytes.
    pub(crate) fn given(&self, stream: u32) -> u64 {
        self.table().streams.get(&stream).map_or(0, |send| send.given.load(Relaxed))
    }

    /// Adds a connection that may carry streams of the session.
    pub(crate) fn add_lane(&self, lane: LaneNumber) {
        self.table().due.insert(lane, Due::default());
    }

    /// Removes a connection; credit that was to be given back on it is not.
    pub(crate) fn remove_lane(&self, lane: LaneNumber) {
        self.table().due.remove(&lane);
    }

    /// Gives credit of this stream back on this connection from now on, also what we have granted beyond `said` while no
    /// connection carried it: the other end may wait for just that.
    pub(crate) fn carry(&self, stream: u32, lane: LaneNumber, said: u64) {
        let mut table = self.table();
        let Some(send) = table.streams.get(&stream).cloned() else { return };
        send.lane.store(lane.0, Relaxed);
        if send.given.load(Relaxed) > said.max(self.0.limits.initial.into())
            && let Some(due) = table.due.get_mut(&lane)
        {
            // How much is said in the position.
            due.grants.entry(stream).or_default();
            due.waiting.notify_one();
        }
    }

    /// Waits for credit to give back on this connection, and takes it: one entry for each stream. Only one task may wait for a
    /// connection. Cancellation safe. Never returns once the connection is removed.
    pub async fn grants(&self, lane: LaneNumber) -> Vec<Credit> {
        loop {
            let waiting = {
                let mut table = self.table();
                let Some(due) = table.due.get_mut(&lane) else { break };
                if !due.grants.is_empty() {
                    return std::mem::take(&mut due.grants)
                        .into_iter()
                        .map(|(stream, bytes)| Credit { stream, bytes })
                        .collect();
                }
                due.waiting.clone()
            };
            waiting.notified().await;
        }
        std::future::pending().await
    }

    /// Number of streams that are open or wait for the peer's flow control.
    pub fn open_streams(&self) -> usize {
        self.table().places.taken()
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Next stream id: ids go up in steps of two, and restart before they exceed u32. No stream has id 0.
fn next_id(id: u32, side: Side) -> u32 {
    id.checked_add(2).unwrap_or(if side == Side::Adaptor { 1 } else { 2 })
}

/// Place of one stream among those of its connection, given back on drop.
#[derive(Debug)]
pub struct Slot {
    credits: Credits,
    opener: Side,
    tunnel: TunnelName,
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.credits.table().places.give_back(self.opener, &self.tunnel);
        self.credits.0.slot_free.notify_one();
    }
}

/// Flow control of one stream. Dropping it gives its place and its window back to the connection.
#[derive(Debug)]
pub struct Flow {
    id: u32,
    slot: Slot,
    credit: Option<StreamCredit>,
    /// Bytes that a stream without credits holds; changed only with the table locked.
    window_only_held: AtomicU32,
}

#[derive(Debug)]
struct StreamCredit {
    send: Arc<SendState>,
    /// High watermark of the sender, in bytes: a sender below [`LOW_WATER`] waits for this much credit.
    high_water: i64,
    /// Credit that the peer may still spend, in bytes.
    outstanding: AtomicI64,
    /// Bytes that the peer may have in flight to us. Never contended, and not locked across an await.
    window: Mutex<Window>,
}

impl StreamCredit {
    fn new(send: Arc<SendState>, theirs: u32, ours: u32) -> Self {
        Self {
            send,
            // The wait always ends. Once the peer's socket has taken all we sent, the peer withholds less than one
            // batch (half of the window). The window never shrinks below `theirs`, so more than this has come back.
            high_water: i64::from(theirs / 2).clamp(MESSAGE_COST_MIN.into(), MESSAGE_MAX as i64),
            outstanding: AtomicI64::new(ours.into()),
            window: Mutex::new(Window::new(ours)),
        }
    }

    fn window(&self) -> MutexGuard<'_, Window> {
        self.window.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Cost of a message of `len` bytes, in bytes of credit.
pub fn cost(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX).max(MESSAGE_COST_MIN)
}

impl Flow {
    /// The stream id: the originator port of its channel open.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Whether the stream has credits.
    pub(crate) fn has_credit(&self) -> bool {
        self.credit.is_some()
    }

    /// Waits until a stream without credits may take another message. It may hold as much as the initial credit of a
    /// stream with credits, and beyond that the rest of the growth pool. So a peer without a hello costs no more than
    /// one with a hello. A two-way stream needs this room: a connection that is held up does not take our bytes either.
    pub(crate) async fn window_only_room(&self) {
        let shared = &self.slot.credits.0;
        loop {
            let room = shared.window_only_room.notified();
            tokio::pin!(room);
            room.as_mut().enable();
            let pool_used = self.slot.credits.table().pool_used;
            // The last condition waits for this stream's own bytes at worst: it holds some.
            if self.window_only_held.load(Relaxed) < shared.limits.initial
                || (pool_used < shared.limits.growth_pool && !shared.account.is_full())
            {
                return;
            }
            room.await;
        }
    }

    /// Changes the number of bytes that a stream without credits holds.
    fn hold_window_only(&self, change: impl Fn(u32) -> u32) {
        let initial = self.slot.credits.0.limits.initial;
        let mut table = self.slot.credits.table();
        let before = self.window_only_held.load(Relaxed);
        let after = change(before);
        self.window_only_held.store(after, Relaxed);
        let (beyond, beyond_before) = (after.saturating_sub(initial), before.saturating_sub(initial));
        table.pool_used = (table.pool_used + beyond).saturating_sub(beyond_before);
        // A message that has arrived is held, whether there is room for it or not.
        self.slot.credits.0.account.charge(beyond as usize, beyond_before as usize);
        drop(table);
        if after < before {
            self.slot.credits.0.window_only_room.notify_waiters();
        }
    }

    /// Waits until a message may be sent, and returns its largest size: at most [`MESSAGE_MAX`] bytes. Only one task
    /// may wait. Cancellation safe: credit is spent by [`Flow::spend`] only.
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

    /// Spends credit for a message of `len` bytes that is about to be sent.
    pub fn spend(&self, len: usize) {
        if let Some(credit) = &self.credit {
            credit.send.available.fetch_sub(cost(len).into(), Relaxed);
        }
        self.slot.credits.0.account.sent(len);
    }

    /// Counts a message of `len` bytes that has arrived, and returns its cost.
    ///
    /// # Errors
    /// The peer exceeded its credit by more than one message. The connection is ended too.
    pub fn arrived(&self, len: usize) -> Result<u32, Overrun> {
        let cost = cost(len);
        self.slot.credits.0.account.received(len);
        let Some(credit) = &self.credit else {
            self.hold_window_only(|held| held.saturating_add(cost));
            return Ok(cost);
        };
        let left = credit.outstanding.fetch_sub(cost.into(), Relaxed) - i64::from(cost);
        if left < -(MESSAGE_MAX as i64) {
            self.slot.credits.end();
            return Err(Overrun(self.id));
        }
        Ok(cost)
    }

    /// Counts messages of this cost that the socket has taken; gives credit back when a batch is full.
    pub fn consumed(&self, cost: u32) {
        let Some(credit) = &self.credit else {
            return self.hold_window_only(|held| held.saturating_sub(cost));
        };
        let mut window = credit.window();
        if !window.consumed(cost) {
            return;
        }
        let mut table = self.slot.credits.table();
        let limits = &self.slot.credits.0.limits;
        let account = &self.slot.credits.0.account;
        let before = window.grown(limits);
        let grant = if account.is_over() {
            window.shrink(limits)
        } else {
            let wanted = window.growth_max(limits).min(limits.growth_pool - table.pool_used);
            let taken = account.take(wanted as usize);
            // No more than was wanted.
            let grant = window.batch(limits, u32::try_from(taken).unwrap_or(wanted), table.round_trip);
            account.give_back(taken - window.grown(limits).saturating_sub(before) as usize);
            grant
        };
        account.give_back(before.saturating_sub(window.grown(limits)) as usize);
        table.pool_used = table.pool_used - before + window.grown(limits);
        credit.outstanding.fetch_add(grant.into(), Relaxed);
        credit.send.given.fetch_add(grant.into(), Relaxed);
        let lane = LaneNumber(credit.send.lane.load(Relaxed));
        if let Some(due) = table.due.get_mut(&lane)
            && grant > 0
        {
            *due.grants.entry(self.id).or_default() += grant;
            due.waiting.notify_one();
        }
    }

    /// Waits until the connection has ended. Cancellation safe.
    pub async fn gone(&self) {
        self.slot.credits.gone().await;
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        let Some(credit) = &self.credit else { return self.hold_window_only(|_| 0) };
        let mut table = self.slot.credits.table();
        table.streams.remove(&self.id);
        let lane = LaneNumber(credit.send.lane.load(Relaxed));
        if let Some(due) = table.due.get_mut(&lane) {
            due.grants.remove(&self.id);
        }
        let grown = credit.window().grown(&self.slot.credits.0.limits);
        table.pool_used -= grown;
        self.slot.credits.0.account.give_back(grown as usize);
    }
}
