//! The connections of the session: how they join it, the streams that they carry, and how they leave (docs/PROTOCOL.md,
//! section 7.1).

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};

use secure_comms_keys::text::one_line;
use secure_comms_protocol::control::SessionReply;
use secure_comms_protocol::limits::{MESSAGE_COST_MIN, SESSION_LINGER};
use secure_comms_protocol::{Control, Hello, Kubernetes, Lane, Opening, SessionId};
use secure_comms_tunnel::flow::{LaneNumber, PeerFlow};
use secure_comms_tunnel::session::IncomingStream;

use super::streams::{Asked, serve};
use crate::agent::Agent;
use crate::connection::Connection;
use crate::os::log_limits::SESSIONS;
use crate::os::operator_log::TO_OPERATOR;
use crate::peers::link::PeerPending;
use crate::peers::peer::Peer;
use crate::peers::sessions::{AdaptorSession, Answer, Joined, LaneConnection, Wanted};

/// Longest text of the adaptor in a reason, in bytes.
const TEXT_MAX: usize = 200;

/// A connection's part in a session.
#[derive(Debug)]
pub(super) struct Member {
    session: Arc<AdaptorSession>,
    peer: Arc<Peer<Kubernetes>>,
    number: LaneNumber,
}

/// The part of one connection; empty while it has none.
pub(super) type MemberSlot = Arc<OnceLock<Member>>;

impl Member {
    /// Serves a channel that the adaptor opens: of a new stream, or of one that goes on.
    pub(super) fn serve_stream(&self, asked: Asked<'_>, pending: PeerPending) {
        let Self { session, peer, number } = self;
        let (connection, streams) = (&peer.connection, &session.streams);
        let Ok(tunnel) = asked.name.parse() else {
            // It has no permit: refused.
            return serve(connection, &session.outbounds, streams.credits(), asked, pending);
        };
        if asked.opening != Opening::New
            && let Some(given_up) = session.given_up(asked.id, *number)
        {
            let reason = format!("its streams go on over the connection from {}", connection.address);
            cut(&given_up.peer, &reason);
        }
        match streams.incoming(*number, &tunnel, asked.id, asked.opening, pending) {
            IncomingStream::New(new) => serve(connection, &session.outbounds, streams.credits(), asked, new),
            IncomingStream::Handled => {}
        }
    }

    /// Handles the adaptor's list of the streams that it knows.
    pub(super) fn peer_knows(&self, known: &[u32]) {
        self.session.streams.peer_knows(known, self.number);
    }

    /// Handles a `bye` that ends the session.
    pub(super) fn end_session(&self, agent: &Agent, reason: &str) {
        agent.end_session(&self.session, &format!("the adaptor said bye: {}", one_line(reason, TEXT_MAX)));
    }
}

/// A peer whose hello is being handled.
#[derive(Debug)]
pub(super) struct Greeted<'a, P> {
    pub(super) agent: &'a Arc<Agent>,
    pub(super) peer: &'a Arc<Peer<P>>,
    /// Its part in a session.
    pub(super) slot: &'a MemberSlot,
}

impl Greeted<'_, Kubernetes> {
    /// Takes the adaptor's place, for a session or, if the hello asks for none, for this connection alone. The newest login wins,
    /// however late it says hello: the hello of an older one may have been delayed by the network that made its adaptor
    /// connect again.
    pub(super) fn take_place(&self, hello: &Hello) {
        // Streams of a session have credits: a hello without them, or too late for them, asks for none.
        let credit = hello.credit.filter(|credit| {
            *credit >= MESSAGE_COST_MIN && self.peer.credits.peer_mode_is(PeerFlow::Credits(*credit))
        });
        let key = self.peer.connection.login_key();
        let (Some(name), Some(credit), Some(key)) = (hello.lane.as_deref(), credit, key) else {
            self.replace_all();
            return;
        };
        let Some(lane) = Lane::from_name(name) else {
            let name = one_line(name, TEXT_MAX);
            return self.peer.close_gracefully(&format!("this agent has no lane '{name}'"));
        };
        match self.agent.sessions.answer(Wanted { lane, session: hello.session.as_deref(), key }) {
            (Answer::Resumed, Some(session)) => self.resume(lane, &session),
            (Answer::Resumed | Answer::MainFirst, _) => self.peer.close_gracefully(MAIN_FIRST),
            (Answer::New, _) => self.begin(key, credit),
        }
    }

    /// Gives the peer the whole place. Ends the session, or closes the peer, that had it; false if that logged in later, and the
    /// peer is closed instead.
    fn replace_all(&self) -> bool {
        let Self { agent, peer, .. } = *self;
        let (id, address) = (peer.connection.id, peer.connection.address);
        let reason = replaced_by(address);
        let session = agent.sessions.current();
        if let Some(newer) = session.as_ref().and_then(|session| session.newer(Lane::Main, id)) {
            peer.close_gracefully(&has_the_place(newer));
            return false;
        }
        if let Some(session) = session {
            agent.end_session(&session, &reason);
        }
        match agent.peers.kubernetes.take_place(peer) {
            Ok(None) => true,
            Ok(Some(older)) => {
                let older_address = older.connection.address;
                log::info!("connection from {older_address}: replaced by a newer one, from {address}");
                older.close_gracefully(&reason);
                true
            }
            Err(newer) => {
                peer.close_gracefully(&has_the_place(newer.connection.address));
                false
            }
        }
    }

    /// Begins a session with this peer as its main lane.
    fn begin(&self, key: &str, credit: u32) {
        let id = match session_id() {
            Ok(id) => id,
            Err(error) => {
                log::error!("session: naming it: {error}; check that the VM has a source of randomness");
                return self.peer.close_gracefully("the agent has no random bytes for a session");
            }
        };
        if !self.replace_all() {
            return;
        }
        let outbounds = self.agent.tunnels.kubernetes.for_connection();
        let session = Arc::new(AdaptorSession::new(id, key.to_owned(), credit, outbounds));
        self.agent.sessions.begin(session.clone());
        self.attach(Lane::Main, &session, false);
        tokio::spawn(watch(self.agent.clone(), session));
    }

    /// Makes the peer a lane of the session that it resumes. The connection that it replaces is cut without a farewell: the
    /// adaptor has given it up.
    fn resume(&self, lane: Lane, session: &Arc<AdaptorSession>) {
        let address = self.peer.connection.address;
        if let Some(newer) = session.newer(lane, self.peer.connection.id) {
            return self.peer.close_gracefully(&has_the_place(newer));
        }
        let Joined { replaced, lost_for, .. } = self.attach(lane, session, true);
        session.count_resumed();
        let before = match (replaced, lost_for) {
            (Some(LaneConnection { peer, .. }), _) => {
                cut(&peer, &replaced_by(address));
                format!("instead of {}{}", peer.connection.address, peer.connection.silence())
            }
            (None, Some(lost_for)) => format!("after {:.1} s", lost_for.as_secs_f32()),
            (None, None) => return log::info!("session, lane {lane}: connected from {address}"),
        };
        let text = format!(
            "session, lane {lane}: connected again, from {address}, {before}; streams that go on: {}",
            session.streams_on(lane)
        );
        // The operator hears of no line beyond the limit, whatever the level of the log.
        match SESSIONS.level(log::Level::Info) {
            log::Level::Info => log::info!(target: TO_OPERATOR, "{text}"),
            level => log::log!(level, "{text}"),
        }
    }

    /// Makes the peer a lane of the session, and says so.
    fn attach(&self, lane: Lane, session: &Arc<AdaptorSession>, resumed: bool) -> Joined {
        // First, for no stream is opened before the adaptor knows the session.
        let id = session.streams.id().to_string();
        self.peer.outbox.send(Control::Session(SessionReply { id, resumed }));
        let joined = session.connect(lane, self.peer);
        self.peer.outbox.join(session.streams.clone(), joined.number);
        // Only the first hello of a connection is handled.
        drop(self.slot.set(Member {
            session: session.clone(),
            peer: self.peer.clone(),
            number: joined.number,
        }));
        self.agent.peers.kubernetes.join_place(self.peer);
        joined
    }
}

/// Cuts a connection that the adaptor has given up, without a farewell. The log has the reason.
fn cut(peer: &Peer<Kubernetes>, reason: &str) {
    peer.connection.end(reason);
    peer.connection.cut();
}

/// Follows a session until its end. Asks for the lanes that it needs, and ends it once it had no connection for too long.
async fn watch(agent: Arc<Agent>, session: Arc<AdaptorSession>) {
    let reason = tokio::select! {
        reason = session.streams.ended() => reason,
        () = session.lingered() => format!("no connection for {} s", SESSION_LINGER.as_secs()),
        () = session.ask_for_lanes() => return,
    };
    agent.end_session(&session, &reason);
}

/// Notes that a connection has ended: if it was a lane, its streams wait.
pub(super) fn leave(agent: &Agent, connection: &Connection) {
    let Some(session) = agent.sessions.current() else { return };
    let Some(lane) = session.lose(connection.id) else { return };
    let (address, silence) = (connection.address, connection.silence());
    let waiting = session.streams_on(lane);
    log::log!(
        SESSIONS.level(log::Level::Warn),
        "session, lane {lane}: the connection from {address} was lost{silence}; streams that wait for the next: {waiting}"
    );
}

fn session_id() -> Result<SessionId, getrandom::Error> {
    let mut bits = [0; 16];
    getrandom::fill(&mut bits)?;
    Ok(SessionId::from_random(u128::from_be_bytes(bits)))
}

/// Why a lane other than the main one is refused without a session.
const MAIN_FIRST: &str = "the main lane comes first: this agent does not know the session";

fn replaced_by(address: SocketAddr) -> String {
    format!("replaced by a newer connection of the worker node, from {address}")
}

fn has_the_place(newer: SocketAddr) -> String {
    format!("a newer connection of the worker node, from {newer}, has the place")
}
