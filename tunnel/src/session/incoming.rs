//! The channels that the other end opens: for new streams, and for streams that go on.

use std::sync::Arc;

use bytes::Bytes;
use secure_comms_protocol::limits::CHANNEL_OPEN;
use secure_comms_protocol::{Kubernetes, Opening, Phase, Position, Refusal, RefusalReason, TunnelName};
use tokio::time::timeout;

use super::entry::{Asked, Entry, Opened, Stage};
use super::halves::halves;
use super::{Channels, Session, SessionReceiver, SessionSender};
use crate::flow::{LaneNumber, Side};
use crate::link::{Incoming, Sender};

/// A channel that the other end opens.
pub enum IncomingStream<C: Channels> {
    /// For a new stream, which the caller serves or refuses.
    New(NewStream<C>),
    /// For one that goes on, or that was refused: nothing is left to do.
    Handled,
}

impl<C: Channels> std::fmt::Debug for IncomingStream<C> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::New(_) => "New",
            Self::Handled => "Handled",
        })
    }
}

/// A new stream that the other end asks for. If its connection ends before the answer, the other end asks again on the next
/// one, and the answer goes there.
#[derive(Debug)]
pub struct NewStream<C: Channels> {
    session: Session<C>,
    entry: Arc<Entry<C>>,
    answered: bool,
}

/// The refusal of a stream that could not go on.
pub(super) fn unknown<C: Channels>(entry: &Entry<C>) -> Refusal {
    refusal(entry.name(), &RefusalReason::UnknownStream(entry.id()))
}

fn refusal(name: &TunnelName, reason: &RefusalReason) -> Refusal {
    Refusal::new(name.as_str(), Kubernetes::NAME, reason)
}

impl<C: Channels> Session<C> {
    /// Takes a channel that the other end opens on the connection `on`, for the stream `id` of tunnel `name`.
    pub fn incoming(
        &self,
        on: LaneNumber,
        name: &TunnelName,
        id: u32,
        opening: Opening,
        pending: C::Pending,
    ) -> IncomingStream<C> {
        // The connection has been replaced since, and is cut: its peer asks again on the new one. On a connection that lives,
        // the dropped open would be a refusal, which is final.
        let Some(connection) = self.numbered(on) else { return IncomingStream::Handled };
        let asked = Asked { connection, opening, pending };
        match (self.entry(id), opening) {
            (Some(entry), Opening::Again(_) | Opening::Resume(_)) if entry.name() == name => {
                self.go_on(entry, asked);
                IncomingStream::Handled
            }
            (None, Opening::New | Opening::Again(_)) if self.is_theirs(id) => {
                let connection = asked.connection.clone();
                let entry = Arc::new(Entry::new(id, name.clone(), Stage::Accepting(Some(asked))));
                // It is asked for here: a `streams` of another lane that was said before does not mean it.
                entry.state().connection = Some(connection);
                self.table().streams.insert(id, entry.clone());
                IncomingStream::New(NewStream { session: self.clone(), entry, answered: false })
            }
            (_, Opening::New | Opening::Again(_)) => {
                refuse(asked, refusal(name, &RefusalReason::BadStreamId(id)));
                IncomingStream::Handled
            }
            (_, Opening::Resume(_)) => {
                refuse(asked, refusal(name, &RefusalReason::UnknownStream(id)));
                IncomingStream::Handled
            }
        }
    }

    /// Whether the other end gives this id to a stream.
    fn is_theirs(&self, id: u32) -> bool {
        let odd = id % 2 == 1;
        id != 0 && odd == (self.0.side == Side::Agent)
    }

    fn go_on(&self, entry: Arc<Entry<C>>, asked: Asked<C>) {
        let mut state = entry.state();
        match &mut state.stage {
            // We have not answered yet. The answer goes to the newest connection.
            Stage::Accepting(waiting) if matches!(asked.opening, Opening::Again(_)) => {
                let connection = asked.connection.clone();
                let older = waiting.replace(asked);
                state.connection = Some(connection);
                drop(state);
                drop(older);
            }
            Stage::Accepting(_) => {
                drop(state);
                let unknown = unknown(&entry);
                refuse(asked, unknown);
            }
            // If its connection seems to live here, the other end knows better: the stream goes on once that has ended.
            Stage::Open | Stage::Opening => {
                state.claims += 1;
                let claim = state.claims;
                drop(state);
                // An older attempt that waits is refused.
                entry.notify();
                tokio::spawn(self.clone().accept_again(entry, claim, asked));
            }
        }
    }
}

impl<C: Channels> Session<C> {
    /// Ends a stream for which the agent was to ask again, and that was accepted in between, if the agent does not: its client
    /// has left.
    async fn over_unless_asked(self, entry: Arc<Entry<C>>) {
        let asked = entry.wait_for(|state| (!state.unlisted || state.is_done()).then_some(()));
        let is_late = tokio::select! {
            asked = timeout(CHANNEL_OPEN, asked) => asked.is_err(),
            () = self.credits().gone() => false,
        };
        if is_late && entry.state().unlisted {
            self.drop_kept(entry.over().into());
        }
    }
}

fn refuse<C: Channels>(asked: Asked<C>, refusal: Refusal) {
    tokio::spawn(asked.pending.refuse(refusal));
}

impl<C: Channels> NewStream<C> {
    /// Takes the newest channel for the answer.
    fn take(&self) -> Option<Asked<C>> {
        match &mut self.entry.state().stage {
            Stage::Accepting(asked) => asked.take(),
            Stage::Opening | Stage::Open => None,
        }
    }
}

impl<C: Channels> Incoming for NewStream<C> {
    type Receiver = SessionReceiver<C>;
    type Sender = SessionSender<C>;

    async fn accept(mut self) -> (SessionReceiver<C>, SessionSender<C>) {
        self.answered = true;
        let asked = self.take();
        let claim = {
            let mut state = self.entry.state();
            state.stage = Stage::Open;
            state.connection = asked.as_ref().map(|asked| asked.connection.clone());
            state.claims += 1;
            state.claims
        };
        // Before the first wait: if this future is dropped, so is the stream.
        let both = halves(&self.session, &self.entry);
        if let Some(Asked { connection, opening, pending }) = asked {
            let accepted = async {
                let (receiver, sender) = pending.accept().await;
                if opening.position().is_some() {
                    let ours = self.session.position(&self.entry).to_bytes();
                    // If the connection has ended, the receiving half says so.
                    let _ = sender.send(Bytes::copy_from_slice(&ours)).await;
                }
                (receiver, sender)
            };
            let channels = connection.channels.clone();
            tokio::select! {
                biased;
                (receiver, sender) = accepted => {
                    let granted = u64::from(self.session.0.peer_credit);
                    let position = opening.position().unwrap_or(Position { received: 0, granted });
                    let opened = Opened { connection, receiver, sender, position };
                    self.session.attach(&self.entry, claim, opened);
                }
                // The stream goes on with the next connection.
                () = channels.gone() => {}
            }
        }
        if self.entry.state().unlisted {
            tokio::spawn(self.session.clone().over_unless_asked(self.entry.clone()));
        }
        both
    }

    async fn refuse(mut self, refusal: Refusal) {
        self.answered = true;
        let asked = self.take();
        self.session.forget(&self.entry);
        if let Some(asked) = asked {
            asked.pending.refuse(refusal).await;
        }
    }
}

impl<C: Channels> Drop for NewStream<C> {
    fn drop(&mut self) {
        if !self.answered {
            self.session.forget(&self.entry);
        }
    }
}
