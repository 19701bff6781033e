//! An authenticated connection to the agent, on which both ends have exchanged hellos over the control channel.

mod tunnels;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use secure_comms_keys::text::one_line;
use secure_comms_protocol::Hello;
use secure_comms_protocol::control::{Bye, LogLine, SessionReply};
use secure_comms_protocol::limits::{
    HELLO, LOG_BATCH, LOG_KEPT, LOG_TEXT_MAX, SESSIONS_VERSION, UPGRADE_DRAIN,
};
use secure_comms_protocol::{
    Attestation, Control, KeyProgress, Lane, Phase, PhaseName, PodId, SessionId, TunnelName,
};
use secure_comms_ssh::control::{self, ControlEnd, Outbox};
use secure_comms_ssh::guard::Guard;
use secure_comms_tunnel::flow::LaneNumber;
use secure_comms_tunnel::session::Session;
use secure_comms_tunnel::{Credits, Receiver, Sender};
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::{Instant, timeout, timeout_at};

pub(crate) use self::tunnels::Tunnels;
use self::tunnels::mismatches;
use crate::text::quote;
use crate::transport::ssh::{AgentLink, ClientPhase, ConnectError, SshConnection, TransportEnd};

/// Lines of the agent's log that may wait until they are shown.
const LOG_QUEUE: usize = LOG_KEPT + LOG_BATCH;

/// Longest name of a level, in bytes.
const LEVEL_MAX: usize = 20;

/// Why a connection ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ConnectionEnd {
    /// One line.
    why: String,
    pub(crate) cause: EndCause,
}

/// What ended a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EndCause {
    /// The network, or the loss of the agent's process.
    Broken,
    /// The agent: it may end the next connection, too.
    Agent,
    /// The agent, and with the connection its session.
    AgentWithSession,
}

impl ConnectionEnd {
    fn new(cause: EndCause, why: impl Into<String>) -> Self {
        Self { why: why.into(), cause }
    }

    /// The end, as an error of connecting.
    fn during(self, step: &'static str) -> ConnectError {
        match self.cause {
            EndCause::Broken => ConnectError::Protocol(step, self.why),
            EndCause::Agent | EndCause::AgentWithSession => ConnectError::Dismissed(step, self.why),
        }
    }
}

impl fmt::Display for ConnectionEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.why)
    }
}

impl From<TransportEnd> for ConnectionEnd {
    fn from(end: TransportEnd) -> Self {
        match end {
            TransportEnd::Refused => Self::new(EndCause::Agent, "the agent refused the connection"),
            TransportEnd::Disconnected(why) => {
                Self::new(EndCause::Agent, format!("the agent disconnected: {why}"))
            }
            TransportEnd::Broken(why) => Self::new(EndCause::Broken, why),
        }
    }
}

/// What a connection is to be in a session: part of its hello.
#[derive(Clone, Debug)]
pub(crate) struct Joining {
    pub(crate) lane: Lane,
    /// None for a new session.
    pub(crate) session: Option<SessionId>,
}

/// The session that a connection belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Joined {
    pub(crate) id: SessionId,
    /// Whether it is the one that the hello named.
    pub(crate) resumed: bool,
}

/// What the agent's control messages have reported. A later message replaces an earlier one, so that any number of
/// messages takes bounded memory.
#[derive(Clone, Debug, Default)]
struct PeerState {
    hello: Option<Hello>,
    keys: Option<KeyProgress>,
    upgrade: bool,
    session: Option<SessionReply>,
    end: Option<ConnectionEnd>,
    /// The streams that were open when the connection ended.
    lost_streams: usize,
}

/// An established connection. Dropping it cuts the connection, and ends its streams and its control task.
#[derive(Debug)]
pub(crate) struct AgentConnection<P: ClientPhase> {
    connection: SshConnection<P>,
    outbox: Outbox,
    peer: watch::Receiver<PeerState>,
    agent: Hello,
    joined: Option<Joined>,
    lane_wanted: Arc<Notify>,
    tunnel_mismatches: Option<String>,
    last_keys: Option<KeyProgress>,
    log: Option<mpsc::Receiver<LogLine>>,
    control: AbortHandle,
}

impl<P: ClientPhase> Drop for AgentConnection<P> {
    fn drop(&mut self) {
        self.control.abort();
    }
}

impl<P: ClientPhase> AgentConnection<P> {
    /// Opens the control channel, requests the forwards, and exchanges hellos within `HELLO` (5 s). With `joining`, the
    /// connection becomes a lane of a session, if the agent knows sessions.
    ///
    /// Dropping the future cuts the connection.
    ///
    /// # Errors
    /// The other end is not an agent in this phase, or does not answer in time.
    pub(crate) async fn establish(
        connection: SshConnection<P>,
        pod: &PodId,
        tunnels: &Tunnels<P>,
        joining: Option<&Joining>,
    ) -> Result<Self, ConnectError> {
        let deadline = Instant::now() + HELLO;
        let exchanged = timeout_at(deadline, Self::exchange(connection, pod, tunnels, joining)).await;
        let late = |_| ConnectError::Timeout(HELLO.as_secs(), "waiting for the agent's hello");
        let mut connection = exchanged.map_err(late)??;
        let knows_sessions =
            connection.agent.version >= SESSIONS_VERSION && connection.agent.credit.is_some();
        if let Some(joining) = joining.filter(|_| knows_sessions) {
            match (timeout_at(deadline, connection.joined()).await, &joining.session) {
                (Ok(joined), _) => connection.joined = Some(joined?),
                // An agent that says none in time has none.
                (Err(_), None) => {}
                (Err(_), Some(_)) => {
                    return Err(ConnectError::Timeout(HELLO.as_secs(), "waiting for the agent's session"));
                }
            }
        }
        Ok(connection)
    }

    async fn exchange(
        connection: SshConnection<P>,
        pod: &PodId,
        tunnels: &Tunnels<P>,
        joining: Option<&Joining>,
    ) -> Result<Self, ConnectError> {
        // The forward requests go out with the control channel's, and cost no round trip of their own.
        let (channel, refused) =
            tokio::join!(connection.open_control(), request_forwards(&connection, tunnels));
        let (receiver, sender) = channel?;
        let outbox = Outbox::default();
        let credits = connection.credits().clone();
        let ours = Hello {
            lane: joining.map(|joining| joining.lane.to_string()),
            session: joining.and_then(|joining| joining.session.as_ref()).map(ToString::to_string),
            ..tunnels.hello(pod, credits.initial())
        };
        outbox.send(Control::Hello(ours.clone()));
        let (state, mut peer) = watch::channel(PeerState::default());
        let ended = connection.ended();
        let (log_sender, log) = mpsc::channel(LOG_QUEUE);
        let lane_wanted = Arc::<Notify>::default();
        let reports = Reports {
            state,
            lane_wanted: Arc::clone(&lane_wanted),
            // An unproven agent sends none, and may not make us log.
            log: (P::NAME == PhaseName::Kubernetes).then_some(log_sender),
        };
        let control = ControlTask { receiver, sender, credits, outbox: outbox.clone(), ended, reports };
        let control = tokio::spawn(control.run()).abort_handle();
        let mut connection = Self {
            connection,
            outbox,
            peer: peer.clone(),
            agent: Hello::default(),
            joined: None,
            lane_wanted,
            tunnel_mismatches: None,
            last_keys: None,
            log: Some(log),
            control,
        };
        let first = peer.wait_for(|state| state.hello.is_some() || state.end.is_some()).await;
        let first = first.map(|state| state.clone()).unwrap_or_default();
        connection.agent = checked_hello::<P>(first)?;
        connection.tunnel_mismatches = mismatches::<P>(&ours, &connection.agent, &refused?);
        Ok(connection)
    }

    /// Waits for the session that the agent names.
    async fn joined(&mut self) -> Result<Joined, ConnectError> {
        let said = self.peer.wait_for(|state| state.session.is_some() || state.end.is_some()).await;
        let said = said.map(|state| state.clone()).unwrap_or_default();
        let fault = |why| ConnectError::Protocol("join a session", why);
        match said.session {
            Some(SessionReply { id, resumed }) => match id.parse() {
                Ok(id) => Ok(Joined { id, resumed }),
                Err(error) => Err(fault(format!("the agent named '{}': {error}", quote(&id)))),
            },
            None => Err(said.end.unwrap_or_else(gone).during("join a session")),
        }
    }

    /// The session that the connection belongs to; none if the agent knows no sessions.
    pub(crate) fn session(&self) -> Option<&Joined> {
        self.joined.as_ref()
    }

    /// Waits until the agent wants lane `data`. Cancellation safe.
    pub(crate) async fn lane_wanted(&self) {
        self.lane_wanted.notified().await;
    }

    /// Sends a control message.
    pub(crate) fn say(&self, message: Control) {
        self.outbox.send(message);
    }

    /// Opens streams to the agent's outbounds.
    pub(crate) fn link(&self) -> AgentLink<P> {
        self.connection.link()
    }

    /// Serves the agent's streams from now on. In the Kubernetes phase those that come earlier wait.
    pub(crate) fn serve_streams(&self) {
        self.connection.serve_streams();
    }

    /// Makes the connection a lane of the session, and serves the agent's streams there from now on.
    pub(crate) fn join(&self, session: &Session<AgentLink<P>>, lane: Lane) -> LaneNumber {
        let number = self.connection.join(session, lane);
        self.outbox.join(session.clone(), number);
        number
    }

    /// The agent's hello.
    pub(crate) fn agent(&self) -> &Hello {
        &self.agent
    }

    /// The tunnels that only one end has, in one line.
    pub(crate) fn tunnel_mismatches(&self) -> Option<&str> {
        self.tunnel_mismatches.as_deref()
    }

    /// Observes whether the agent answers.
    pub(crate) fn liveness(&self) -> Liveness {
        Liveness {
            outbox: self.outbox.clone(),
            guard: self.connection.guard(),
            credits: self.connection.credits().clone(),
        }
    }

    /// The lines of the agent's log that it sends for the operator; none the second time.
    pub(crate) fn take_log(&mut self) -> Option<mpsc::Receiver<LogLine>> {
        self.log.take()
    }

    /// Flow control of the streams that are in no session.
    pub(crate) fn credits(&self) -> &Credits {
        self.connection.credits()
    }

    /// The number of open streams; after the end of the connection, of those that were open then.
    pub(crate) fn open_streams(&self) -> usize {
        let peer = self.peer.borrow();
        if peer.end.is_some() { peer.lost_streams } else { self.connection.credits().open_streams() }
    }

    /// Waits for the end of the connection.
    pub(crate) fn ended(&self) -> impl Future<Output = ConnectionEnd> + Send + use<P> {
        end_of(self.peer.clone())
    }

    /// Sends a bye with the reason, and waits for the agent to end the connection, for at most [`CLOSE_TIMEOUT`]. The
    /// session of the connection, if any, goes on.
    pub(crate) async fn close(self, reason: &str) {
        self.say_bye(reason, false).await;
    }

    /// As [`Self::close`], and ends the session of the connection.
    pub(crate) async fn close_with_session(self, reason: &str) {
        self.say_bye(reason, true).await;
    }

    async fn say_bye(self, reason: &str, ends_session: bool) {
        self.farewell().say(reason, ends_session).await;
    }

    /// Says the last word on the connection, while another task owns it.
    pub(crate) fn farewell(&self) -> Farewell {
        Farewell { outbox: self.outbox.clone(), peer: self.peer.clone() }
    }
}

/// The last word on a connection.
#[derive(Clone, Debug)]
pub(crate) struct Farewell {
    outbox: Outbox,
    peer: watch::Receiver<PeerState>,
}

impl Farewell {
    /// Ends the session of the connection: says bye, and waits for the agent to end the connection, for at most
    /// [`CLOSE_TIMEOUT`].
    pub(crate) async fn end_session(self, reason: &str) {
        self.say(reason, true).await;
    }

    async fn say(self, reason: &str, ends_session: bool) {
        if ends_session {
            self.outbox.bye_session(reason)
        } else {
            self.outbox.bye(reason)
        }
        // An agent that does not end it is cut.
        drop(timeout(CLOSE_TIMEOUT, end_of(self.peer)).await);
    }
}

async fn end_of(mut peer: watch::Receiver<PeerState>) -> ConnectionEnd {
    let end = peer.wait_for(|state| state.end.is_some()).await;
    end.ok().and_then(|state| state.end.clone()).unwrap_or_else(gone)
}

/// Evidence that the agent at the other end of a connection answers.
#[derive(Clone, Debug)]
pub(crate) struct Liveness {
    outbox: Outbox,
    guard: Guard,
    credits: Credits,
}

impl Liveness {
    /// Sends a ping.
    pub(crate) fn probe(&self) {
        self.outbox.probe();
    }

    /// The age of the oldest sent data that nothing has arrived after; `None` if something has.
    pub(crate) fn unanswered(&self) -> Option<Duration> {
        self.guard.unanswered()
    }

    /// The shortest round trip seen; zero before the first.
    pub(crate) fn round_trip(&self) -> Duration {
        self.credits.shortest_round_trip().unwrap_or_default()
    }
}

/// The time that an agent gets to end a connection after a bye.
const CLOSE_TIMEOUT: Duration = UPGRADE_DRAIN;

/// What a connection in the Attestation phase reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum AttestationEvent {
    /// An attempt of the agent to get its keys ended.
    Keys(KeyProgress),
    /// The agent has its keys, and expects a connection in the Kubernetes phase.
    Upgrade,
    /// The connection ended.
    Ended(ConnectionEnd),
}

impl AgentConnection<Attestation> {
    /// Waits for the next event. Dropping the future loses no event.
    pub(crate) async fn next_event(&mut self) -> AttestationEvent {
        loop {
            let state = self.peer.borrow_and_update().clone();
            // The agent sends its last progress more than once.
            if let Some(keys) = state.keys.filter(|keys| self.last_keys.as_ref() != Some(keys)) {
                self.last_keys = Some(keys.clone());
                return AttestationEvent::Keys(keys);
            }
            if state.upgrade {
                return AttestationEvent::Upgrade;
            }
            if let Some(end) = state.end {
                return AttestationEvent::Ended(end);
            }
            if self.peer.changed().await.is_err() {
                return AttestationEvent::Ended(gone());
            }
        }
    }
}

fn gone() -> ConnectionEnd {
    ConnectionEnd::new(EndCause::Broken, "the connection is gone")
}

/// Runs the control channel, and records what it reports and how it ends.
struct ControlTask<R, S, E> {
    receiver: R,
    sender: S,
    credits: Credits,
    outbox: Outbox,
    /// Completes when the connection ends.
    ended: E,
    reports: Reports,
}

/// Where the agent's messages go.
struct Reports {
    state: watch::Sender<PeerState>,
    lane_wanted: Arc<Notify>,
    /// None if the agent may send no lines of its log.
    log: Option<mpsc::Sender<LogLine>>,
}

impl<R: Receiver, S: Sender, E: Future<Output = TransportEnd>> ControlTask<R, S, E> {
    async fn run(self) {
        let Self { mut receiver, sender, credits, outbox, ended, reports } = self;
        tokio::pin!(ended);
        let on_message = |message| reports.record(message);
        let channel = {
            let running = control::run(&mut receiver, &sender, &credits, &outbox, on_message);
            tokio::pin!(running);
            tokio::select! {
                // The connection knows the cause of its end; the channel only sees that it ended.
                biased;
                end = &mut ended => Err(with_last_words(end.into(), timeout(LAST_WORDS, running).await.ok())),
                end = &mut running => Ok(end),
                () = credits.gone() => Err((ConnectionEnd::new(EndCause::Agent, OVERRUN), Some(OVERRUN.to_owned()))),
            }
        };
        let (end, fault) = match channel {
            Err(end) => end,
            Ok(ControlEnd::Bye(bye)) => (said_bye(&bye), None),
            Ok(end @ ControlEnd::Closed) => (ConnectionEnd::new(EndCause::Broken, end.to_string()), None),
            Ok(end @ ControlEnd::Silent) => {
                (ConnectionEnd::new(EndCause::Broken, end.to_string()), Some(end.to_string()))
            }
            Ok(fault) => {
                let why = quote(&fault.to_string());
                (ConnectionEnd::new(EndCause::Agent, why.clone()), Some(why))
            }
        };
        let lost_streams = credits.open_streams();
        credits.end();
        if let Some(reason) = fault {
            // The agent ends the connection when it has the reason; one that does not is cut.
            drop(timeout(CLOSE_TIMEOUT, async { tokio::join!(say_bye(&sender, reason), ended) }).await);
        }
        reports.state.send_modify(|state| (state.end, state.lost_streams) = (Some(end), lost_streams));
    }
}

/// The time for what the control channel brought before the connection ended.
const LAST_WORDS: Duration = Duration::from_millis(100);

/// The end of a connection, of which a bye that came before it may say that the session ends, too.
fn with_last_words(end: ConnectionEnd, words: Option<ControlEnd>) -> (ConnectionEnd, Option<String>) {
    match words {
        Some(ControlEnd::Bye(bye)) if bye.ends_session => {
            (ConnectionEnd { cause: EndCause::AgentWithSession, ..end }, None)
        }
        _ => (end, None),
    }
}

const OVERRUN: &str = "the agent sent more than it was granted";

fn said_bye(bye: &Bye) -> ConnectionEnd {
    let cause = if bye.ends_session { EndCause::AgentWithSession } else { EndCause::Agent };
    ConnectionEnd::new(cause, format!("the agent said bye: {}", quote(&bye.reason)))
}

/// Sends a bye on a control channel that is not run any more.
async fn say_bye(sender: &impl Sender, reason: String) {
    let mut line = Vec::new();
    Control::Bye(Bye { reason, ..Bye::default() }).write_line(&mut line);
    // If the connection is gone, so is the reader of the reason.
    let _ = sender.send(line.into()).await;
}

impl Reports {
    fn record(&self, message: Control) {
        self.state.send_if_modified(|state| {
            match message {
                // Only the first one is kept: it is the one that was checked.
                Control::Hello(hello) => _ = state.hello.get_or_insert(hello),
                Control::Keys(keys) => {
                    let error = keys.error.as_deref().map(quote);
                    state.keys = Some(KeyProgress { error, ..keys });
                }
                Control::Upgrade(_) => state.upgrade = true,
                Control::Log(line) => {
                    if let Some(log) = &self.log {
                        // A line that finds the queue full is missed, and counted by the next one.
                        drop(log.try_send(sanitized(&line)));
                    }
                    return false;
                }
                // As with the hello.
                Control::Session(session) => _ = state.session.get_or_insert(session),
                Control::Lane(wanted) => {
                    if Lane::from_name(&wanted.name) == Some(Lane::Data) {
                        self.lane_wanted.notify_one();
                    }
                    return false;
                }
                Control::Credit(_)
                | Control::Position(_)
                | Control::Streams(_)
                | Control::Ping(_)
                | Control::Pong(_)
                | Control::Bye(_) => return false,
            }
            true
        });
    }
}

/// A line of the agent's log, made one short line.
fn sanitized(line: &LogLine) -> LogLine {
    LogLine { text: one_line(&line.text, LOG_TEXT_MAX), level: one_line(&line.level, LEVEL_MAX), ..*line }
}

fn checked_hello<P: Phase>(state: PeerState) -> Result<Hello, ConnectError> {
    let fault = |why: String| ConnectError::Protocol("exchange hellos", why);
    match (state.hello, state.end) {
        (Some(hello), _) if hello.phase.is_some_and(|phase| phase != P::NAME) => Err(fault(format!(
            "the agent authenticated '{}', and its hello names another phase",
            P::NAME.user()
        ))),
        (Some(hello), _) => Ok(Hello { instance: hello.instance.as_deref().map(quote), ..hello }),
        (None, end) => Err(end.unwrap_or_else(gone).during("exchange hellos")),
    }
}

/// Requests a forward for each local outbound; returns the names that the agent refuses.
async fn request_forwards<P: ClientPhase>(
    connection: &SshConnection<P>,
    tunnels: &Tunnels<P>,
) -> Result<Vec<TunnelName>, ConnectError> {
    let mut refused = Vec::new();
    for (name, port) in &tunnels.forwards {
        if !connection.request_forward(name, *port).await? {
            refused.push(name.clone());
        }
    }
    Ok(refused)
}
