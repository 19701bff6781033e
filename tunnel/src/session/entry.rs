//! What a session keeps of a stream: its state, and the channel that carries it now.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use secure_comms_protocol::{Opening, Position, TunnelName};
use tokio::sync::Notify;

use super::barrier::Barrier;
use super::stream::{Lie, StreamState, Transmit};
use super::{Channels, Connection, Session};
use crate::flow::LaneNumber;
use crate::link::{Gone, Receiver, Sender};

/// A stream of a session.
#[derive(Debug)]
pub(super) struct Entry<C: Channels> {
    id: u32,
    name: TunnelName,
    state: Mutex<State<C>>,
    /// Wakes all that wait for another state.
    changed: Notify,
}

/// How far a stream is.
#[derive(Debug)]
pub(super) enum Stage<C: Channels> {
    /// We have asked for it, and the other end has not answered.
    Opening,
    /// The other end asks for it, and we have not answered. With the channel that is to be confirmed, if its connection lives.
    Accepting(Option<Asked<C>>),
    /// Both ends know it.
    Open,
}

/// A channel that the other end asks to open for a stream.
pub(super) struct Asked<C: Channels> {
    pub(super) connection: Connection<C>,
    pub(super) opening: Opening,
    pub(super) pending: C::Pending,
}

impl<C: Channels> std::fmt::Debug for Asked<C> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Asked")
    }
}

#[derive(Debug)]
pub(super) struct State<C: Channels> {
    pub(super) stream: StreamState,
    pub(super) stage: Stage<C>,
    /// The connection that carries it, or did so last, or on which it is opened.
    pub(super) connection: Option<Connection<C>>,
    /// The channel's sending half, while the stream has a channel.
    sender: Option<Arc<C::Sender>>,
    /// The channel's receiving half, until the relay takes it.
    receiver: Option<C::Receiver>,
    /// The channel has all that was sent so far, so that more may go to it at once.
    live: bool,
    /// Counts the channels.
    epoch: u64,
    /// Counts the attempts to get a channel; a newer one replaces an older one.
    pub(super) claims: u64,
    /// The connection on which the stream is to be asked for again.
    pub(super) again: Option<Connection<C>>,
    /// The list of streams that the adaptor knows was without this one, which was not confirmed: the agent asks for it again.
    pub(super) unlisted: bool,
    /// Position that was said last.
    said: Position,
    /// The relay has left: what comes for this stream is closed.
    forgotten: bool,
    /// The ping of the connection that was the first after our close; 0 while the channel has no close of ours.
    closed: Arc<AtomicU64>,
}

/// What goes to the channel, outside the lock.
pub(super) struct Pass<C: Channels> {
    transmit: Transmit,
    sender: Arc<C::Sender>,
    channels: C,
    barrier: Arc<Barrier>,
    closed: Arc<AtomicU64>,
}

impl<C: Channels> Pass<C> {
    /// Passes it to the channel.
    ///
    /// # Errors
    /// The connection has ended. The stream has kept it.
    pub(super) async fn run(self) -> Result<(), Gone> {
        let Self { transmit, sender, channels, barrier, closed } = self;
        let sent = async {
            match transmit {
                Transmit::Data(data) => sender.send(data).await,
                Transmit::Eof => sender.eof().await,
                Transmit::Close => {
                    sender.close().await?;
                    closed.store(barrier.next(), Relaxed);
                    Ok(())
                }
            }
        };
        tokio::select! {
            biased;
            sent = sent => sent,
            // A writer may wait for a session that has ended (D4).
            () = channels.gone() => Err(Gone),
        }
    }
}

/// What the receiving half is to do while it has no channel.
pub(super) enum Waiting<R> {
    /// Read this one, the channel of this epoch.
    Channel(R, u64),
    /// The other end has closed the stream.
    Closed,
    /// Wait for a change.
    Nothing,
}

impl<C: Channels> Entry<C> {
    pub(super) fn new(id: u32, name: TunnelName, stage: Stage<C>) -> Self {
        let state = State {
            stream: StreamState::default(),
            stage,
            connection: None,
            sender: None,
            receiver: None,
            live: false,
            epoch: 0,
            claims: 0,
            again: None,
            unlisted: false,
            said: Position::default(),
            forgotten: false,
            closed: Arc::default(),
        };
        Self { id, name, state: Mutex::new(state), changed: Notify::new() }
    }

    pub(super) fn id(&self) -> u32 {
        self.id
    }

    pub(super) fn name(&self) -> &TunnelName {
        &self.name
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State<C>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes all that wait for another state.
    pub(super) fn notify(&self) {
        self.changed.notify_waiters();
    }

    /// Waits until `test` has a result. Cancellation safe.
    pub(super) async fn wait_for<T>(&self, mut test: impl FnMut(&mut State<C>) -> Option<T>) -> T {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if let Some(result) = test(&mut self.state()) {
                return result;
            }
            changed.await;
        }
    }

    pub(super) fn is_attached(&self) -> bool {
        self.state().sender.is_some()
    }

    /// Whether its channel is on this connection and has our close.
    pub(super) fn is_closing_on(&self, number: LaneNumber) -> bool {
        let state = self.state();
        state.is_on(number) && state.closed.load(Relaxed) > 0
    }

    /// Lists the stream among those that the adaptor knows; whether it is.
    pub(super) fn list(&self) -> bool {
        let mut state = self.state();
        state.unlisted = matches!(state.stage, Stage::Accepting(_));
        !state.unlisted
    }

    /// Notes that the stream is asked for on this connection, which is not to be done on another while this one lives. False if
    /// a newer attempt (`claim`) has replaced this one.
    pub(super) fn is_asked_for_on(&self, connection: &Connection<C>, claim: u64) -> bool {
        let mut state = self.state();
        let is_newest = state.claims == claim;
        if is_newest {
            state.connection = Some(connection.clone());
            // The pongs of this connection do not answer a close that another one has carried.
            state.closed = Arc::default();
        }
        is_newest
    }

    pub(super) fn acknowledge(&self, received: u64) -> Result<u32, Lie> {
        self.state().stream.acknowledge(received)
    }

    /// Bytes that have arrived since the position was said last, if the stream is on this connection.
    pub(super) fn unsaid_on(&self, number: LaneNumber) -> u64 {
        let state = self.state();
        let is_there = state.sender.is_some() && state.is_on(number);
        if is_there { state.stream.received() - state.said.received } else { 0 }
    }

    /// Our position, with all the credit that we have `granted`; it counts as said from now on.
    pub(super) fn say(&self, granted: u64) -> Position {
        let mut state = self.state();
        state.said = Position { received: state.stream.received(), granted };
        state.said
    }

    /// The relay has left. Returns the cost of what was kept, in bytes.
    pub(super) fn forget(&self) -> u64 {
        let mut state = self.state();
        let kept = state.stream.kept_cost();
        state.stream.on_close();
        state.stream.close();
        state.forgotten = true;
        state.sender = None;
        state.receiver = None;
        drop(state);
        self.notify();
        kept
    }

    /// The close that the channel is to carry if the relay leaves without one; none if it has it.
    pub(super) fn hang_up(&self) -> Option<Pass<C>> {
        let mut state = self.state();
        state.stream.close();
        while let Some(pass) = state.next_pass() {
            if pass.transmit == Transmit::Close {
                return Some(pass);
            }
        }
        None
    }

    /// The other end does not know the stream any more: it is over.
    pub(super) fn over(&self) -> u32 {
        let freed = self.state().stream.on_close();
        self.notify();
        freed
    }

    /// Runs a change of the stream, and takes what may go to the channel at once.
    pub(super) fn transmit<T>(&self, change: impl FnOnce(&mut StreamState) -> T) -> (T, Option<Pass<C>>) {
        let mut state = self.state();
        let result = change(&mut state.stream);
        let pass = if state.live { state.next_pass() } else { None };
        (result, pass)
    }

    /// The channel of this epoch has ended: what had arrived on it was taken.
    pub(super) fn detach(&self, epoch: u64) {
        let mut state = self.state();
        if state.epoch == epoch {
            state.live = false;
            state.sender = None;
            drop(state);
            self.notify();
        }
    }

    pub(super) fn waiting(state: &mut State<C>) -> Waiting<C::Receiver> {
        match state.receiver.take() {
            Some(receiver) => Waiting::Channel(receiver, state.epoch),
            None if state.stream.is_closed_there() => Waiting::Closed,
            None => Waiting::Nothing,
        }
    }
}

impl<C: Channels> State<C> {
    /// Whether the stream is, or was last, on this connection.
    pub(super) fn is_on(&self, number: LaneNumber) -> bool {
        self.connection.as_ref().is_some_and(|connection| connection.number == number)
    }

    /// Whether the stream can get a channel: it had one, of which all was taken, or none yet.
    pub(super) fn is_detached(&self) -> bool {
        self.sender.is_none()
    }

    /// Whether no channel is of use any more.
    pub(super) fn is_done(&self) -> bool {
        self.forgotten || self.stream.is_closed_there() || self.is_close_there()
    }

    /// Whether our close has arrived at the other end.
    fn is_close_there(&self) -> bool {
        let closed = self.closed.load(Relaxed);
        closed > 0
            && self.connection.as_ref().is_some_and(|connection| connection.barrier.has_answered(closed))
    }

    fn next_pass(&mut self) -> Option<Pass<C>> {
        let (sender, connection) = (self.sender.clone()?, self.connection.as_ref()?);
        let (channels, barrier) = (connection.channels.clone(), connection.barrier.clone());
        let transmit = self.stream.next_transmit()?;
        Some(Pass { transmit, sender, channels, barrier, closed: self.closed.clone() })
    }
}

/// The channel of a stream that has just been opened, and what the other end has received of the stream.
pub(super) struct Opened<C: Channels> {
    pub(super) connection: Connection<C>,
    pub(super) receiver: C::Receiver,
    pub(super) sender: C::Sender,
    pub(super) position: Position,
}

impl<C: Channels> Session<C> {
    /// Gives a stream its channel: what it has kept goes there first. A stream whose relay has left, or that another attempt
    /// (`claim`) has got a channel for, is closed.
    pub(super) fn attach(&self, entry: &Arc<Entry<C>>, claim: u64, opened: Opened<C>) {
        let Opened { connection, receiver, sender, position } = opened;
        let is_current = self.numbered(connection.number).is_some();
        let mut state = entry.state();
        if state.forgotten || state.claims != claim || !state.is_detached() {
            drop(state);
            tokio::spawn(close_late(connection.channels, receiver, sender));
            return;
        }
        let freed = match state.stream.attach(position.received) {
            Ok(freed) => freed,
            Err(lie) => {
                drop(state);
                self.end_for(entry.id, &lie);
                tokio::spawn(close_late(connection.channels, receiver, sender));
                return;
            }
        };
        let number = connection.number;
        state.epoch += 1;
        state.stage = Stage::Open;
        // A connection that was replaced since the list brings no channel that lasts.
        state.unlisted &= !is_current;
        state.sender = Some(Arc::new(sender));
        state.receiver = Some(receiver);
        state.connection = Some(connection);
        state.closed = Arc::default();
        let said = state.said.granted;
        state.live = state.stream.all_passed();
        let (live, epoch) = (state.live, state.epoch);
        drop(state);
        self.drop_kept(freed.into());
        self.0.credits.carry(entry.id, number, said);
        self.0.credits.granted_in_all(entry.id, position.granted);
        if !live {
            tokio::spawn(catch_up(entry.clone(), epoch));
        }
        entry.notify();
    }
}

/// Passes to the channel of this epoch what the stream has kept, until the channel has everything.
async fn catch_up<C: Channels>(entry: Arc<Entry<C>>, epoch: u64) {
    loop {
        let pass = {
            let mut state = entry.state();
            if state.epoch != epoch {
                return;
            }
            match state.next_pass() {
                Some(pass) => pass,
                None => {
                    state.live = state.sender.is_some();
                    return;
                }
            }
        };
        if pass.run().await.is_err() {
            return;
        }
    }
}

/// Closes a channel that no stream needs. The session may wait for us to take messages before it takes our close (D1).
pub(super) async fn close_late<C: Channels>(channels: C, mut receiver: C::Receiver, sender: C::Sender) {
    tokio::select! {
        _ = sender.close() => {}
        () = async { while receiver.recv().await.is_some() {} } => {}
        () = channels.gone() => {}
    }
}
