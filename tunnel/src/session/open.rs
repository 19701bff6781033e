//! Opens streams, and opens their channels again on each new connection.

use std::sync::Arc;

use bytes::Bytes;
use secure_comms_protocol::limits::{CHANNEL_OPEN, INBOUND_WAIT};
use secure_comms_protocol::{Lane, Opening, Position, TunnelName};
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::entry::{Asked, Entry, Opened, Stage, close_late};
use super::halves::halves;
use super::{ChannelError, Channels, Connection, Session, SessionReceiver, SessionSender};
use crate::flow::{Flow, LaneNumber, Side};
use crate::link::{Event, Incoming, Link, OpenError, Receiver, Sender, Stream};

/// Opens streams in a session. While no connection is there, they wait for one.
#[derive(Debug)]
pub struct SessionLink<C: Channels>(Session<C>);

impl<C: Channels> Clone for SessionLink<C> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<C: Channels> SessionLink<C> {
    pub(super) fn new(session: Session<C>) -> Self {
        Self(session)
    }
}

impl<C: Channels> Link for SessionLink<C> {
    type Receiver = SessionReceiver<C>;
    type Sender = SessionSender<C>;

    async fn open(
        &self,
        name: &TunnelName,
    ) -> Result<Stream<SessionReceiver<C>, SessionSender<C>>, OpenError> {
        let session = &self.0;
        let flow = session.credits().open(name).await?;
        let entry = Arc::new(Entry::new(flow.id(), name.clone(), Stage::Opening));
        session.table().streams.insert(entry.id(), entry.clone());
        // From here on, a client that leaves forgets the stream.
        let (receiver, sender) = halves(session, &entry);
        tokio::select! {
            opened = timeout(CHANNEL_OPEN, session.open_stream(&entry, flow)) => match opened {
                Ok(Ok(flow)) => Ok(Stream { receiver, sender, flow }),
                Ok(Err(error)) => Err(error),
                Err(_) => Err(OpenError::Refused(format!("no answer within {} s", CHANNEL_OPEN.as_secs()))),
            },
            () = session.credits().gone() => Err(OpenError::LinkGone),
        }
    }

    async fn ready(&self, name: &TunnelName) {
        tokio::select! {
            () = self.0.has_connection(Lane::of(name)) => {}
            () = self.0.credits().gone() => {}
        }
    }

    fn is_gone(&self) -> bool {
        self.0.credits().is_gone()
    }
}

/// What came of an attempt to open a stream; with its place.
type Answer = (Result<(), ChannelError>, Flow);

impl<C: Channels> Session<C> {
    /// Asks for a new stream, on one connection after the other, until the other end answers.
    async fn open_stream(&self, entry: &Arc<Entry<C>>, mut flow: Flow) -> Result<Flow, OpenError> {
        let Ok(mut connection) = timeout(INBOUND_WAIT, self.connection_for(entry)).await else {
            return Err(OpenError::LinkGone);
        };
        let mut is_new = true;
        loop {
            let (done, answer) = oneshot::channel();
            let ask = Ask { session: self.clone(), entry: entry.clone(), connection, is_new };
            tokio::spawn(ask.run(flow, done));
            let Ok((answer, place)) = answer.await else { return Err(OpenError::LinkGone) };
            flow = place;
            match answer {
                Ok(()) => return Ok(flow),
                Err(ChannelError::Refused(reason)) => return Err(OpenError::Refused(reason)),
                Err(ChannelError::Full) => return Err(OpenError::Full),
                Err(ChannelError::Gone) => {}
            }
            let next = entry.wait_for(|state| match state.stage {
                // The other end has the stream, and has opened its channel.
                Stage::Open => Some(None),
                _ => state.again.take().map(Some),
            });
            match next.await {
                None => return Ok(flow),
                Some(again) => (connection, is_new) = (again, false),
            }
        }
    }

    /// Our position in a stream.
    pub(super) fn position(&self, entry: &Entry<C>) -> Position {
        entry.say(self.credits().given(entry.id()))
    }

    /// Resumes on the connection `on` the streams of lane `of` that have no channel: those that both ends know, and those that
    /// are to be asked for again. The adaptor calls it after `streams`. Returns how many go on.
    ///
    /// Returns early if the connection ends. What was asked for by then goes on if the future is dropped.
    pub async fn resume(&self, of: Lane, on: LaneNumber) -> usize {
        let Some(connection) = self.numbered(on) else { return 0 };
        // Tasks of their own: a channel whose answer is not awaited would be lost, and its stream with it.
        let mut tasks = Vec::new();
        for entry in self.stranded() {
            let mut state = entry.state();
            if state.connection.as_ref().is_none_or(|last| last.lane != of) {
                continue;
            }
            match state.stage {
                Stage::Opening => {
                    state.again = Some(connection.clone());
                    drop(state);
                    entry.notify();
                    tokio::spawn(self.clone().close_if_left(entry, connection.clone()));
                }
                // Confirmed since the list: the agent asks again, and two channels for one stream would end it.
                Stage::Open if state.unlisted => {}
                Stage::Open => {
                    state.claims += 1;
                    let claim = state.claims;
                    drop(state);
                    tasks.push(tokio::spawn(self.clone().resume_stream(entry, claim, connection.clone())));
                }
                Stage::Accepting(_) => {}
            }
        }
        let mut resumed = 0;
        for task in tasks {
            resumed += usize::from(task.await.unwrap_or(false));
        }
        resumed
    }

    /// The streams whose connection is not that of a lane any more.
    pub(super) fn stranded(&self) -> Vec<Arc<Entry<C>>> {
        let (streams, living): (Vec<_>, Vec<_>) = {
            let table = self.table();
            let streams = table.streams.values().cloned().collect();
            (streams, table.living().map(|connection| connection.number).collect())
        };
        let is_stranded = |entry: &Arc<Entry<C>>| {
            let state = entry.state();
            !state.is_done() && !living.iter().any(|number| state.is_on(*number))
        };
        streams.into_iter().filter(is_stranded).collect()
    }

    /// A stream was confirmed. If its connection had been replaced before, it goes on over the newer one.
    fn follow(&self, entry: &Arc<Entry<C>>) {
        let mut state = entry.state();
        let Some(newer) = state.again.take() else { return };
        if !state.is_on(newer.number) {
            state.claims += 1;
            let claim = state.claims;
            drop(state);
            tokio::spawn(self.clone().resume_stream(entry.clone(), claim, newer));
        }
    }

    /// Opens the channel of one stream again; whether it goes on.
    async fn resume_stream(self, entry: Arc<Entry<C>>, claim: u64, connection: Connection<C>) -> bool {
        let drained = entry.wait_for(|state| {
            let over = state.is_done();
            (over || state.claims != claim || state.is_detached()).then_some((state.claims == claim, over))
        });
        let (is_ours, is_over) = tokio::select! {
            drained = drained => drained,
            () = connection.channels.gone() => return false,
            () = self.credits().gone() => return false,
        };
        if is_over && self.0.side == Side::Adaptor {
            // It was listed, and has ended over its old channel since. The agent may not know that.
            let opening = Opening::Resume(self.position(&entry));
            self.close_there(&entry, &connection, opening).await;
        }
        if is_over || !is_ours || !entry.is_asked_for_on(&connection, claim) {
            return false;
        }
        let opening = Opening::Resume(self.position(&entry));
        match self.open_again(&entry, &connection, opening).await {
            Ok(opened) => {
                self.attach(&entry, claim, opened);
                true
            }
            // The answer to an attempt that another has replaced says nothing of the stream.
            Err(ChannelError::Refused(_) | ChannelError::Full) if entry.state().claims == claim => {
                self.drop_kept(entry.over().into());
                false
            }
            Err(ChannelError::Refused(_) | ChannelError::Full | ChannelError::Gone) => false,
        }
    }

    /// Ends a stream at the agent that was listed, and whose client has left before it was asked for again.
    async fn close_if_left(self, entry: Arc<Entry<C>>, connection: Connection<C>) {
        let asked = entry
            .wait_for(|state| (state.again.is_none() || state.is_done()).then_some(state.again.is_none()));
        let is_asked = tokio::select! {
            is_asked = asked => is_asked,
            () = connection.channels.gone() => return,
            () = self.credits().gone() => return,
        };
        if !is_asked {
            let opening = Opening::Again(self.position(&entry));
            self.close_there(&entry, &connection, opening).await;
        }
    }

    /// Opens a channel for a stream that is over here, and closes it.
    async fn close_there(&self, entry: &Entry<C>, connection: &Connection<C>, opening: Opening) {
        let channels = connection.channels.clone();
        let opened = tokio::select! {
            biased;
            opened = channels.open_channel(entry.name(), entry.id(), opening) => opened,
            () = channels.gone() => return,
        };
        // Refused: the agent does not know it either.
        if let Ok((receiver, sender)) = opened {
            close_late(channels, receiver, sender).await;
        }
    }

    /// Opens a channel on which a stream goes on: the other end begins with its position.
    async fn open_again(
        &self,
        entry: &Entry<C>,
        connection: &Connection<C>,
        opening: Opening,
    ) -> Result<Opened<C>, ChannelError> {
        let channels = &connection.channels;
        let opened = async {
            // Without a limit: the other end may still connect to its server.
            let (mut receiver, sender) = channels.open_channel(entry.name(), entry.id(), opening).await?;
            // Long, for over a slow network what other streams have kept may come first.
            let Ok(first) = timeout(CHANNEL_OPEN, receiver.recv()).await else {
                let late = format_args!("it has said no position within {} s", CHANNEL_OPEN.as_secs());
                self.end_for(entry.id(), &late);
                return Err(ChannelError::Gone);
            };
            let Some(Event::Data(first)) = first else { return Err(ChannelError::Gone) };
            let Some(position) = Position::from_bytes(&first) else {
                self.end_for(
                    entry.id(),
                    &format_args!("it began with {} bytes, not its position", first.len()),
                );
                return Err(ChannelError::Gone);
            };
            Ok(Opened { connection: connection.clone(), receiver, sender, position })
        };
        tokio::select! {
            // What has arrived counts, although the connection has ended since: it may be all, up to a close.
            biased;
            opened = opened => opened,
            () = channels.gone() => Err(ChannelError::Gone),
        }
    }

    /// The agent's end of [`Session::resume`]: of its streams without a channel, those that the adaptor does not know are asked
    /// for again on this connection, if they were not confirmed, and are over otherwise.
    pub fn peer_knows(&self, known: &[u32], on: LaneNumber) {
        let Some(connection) = self.numbered(on) else { return };
        let mut known = known.to_vec();
        known.sort_unstable();
        for entry in self.stranded() {
            if known.binary_search(&entry.id()).is_ok() {
                continue;
            }
            let mut state = entry.state();
            match state.stage {
                // One that was never asked for waits for its lane.
                Stage::Opening if state.connection.is_none() => {}
                // Its connection has ended since this one was made, so the list may be older than the stream. The next one of
                // its lane is not.
                _ if connection.others.iter().any(|other| state.is_on(*other)) => {}
                Stage::Opening => {
                    state.again = Some(connection.clone());
                    drop(state);
                    entry.notify();
                }
                Stage::Accepting(_) | Stage::Open => {
                    drop(state);
                    self.drop_kept(entry.over().into());
                }
            }
        }
    }
}

/// One attempt to open a stream.
struct Ask<C: Channels> {
    session: Session<C>,
    entry: Arc<Entry<C>>,
    connection: Connection<C>,
    is_new: bool,
}

impl<C: Channels> Ask<C> {
    /// Runs to the end even if the client has left, for the same reason as in `SshLink`: a session that receives the answer to
    /// a dropped open may end, or leak the channel. The stream keeps its place until then.
    async fn run(self, flow: Flow, done: oneshot::Sender<Answer>) {
        let Self { session, entry, connection, is_new } = self;
        let claim = {
            let mut state = entry.state();
            state.connection = Some(connection.clone());
            state.claims += 1;
            state.claims
        };
        let answer = if is_new {
            session.open_new(&entry, &connection).await
        } else {
            let opening = Opening::Again(session.position(&entry));
            session.open_again(&entry, &connection, opening).await
        };
        let answer = answer.map(|opened| session.attach(&entry, claim, opened));
        match answer {
            Ok(()) => session.follow(&entry),
            // Nothing is left to ask for, on no connection.
            Err(ChannelError::Refused(_) | ChannelError::Full) => entry.state().again = None,
            Err(ChannelError::Gone) => {}
        }
        // The client may have left: then the stream is forgotten, and its channel was closed.
        drop(done.send((answer, flow)));
    }
}

impl<C: Channels> Session<C> {
    async fn open_new(
        &self,
        entry: &Entry<C>,
        connection: &Connection<C>,
    ) -> Result<Opened<C>, ChannelError> {
        let channels = &connection.channels;
        let (receiver, sender) = tokio::select! {
            // A confirmation that has arrived counts: another open would be another stream.
            biased;
            opened = channels.open_channel(entry.name(), entry.id(), Opening::New) => opened?,
            () = channels.gone() => return Err(ChannelError::Gone),
        };
        let position = Position { received: 0, granted: self.0.peer_credit.into() };
        Ok(Opened { connection: connection.clone(), receiver, sender, position })
    }

    /// Accepts a channel on which a stream goes on, and begins with our position. The stream's channel before that must have
    /// ended, and all of it must have been taken.
    pub(super) async fn accept_again(self, entry: Arc<Entry<C>>, claim: u64, asked: Asked<C>) {
        let Asked { connection, opening, pending } = asked;
        let drained = entry.wait_for(|state| {
            (state.is_done() || state.claims != claim || state.is_detached())
                .then(|| !state.is_done() && state.claims == claim)
        });
        let goes_on = tokio::select! {
            goes_on = drained => goes_on,
            () = connection.channels.gone() => return,
            () = self.credits().gone() => return,
        };
        if !goes_on {
            return pending.refuse(super::incoming::unknown(&entry)).await;
        }
        let opened = async {
            let (receiver, sender) = pending.accept().await;
            let position = Bytes::copy_from_slice(&self.position(&entry).to_bytes());
            sender.send(position).await.ok()?;
            Some((receiver, sender))
        };
        let opened = tokio::select! {
            biased;
            opened = opened => opened,
            () = connection.channels.gone() => None,
        };
        let Some((receiver, sender)) = opened else { return };
        match opening.position() {
            Some(position) => self.attach(&entry, claim, Opened { connection, receiver, sender, position }),
            None => close_late(connection.channels, receiver, sender).await,
        }
    }
}
