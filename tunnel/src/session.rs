//! Sessions: streams that outlive the connections which carry them (docs/PROTOCOL.md, section 7.1).
//!
//! A [`Session`] has streams, their flow control, and a connection for each lane, of which it knows only [`Channels`]. The
//! relay at each end of a stream holds a [`SessionReceiver`] and a [`SessionSender`]; to it, a connection that ends is
//! silence. [`stream`] is the state of one end of a stream, `entry` what the session keeps of it, `halves` what the relay
//! sees, `open` and `incoming` how a stream gets a channel, at first and on each connection after.
//!
//! Locks: the table of a session and the state of a stream. A thread that has a state does not take the table.

use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use secure_comms_protocol::control::StreamPosition;
use secure_comms_protocol::limits::{CreditLimits, LANE_WAIT, MESSAGE_MAX};
use secure_comms_protocol::{Lane, Opening, SessionId, TunnelName};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, timeout_at};

use self::barrier::Barrier;
use self::entry::Entry;
pub use self::halves::{SessionReceiver, SessionSender};
pub use self::incoming::{IncomingStream, NewStream};
pub use self::open::SessionLink;
use crate::account::Account;
use crate::flow::{Credits, LaneNumber, PeerFlow, Side};
use crate::link::{Incoming, Receiver, Sender};

mod barrier;
mod entry;
mod halves;
mod incoming;
mod open;
pub mod stream;

/// Bytes of a stream that may stay unacknowledged while nothing gives credit back.
const UNSAID_MAX: u64 = 2048;

/// Opens the channels of one connection.
pub trait Channels: Clone + Debug + Send + Sync + 'static {
    /// Receiving half of a channel.
    type Receiver: Receiver + Debug;
    /// Sending half of a channel.
    type Sender: Sender + Debug;
    /// A channel that the other end asks to open.
    type Pending: Incoming<Receiver = Self::Receiver, Sender = Self::Sender>;
    /// Opens the channel of a stream. The future runs to its end, even if the stream is not wanted any more.
    fn open_channel(
        &self,
        name: &TunnelName,
        id: u32,
        opening: Opening,
    ) -> impl Future<Output = Result<(Self::Receiver, Self::Sender), ChannelError>> + Send + 'static;
    /// Whether the connection has ended.
    fn is_gone(&self) -> bool;
    /// Waits until the connection has ended. Cancellation safe.
    fn gone(&self) -> impl Future<Output = ()> + Send;
}

/// Why a channel was not opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChannelError {
    /// The other end refused it; with its reason.
    Refused(String),
    /// The other end has no place for another stream.
    Full,
    /// The connection has ended.
    Gone,
}

/// A connection of a session.
#[derive(Debug)]
pub(crate) struct Connection<C> {
    number: LaneNumber,
    lane: Lane,
    channels: C,
    /// The connections of other lanes that there were when it was made.
    others: Arc<[LaneNumber]>,
    barrier: Arc<Barrier>,
}

impl<C: Clone> Clone for Connection<C> {
    fn clone(&self) -> Self {
        let (others, barrier) = (self.others.clone(), self.barrier.clone());
        Self { channels: self.channels.clone(), others, barrier, ..*self }
    }
}

/// The streams that one adaptor and one agent share. Clones refer to the same session.
#[derive(Debug)]
pub struct Session<C: Channels>(Arc<Shared<C>>);

impl<C: Channels> Clone for Session<C> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

#[derive(Debug)]
struct Shared<C: Channels> {
    id: SessionId,
    side: Side,
    credits: Credits,
    limits: CreditLimits,
    /// Credit that the peer grants each new stream, in bytes.
    peer_credit: u32,
    table: Mutex<Table<C>>,
    /// Changes with the lanes.
    lanes: watch::Sender<u64>,
    wanted: watch::Sender<Option<Lane>>,
    reason: OnceLock<String>,
    /// Cost of all messages that are kept, in bytes.
    kept: AtomicU64,
}

#[derive(Debug)]
struct Table<C: Channels> {
    streams: HashMap<u32, Arc<Entry<C>>>,
    lanes: HashMap<Lane, Connection<C>>,
    last_number: LaneNumber,
}

impl<C: Channels> Table<C> {
    /// The connections of the lanes, without those that have ended.
    fn living(&self) -> impl Iterator<Item = &Connection<C>> {
        self.lanes.values().filter(|connection| !connection.channels.is_gone())
    }

    /// The connection of a lane, if it has one.
    fn living_on(&self, lane: Lane) -> Option<&Connection<C>> {
        self.living().find(|connection| connection.lane == lane)
    }
}

impl<C: Channels> Session<C> {
    /// A session without connections. `peer_credit` is what the peer's hello grants each stream, in bytes.
    pub fn new(side: Side, limits: CreditLimits, id: SessionId, peer_credit: u32) -> Self {
        Self::charged_to(Account::unlimited(), side, limits, id, peer_credit)
    }

    /// As [`Session::new`], with the account of [`Credits::charged_to`].
    pub fn charged_to(
        account: Account,
        side: Side,
        limits: CreditLimits,
        id: SessionId,
        peer_credit: u32,
    ) -> Self {
        let credits = Credits::charged_to(account, side, limits);
        credits.set_peer_mode(PeerFlow::Credits(peer_credit));
        let table = Table { streams: HashMap::new(), lanes: HashMap::new(), last_number: LaneNumber::ALONE };
        Self(Arc::new(Shared {
            id,
            side,
            credits,
            limits,
            peer_credit,
            table: Mutex::new(table),
            lanes: watch::Sender::new(0),
            wanted: watch::Sender::new(None),
            reason: OnceLock::new(),
            kept: AtomicU64::new(0),
        }))
    }

    /// The id.
    pub fn id(&self) -> &SessionId {
        &self.0.id
    }

    /// Flow control of the streams, of all lanes together. It ends with the session.
    pub fn credits(&self) -> &Credits {
        &self.0.credits
    }

    /// Opens streams in the session.
    pub fn link(&self) -> SessionLink<C> {
        SessionLink::new(self.clone())
    }

    /// Makes a connection the one of its lane. It carries new streams at once, older ones from [`Session::resume`] on. The
    /// connection that had the lane is the caller's to cut: until then, its streams can't go on.
    pub fn connect(&self, lane: Lane, channels: C) -> LaneNumber {
        let mut table = self.table();
        table.last_number.0 += 1;
        let number = table.last_number;
        self.0.credits.add_lane(number);
        let others = table.living().filter(|other| other.lane != lane).map(|other| other.number).collect();
        let barrier = Arc::default();
        table.lanes.insert(lane, Connection { number, lane, channels: channels.clone(), others, barrier });
        drop(table);
        self.0.lanes.send_modify(|version| *version += 1);
        let session = self.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = channels.gone() => {}
                () = session.0.credits.gone() => {}
            }
            session.disconnect(number);
        });
        number
    }

    /// Takes a connection away that has ended or is to end. Happens by itself once [`Channels::gone`].
    pub fn disconnect(&self, number: LaneNumber) {
        self.0.credits.remove_lane(number);
        let ended = {
            let mut table = self.table();
            let ended = table.lanes.values().find(|connection| connection.number == number);
            let lane = ended.map(|connection| connection.lane);
            lane.and_then(|lane| table.lanes.remove(&lane))
        };
        self.0.lanes.send_modify(|version| *version += 1);
        // The adaptor may have no stream that needs the lane, and would not connect it: streams that it has not heard of would
        // wait in vain.
        if let Some(Connection { lane, .. }) = ended
            && self.0.side == Side::Agent
            && self.stranded().iter().any(|entry| entry.state().is_on(number))
        {
            self.0.wanted.send_replace(Some(lane));
        }
    }

    /// Whether a lane has a connection.
    pub fn has_lane(&self, lane: Lane) -> bool {
        self.living(lane).is_some()
    }

    /// Waits until no lane has a connection. Cancellation safe.
    pub async fn without_lanes(&self) {
        let mut lanes = self.0.lanes.subscribe();
        while Lane::ALL.into_iter().any(|lane| self.has_lane(lane)) {
            if lanes.changed().await.is_err() {
                return;
            }
        }
    }

    /// Waits until a stream waits for a lane without a connection. Only one task may wait. Cancellation safe.
    pub async fn lane_wanted(&self) -> Lane {
        let mut wanted = self.0.wanted.subscribe();
        let lane = wanted.wait_for(Option::is_some).await.ok().and_then(|lane| *lane);
        match lane {
            Some(lane) => {
                self.0.wanted.send_replace(None);
                lane
            }
            // The sender lives in self.
            None => std::future::pending().await,
        }
    }

    /// Number of streams that have no channel now.
    pub fn waiting_streams(&self) -> usize {
        let streams: Vec<_> = self.table().streams.values().cloned().collect();
        streams.iter().filter(|entry| !entry.is_attached()).count()
    }

    /// Number of streams of tunnels of this lane.
    pub fn streams_of(&self, lane: Lane) -> usize {
        self.table().streams.values().filter(|entry| Lane::of(entry.name()) == lane).count()
    }

    /// The connection that carries a stream, or did so last; none for a stream that is not known, or has had none.
    pub fn carrier(&self, id: u32) -> Option<LaneNumber> {
        let entry = self.entry(id)?;
        entry.state().connection.as_ref().map(|connection| connection.number)
    }

    /// Ends the session: its streams are reset. Its connections are the caller's to end. Only the first reason is kept.
    pub fn end(&self, reason: &str) {
        self.0.reason.get_or_init(|| reason.to_owned());
        self.0.credits.end();
    }

    /// Waits until the session has ended, and returns why. Cancellation safe.
    pub async fn ended(&self) -> String {
        self.0.credits.gone().await;
        self.end_reason().unwrap_or_default()
    }

    /// Why the session has ended; none while it lives.
    pub fn end_reason(&self) -> Option<String> {
        let overrun = || "the peer sent more than it was granted".to_owned();
        self.0.credits.is_gone().then(|| self.0.reason.get_or_init(overrun).clone())
    }

    /// Takes a position that the peer has said. A stream that is gone is ignored: the position crossed its end.
    ///
    /// # Errors
    /// It can't be so; the session has ended. With the reason.
    pub fn on_position(&self, said: StreamPosition) -> Result<(), String> {
        let Some(entry) = self.entry(said.stream) else { return Ok(()) };
        match entry.acknowledge(said.received) {
            Ok(freed) => {
                self.drop_kept(freed.into());
                self.0.credits.granted_in_all(said.stream, said.granted);
                Ok(())
            }
            Err(lie) => Err(self.end_for(said.stream, &lie)),
        }
    }

    /// Waits for positions to say on a connection: of streams that give credit back. Only one task may wait for a connection.
    /// Cancellation safe. Never returns once the connection is gone.
    pub async fn positions(&self, number: LaneNumber) -> Vec<StreamPosition> {
        let due = self.0.credits.grants(number).await;
        let streams: Vec<_> = {
            let table = self.table();
            due.iter().filter_map(|credit| table.streams.get(&credit.stream).cloned()).collect()
        };
        streams.iter().map(|entry| self.say(entry)).collect()
    }

    /// Positions of the streams on a connection of which much has arrived that was not acknowledged.
    pub fn unsaid_positions(&self, number: LaneNumber) -> Vec<StreamPosition> {
        let streams: Vec<_> = self.table().streams.values().cloned().collect();
        let unsaid = |entry: &&Arc<Entry<C>>| entry.unsaid_on(number) >= UNSAID_MAX;
        streams.iter().filter(unsaid).map(|entry| self.say(entry)).collect()
    }

    /// Makes a connection send a ping whenever `probe` is notified; the closes of its streams need that.
    pub fn probe_with(&self, number: LaneNumber, probe: Arc<Notify>) {
        if let Some(connection) = self.numbered(number) {
            connection.barrier.probe_with(probe);
        }
    }

    /// A ping is about to be sent on a connection.
    pub fn pinged(&self, number: LaneNumber) {
        if let Some(connection) = self.numbered(number) {
            connection.barrier.pinged();
        }
    }

    /// The ping on a connection was answered: what was closed before it is over.
    pub fn ponged(&self, number: LaneNumber) {
        let Some(connection) = self.numbered(number) else { return };
        connection.barrier.ponged();
        let streams: Vec<_> = self.table().streams.values().cloned().collect();
        let mut closing = 0;
        for entry in streams.iter().filter(|entry| entry.is_closing_on(number)) {
            closing += usize::from(!entry.state().is_done());
            entry.notify();
        }
        if closing > 0 {
            connection.barrier.ask();
        }
    }

    fn say(&self, entry: &Entry<C>) -> StreamPosition {
        StreamPosition::new(entry.id(), self.position(entry))
    }

    /// Ends the session because the peer lied about a stream; returns the reason.
    fn end_for(&self, stream: u32, lie: &impl std::fmt::Display) -> String {
        let reason = format!("stream {stream}: what the peer says can't be so: {lie}");
        self.end(&reason);
        reason
    }

    /// Counts what a stream is about to keep for the peer.
    ///
    /// # Errors
    /// The peer has granted more than it may without acknowledging it; the session has ended.
    fn keep(&self, cost: u32) -> Result<(), ()> {
        let kept = self.0.kept.fetch_add(cost.into(), Relaxed) + u64::from(cost);
        // More than `held_max`: what a stream that has ended gave back may be granted to others before we hear of its end.
        if kept <= (self.0.limits.held_max() + self.0.limits.streams * MESSAGE_MAX) as u64 {
            return Ok(());
        }
        self.end("the peer grants more than it acknowledges");
        Err(())
    }

    /// Counts what a stream does not keep any more.
    fn drop_kept(&self, cost: u64) {
        self.0.kept.fetch_sub(cost, Relaxed);
    }

    fn table(&self) -> MutexGuard<'_, Table<C>> {
        self.0.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn entry(&self, id: u32) -> Option<Arc<Entry<C>>> {
        self.table().streams.get(&id).cloned()
    }

    fn forget(&self, entry: &Entry<C>) {
        self.drop_kept(entry.forget());
        self.table().streams.remove(&entry.id());
    }

    /// The connection of a lane, if it has one.
    fn living(&self, lane: Lane) -> Option<Connection<C>> {
        self.table().living_on(lane).cloned()
    }

    /// The connection with this number, if it is the one of a lane.
    fn numbered(&self, number: LaneNumber) -> Option<Connection<C>> {
        self.table().living().find(|connection| connection.number == number).cloned()
    }

    /// The connection for a new stream: waits for its lane for [`LANE_WAIT`], then takes the main one, and waits for either.
    /// Cancellation safe.
    async fn connection_for(&self, entry: &Entry<C>) -> Connection<C> {
        let lane = Lane::of(entry.name());
        let mut lanes = self.0.lanes.subscribe();
        let fall_back = Instant::now() + LANE_WAIT;
        loop {
            let late = Instant::now() >= fall_back;
            let (assigned, has_main) = self.assign(entry, lane, late);
            if let Some(connection) = assigned {
                return connection;
            }
            if has_main {
                self.0.wanted.send_replace(Some(lane));
                drop(timeout_at(fall_back, lanes.changed()).await);
            } else {
                drop(lanes.changed().await);
            }
        }
    }

    /// Waits for a connection for new streams of a lane: its own, or the main one. Cancellation safe.
    async fn has_connection(&self, lane: Lane) {
        let mut lanes = self.0.lanes.subscribe();
        let is_there = || {
            let table = self.table();
            table.living_on(lane).or(table.living_on(Lane::Main)).is_some()
        };
        while !is_there() && lanes.changed().await.is_ok() {}
    }

    /// Assigns a new stream to the connection of its lane, or to the main one if it is `late`; and whether that one is there.
    /// With the table locked: a connection that replaces this one finds the stream on it.
    fn assign(&self, entry: &Entry<C>, lane: Lane, late: bool) -> (Option<Connection<C>>, bool) {
        let table = self.table();
        let main = table.living_on(Lane::Main);
        let assigned = table.living_on(lane).or(main.filter(|_| late)).cloned();
        if let Some(connection) = &assigned {
            entry.state().connection = Some(connection.clone());
        }
        (assigned, main.is_some())
    }

    /// The streams that the adaptor knows, for `streams`. Those that the agent has asked for and that are not confirmed are not
    /// among them: the agent asks again.
    pub fn known(&self) -> Vec<u32> {
        let streams: Vec<_> = self.table().streams.values().cloned().collect();
        streams.iter().filter(|entry| entry.list()).map(|entry| entry.id()).collect()
    }
}
