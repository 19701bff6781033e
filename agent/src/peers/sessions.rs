//! The session with the adaptor: streams that outlive the connections which carry them (docs/PROTOCOL.md, section 7.1).
//!
//! In: peers whose hello names a lane, and the ends of their connections. Out: streams over the connection that a lane has
//! now.

mod lanes;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use secure_comms_protocol::control::WantedLane;
use secure_comms_protocol::limits::{CreditLimits, LANE_WAIT, SESSION_LINGER};
use secure_comms_protocol::{Control, Kubernetes, Lane, SessionId, TunnelName};
use secure_comms_tunnel::Outbounds;
use secure_comms_tunnel::flow::{LaneNumber, Side};
use tokio::sync::watch;
use tokio::time::{Instant, timeout, timeout_at};

use self::lanes::{Lanes, Replaced};
use super::link::SessionStreams;
use super::peer::Peer;
use crate::kata::KataAgent;

/// What a hello with a lane asks for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted<'a> {
    /// Lane that the connection is to be.
    pub(crate) lane: Lane,
    /// Session that the hello names.
    pub(crate) session: Option<&'a str>,
    /// Fingerprint of the key that the connection logged in with.
    pub(crate) key: &'a str,
}

/// The answer to a hello with a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// A new session; the one before it ends.
    New,
    /// The connection becomes a lane of the current session.
    Resumed,
    /// No session: only a main lane begins one.
    MainFirst,
}

impl Wanted<'_> {
    /// The answer while `current` is the session, with the fingerprint of the key that it belongs to.
    fn answer(self, current: Option<(&SessionId, &str)>) -> Answer {
        let is_current = current.is_some_and(|(id, key)| {
            key == self.key && self.session.is_some_and(|named| named.parse().as_ref() == Ok(id))
        });
        match self.lane {
            _ if is_current => Answer::Resumed,
            Lane::Main => Answer::New,
            Lane::Data => Answer::MainFirst,
        }
    }
}

/// The session of this agent; none before an adaptor has begun one, and after its end.
#[derive(Debug, Default)]
pub(crate) struct Sessions(Mutex<Option<Arc<AdaptorSession>>>);

impl Sessions {
    fn slot(&self) -> MutexGuard<'_, Option<Arc<AdaptorSession>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The current session.
    pub(crate) fn current(&self) -> Option<Arc<AdaptorSession>> {
        self.slot().clone()
    }

    /// The answer to a hello, with the session to resume.
    pub(crate) fn answer(&self, wanted: Wanted<'_>) -> (Answer, Option<Arc<AdaptorSession>>) {
        let current = self.current();
        let belongs = current.as_ref().map(|session| (session.streams.id(), &*session.key));
        (wanted.answer(belongs), current)
    }

    /// Sets the current session. The one before must have ended.
    pub(crate) fn begin(&self, session: Arc<AdaptorSession>) {
        *self.slot() = Some(session);
    }

    /// Forgets a session that has ended, if it is the current one.
    pub(crate) fn forget(&self, session: &Arc<AdaptorSession>) {
        self.slot().take_if(|current| Arc::ptr_eq(current, session));
    }
}

/// The connection of a lane.
#[derive(Clone, Debug)]
pub(crate) struct LaneConnection {
    /// Its number in the session.
    pub(crate) number: LaneNumber,
    /// The peer.
    pub(crate) peer: Arc<Peer<Kubernetes>>,
    /// When it became the lane.
    pub(crate) since: Instant,
}

/// A session, from the hello that begins it to its end.
#[derive(Debug)]
pub(crate) struct AdaptorSession {
    /// Its streams.
    pub(crate) streams: SessionStreams,
    /// What its streams may reach: they share the limits of an interceptor.
    pub(crate) outbounds: Outbounds<Kubernetes, KataAgent>,
    /// Fingerprint of the key that its first connection logged in with.
    key: String,
    lanes: Mutex<Lanes<LaneConnection>>,
    /// Counts the changes of `lanes`.
    changed: watch::Sender<u64>,
    resumed: AtomicU64,
    ended: AtomicBool,
}

/// How a connection became a lane.
#[derive(Debug)]
pub(crate) struct Joined {
    /// Number of the connection in the session.
    pub(crate) number: LaneNumber,
    /// For how long the lane had no connection, if it was lost.
    pub(crate) lost_for: Option<Duration>,
    /// The connection of the lane that it replaces.
    pub(crate) replaced: Option<LaneConnection>,
}

impl AdaptorSession {
    /// A session without connections, for the holder of `key`, a fingerprint. The adaptor grants each stream `peer_credit`
    /// bytes to begin with.
    pub(crate) fn new(
        id: SessionId,
        key: String,
        peer_credit: u32,
        outbounds: Outbounds<Kubernetes, KataAgent>,
    ) -> Self {
        Self {
            streams: SessionStreams::new(Side::Agent, CreditLimits::KUBERNETES, id, peer_credit),
            outbounds,
            key,
            lanes: Mutex::new(Lanes::new()),
            changed: watch::Sender::new(0),
            resumed: AtomicU64::new(0),
            ended: AtomicBool::new(false),
        }
    }

    fn lanes(&self) -> MutexGuard<'_, Lanes<LaneConnection>> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn notify_changed(&self) {
        self.changed.send_modify(|version| *version += 1);
    }

    /// Makes a peer the connection of a lane.
    pub(crate) fn connect(&self, lane: Lane, peer: &Arc<Peer<Kubernetes>>) -> Joined {
        let number = self.streams.connect(lane, peer.link.clone());
        let connection = LaneConnection { number, peer: peer.clone(), since: Instant::now() };
        let replaced = self.lanes().connect(lane, peer.connection.id, connection);
        self.notify_changed();
        let (lost_for, replaced) = match replaced {
            Replaced::Nothing => (None, None),
            Replaced::Lost(since) => (Some(since), None),
            Replaced::Connection(connection) => {
                self.streams.disconnect(connection.number);
                (None, Some(connection))
            }
        };
        Joined { number, lost_for, replaced }
    }

    /// Counts a connection that resumes the session.
    pub(crate) fn count_resumed(&self) {
        self.resumed.fetch_add(1, Ordering::Relaxed);
    }

    /// Number of connections that have resumed the session.
    pub(crate) fn resumed(&self) -> u64 {
        self.resumed.load(Ordering::Relaxed)
    }

    /// Notes that the connection with this id has ended. Returns its lane; none if it is not, or no longer, a lane.
    pub(crate) fn lose(&self, id: u64) -> Option<Lane> {
        let (lane, number) = self.lanes().lose(id).map(|(lane, connection)| (lane, connection.number))?;
        self.streams.disconnect(number);
        self.notify_changed();
        Some(lane)
    }

    /// The address of the last connection of a lane, if it logged in later than the connection with this id.
    pub(crate) fn newer(&self, lane: Lane, id: u64) -> Option<SocketAddr> {
        self.lanes().newer(lane, id).map(|newer| newer.peer.connection.address)
    }

    /// The lanes that are connected.
    pub(crate) fn connected(&self) -> Vec<(Lane, LaneConnection)> {
        self.lanes().connected().map(|(lane, connection)| (lane, connection.clone())).collect()
    }

    /// The connection that the adaptor has given up by having the stream `id` go on over the connection `on`: one of another lane,
    /// which only seems to live.
    pub(crate) fn given_up(&self, id: u32, on: LaneNumber) -> Option<LaneConnection> {
        let carrier = self.streams.carrier(id).filter(|carrier| *carrier != on)?;
        let lanes = self.lanes();
        let numbered = |number| move |(_, connection): &(Lane, &LaneConnection)| connection.number == number;
        // A channel open that was late, on a connection that was replaced, says nothing.
        lanes.connected().find(numbered(on))?;
        lanes.connected().find(numbered(carrier)).map(|(_, connection)| connection.clone())
    }

    /// Since when the session has no connection; none if it has one.
    pub(crate) fn alone_since(&self) -> Option<Instant> {
        self.lanes().alone_since()
    }

    /// Number of streams of a lane; of all, unless another lane is connected, for it may carry the rest.
    pub(crate) fn streams_on(&self, lane: Lane) -> usize {
        if self.lanes().connected().any(|(other, _)| other != lane) {
            self.streams.streams_of(lane)
        } else {
            self.streams.credits().open_streams()
        }
    }

    /// Whether the adaptor serves this tunnel. While a lane is lost, what it served is what the next one will.
    pub(crate) fn offers(&self, name: &TunnelName) -> bool {
        self.lanes().last().any(|connection| connection.peer.offers(name))
    }

    /// Waits until the session has had no connection for [`SESSION_LINGER`].
    pub(crate) async fn lingered(&self) {
        let mut changed = self.changed.subscribe();
        loop {
            changed.mark_unchanged();
            // The sender lives in self, so waiting ends by a change only.
            match self.alone_since() {
                Some(since) => {
                    if timeout_at(since + SESSION_LINGER, changed.changed()).await.is_err() {
                        return;
                    }
                }
                None => drop(changed.changed().await),
            }
        }
    }

    /// Asks the adaptor for the lanes that streams wait for. Never returns.
    pub(crate) async fn ask_for_lanes(&self) {
        let mut changed = self.changed.subscribe();
        loop {
            let lane = self.streams.lane_wanted().await;
            changed.mark_unchanged();
            if let Some((_, main)) = self.connected().into_iter().find(|(own, _)| *own == Lane::Main) {
                let name = lane.name().to_owned();
                main.peer.outbox.send(Control::Lane(WantedLane { name }));
            }
            // The wish may be lost with its connection.
            drop(timeout(LANE_WAIT, changed.changed()).await);
        }
    }

    /// Ends the session: its streams are reset, and its connections receive the reason. Returns the number of streams that
    /// it had; none if it has ended before.
    pub(crate) fn end(&self, reason: &str) -> Option<usize> {
        if self.ended.swap(true, Ordering::Relaxed) {
            return None;
        }
        let open = self.streams.credits().open_streams();
        self.streams.end(reason);
        for connection in self.lanes().take() {
            connection.peer.close_with_session(reason);
        }
        Some(open)
    }
}

#[cfg(test)]
mod tests {
    use secure_comms_protocol::OutboundTag;

    use super::*;
    use crate::kata::sources::MountPrefixes;

    #[tokio::test(start_paused = true)]
    async fn a_session_without_a_connection_is_kept_for_a_minute() {
        let outbounds = Outbounds::<Kubernetes>::new(std::iter::empty::<&OutboundTag>());
        let kata_agent = KataAgent::new(None, MountPrefixes::default());
        let outbounds = outbounds.with_interceptor(TunnelName::kata_agent(), kata_agent);
        let session = AdaptorSession::new(SessionId::from_random(1), "key".to_owned(), 1 << 16, outbounds);
        let began = Instant::now();
        session.lingered().await;
        assert_eq!(began.elapsed(), SESSION_LINGER);
        assert_eq!(session.end("no connection for 60 s"), Some(0));
        assert_eq!(session.end("another reason"), None, "a session ends once");
        assert_eq!(session.streams.ended().await, "no connection for 60 s");
    }

    #[test]
    fn a_hello_with_a_lane_is_answered_by_the_table() {
        let (own, other) = (SessionId::from_random(1), SessionId::from_random(2));
        let (own_text, other_text) = (own.to_string(), other.to_string());
        let current = Some((&own, "key"));
        // Lane, session and key of the hello, the current session, and the answer.
        let table = [
            (Lane::Main, None, "key", None, Answer::New),
            (Lane::Main, None, "key", current, Answer::New),
            (Lane::Main, Some(&*own_text), "key", current, Answer::Resumed),
            (Lane::Main, Some(&*own_text), "another key", current, Answer::New),
            (Lane::Main, Some(&*other_text), "key", current, Answer::New),
            (Lane::Main, Some(&*own_text), "key", None, Answer::New),
            (Lane::Main, Some("no id"), "key", current, Answer::New),
            (Lane::Main, Some(""), "key", None, Answer::New),
            (Lane::Data, Some(&*own_text), "key", current, Answer::Resumed),
            (Lane::Data, Some(&*own_text), "another key", current, Answer::MainFirst),
            (Lane::Data, Some(&*other_text), "key", current, Answer::MainFirst),
            (Lane::Data, Some(&*own_text), "key", None, Answer::MainFirst),
            (Lane::Data, None, "key", current, Answer::MainFirst),
            (Lane::Data, None, "key", None, Answer::MainFirst),
        ];
        for (lane, session, key, current, answer) in table {
            let wanted = Wanted { lane, session, key };
            assert_eq!(wanted.answer(current), answer, "{wanted:?}");
        }
    }
}
