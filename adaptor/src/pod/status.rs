//! What callers learn about a pod: its state, its events, and the last error of a start.

use std::collections::BTreeSet;
use std::fmt;
use std::mem::discriminant;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use secure_comms_protocol::{InitDataDigest, KeyProgress, Lane, PhaseName, PodId, TunnelName};
use secure_comms_tunnel::Account;
use tokio::sync::watch;

use crate::address::Address;
use crate::store::Labels;
use crate::throttle::Throttle;
use crate::transport::ssh::Flag;

/// Where local clients of a tunnel connect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Name of the tunnel.
    pub name: TunnelName,
    /// `127.0.0.1:<port>`, or the path of a unix socket.
    pub local: String,
}

/// All that can be shown of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodSnapshot {
    /// The state of its channel.
    pub state: PodState,
    /// When the state became what it is, but for its details: the number of an attempt, or an error.
    pub since: SystemTime,
    /// What the caller named the pod's specification with.
    pub labels: Labels,
    /// The addresses of its VM; empty before a start.
    pub addresses: Vec<Address>,
    /// Where its local clients connect; empty while it is not served.
    pub endpoints: Vec<Endpoint>,
    /// Digest of the init-data that its VM must show; `None` if none is expected, or it is not served.
    pub init_data: Option<InitDataDigest>,
    /// The session with its agent; `None` if there is none, as with an agent that knows no sessions.
    pub session: Option<SessionStatus>,
}

/// A session with a pod's agent. Its streams go on over all its connections.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SessionStatus {
    /// The lanes that are connected.
    pub lanes: BTreeSet<Lane>,
    /// How often the main lane was connected again, and its streams went on.
    pub resumed: u64,
}

/// The state of a pod's channel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PodState {
    /// Nothing of the pod is served.
    NotPrepared,
    /// `prepare` is under way.
    Preparing,
    /// The keys are published and the inbounds listen. No connection is attempted yet.
    Prepared,
    /// Connecting.
    Connecting {
        /// Error of the last attempt; `None` before the first one ended.
        last_error: Option<String>,
    },
    /// Connected in the Attestation phase.
    Attesting {
        /// Number of the agent's last attempt to get its keys; 0 before the first one ended.
        attempt: u64,
        /// Error of that attempt; `None` if it succeeded or none has ended.
        last_error: Option<String>,
    },
    /// The agent has its keys. The adaptor reconnects for the Kubernetes phase.
    Upgrading,
    /// The Kubernetes phase is up.
    Up {
        /// The id that the agent's process gave itself; another value means that the agent restarted.
        instance: String,
    },
    /// The Kubernetes phase was up. The adaptor retries until it is up again.
    Down {
        /// Error of the last connection or attempt.
        reason: String,
    },
    /// `prepare` or the start failed, or the pod's task ended unexpectedly. No connection is attempted any more.
    Failed {
        /// Error that ended it.
        reason: String,
    },
    /// The pod is being ended: nothing of it is served, and its keys are being deleted from the KBS and the store. That is
    /// retried until it is done, over restarts.
    Ending {
        /// Error of the last attempt; `None` before the first one ended.
        last_error: Option<String>,
    },
    /// The caller stopped the pod's channel.
    Stopped,
}

/// Something that happened to a pod. Its text is one line, and fit for a log.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PodEvent {
    /// Connected in the Attestation phase.
    Attesting(SocketAddr),
    /// An attempt of the agent to get its keys ended.
    Keys(KeyProgress),
    /// The agent at this address says that it has its keys. The adaptor reconnects for the Kubernetes phase.
    Upgrade(SocketAddr),
    /// The Kubernetes phase is up at this address.
    Up(SocketAddr),
    /// The Kubernetes phase is up again, and the session's streams go on.
    Resumed {
        /// Where.
        address: SocketAddr,
        /// The time since the agent was heard before.
        after: Duration,
        /// The streams that go on.
        streams: usize,
    },
    /// A connection in this phase ended, and why. In a session, its streams wait for the next one.
    Down(PhaseName, String),
    /// The session is over, and why; its streams are reset.
    SessionOver(String),
    /// Connecting failed. Emitted when the failures start and when their cause changes; connecting is retried.
    ConnectFailed(String),
    /// One end has a tunnel that the other end has no matching tag for.
    TunnelMismatch(String),
    /// The agent in the VM logged a line for the operator.
    VmLog(VmLine),
    /// The caller stopped the pod's channel.
    Stopped,
    /// A caller waits, for longer than a second.
    Waiting {
        /// For what, with the last error if there was one.
        what: String,
        /// The time until its deadline; `None` if it has none.
        left: Option<Duration>,
    },
    /// The keys were published to the KBS.
    Published,
    /// The VM has its keys: they were deleted from the KBS, before the first local client is served.
    Withdrawn,
    /// They could not be deleted from the KBS. No local client is served until they are. Emitted when the failures start
    /// and when their cause changes.
    WithdrawFailed(String),
    /// The agent says that its VM has other init-data than is expected, so that it asks for its keys under another path.
    /// The agent is not proven: it is a hint.
    InitDataMismatch(String),
    /// The keys were published again, because the agent asked for them in vain or a second time.
    PublishedAgain,
    /// The pod has ended, and its keys could not be deleted; that is retried. Emitted when the failures start and when
    /// their cause changes.
    DeleteFailed(String),
    /// The pod's keys are deleted, after failures.
    Deleted,
    /// Publishing them again failed. Emitted when the failures start and when their cause changes.
    PublishFailed(String),
}

impl fmt::Display for PodEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Attesting(address) => write!(f, "attestation: connected to {address}"),
            Self::Keys(KeyProgress { attempt, error: None }) => {
                write!(f, "keys received (attempt {attempt})")
            }
            Self::Keys(KeyProgress { attempt, error: Some(error) }) => {
                write!(f, "keys: attempt {attempt}: {error}")
            }
            Self::Upgrade(address) => {
                write!(f, "attestation done at {address}; reconnecting for the Kubernetes phase")
            }
            Self::Up(address) => write!(f, "kubernetes phase up at {address}"),
            Self::Resumed { address, after, streams } => {
                let seconds = after.as_secs_f32();
                write!(f, "kubernetes phase up at {address} again after {seconds:.1} s")?;
                match streams {
                    0 => Ok(()),
                    1 => f.write_str("; 1 stream goes on"),
                    streams => write!(f, "; {streams} streams go on"),
                }
            }
            Self::SessionOver(why) => write!(f, "session over: {why}"),
            Self::Down(PhaseName::Kubernetes, why) => write!(f, "channel down: {why}"),
            Self::Down(PhaseName::Attestation, why) => write!(f, "attestation: connection ended: {why}"),
            Self::ConnectFailed(why) => write!(f, "connecting: {why}"),
            Self::TunnelMismatch(what) => f.write_str(what),
            Self::VmLog(line) => line.fmt(f),
            Self::Stopped => f.write_str("stopped"),
            Self::Waiting { what, left: None } => write!(f, "waiting for {what}"),
            Self::Waiting { what, left: Some(left) } => {
                write!(f, "waiting for {what} ({} s left)", left.as_secs())
            }
            Self::Published => f.write_str("keys published to the KBS"),
            Self::Withdrawn => f.write_str("the VM has its keys: deleted from the KBS"),
            Self::WithdrawFailed(why) => f.write_str(why),
            Self::InitDataMismatch(what) => f.write_str(what),
            Self::PublishedAgain => f.write_str("keys published to the KBS again"),
            Self::DeleteFailed(why) => {
                write!(f, "deleting the keys of the pod that has ended: {why}; retrying")
            }
            Self::Deleted => f.write_str("the keys of the pod that has ended are deleted"),
            Self::PublishFailed(why) => write!(f, "publishing the keys again: {why}"),
        }
    }
}

/// A line of the log of the agent in the VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmLine {
    /// Whether it is a warning or an error.
    pub is_warning: bool,
    /// One line, fit for a log.
    pub text: String,
    /// Its age when it arrived, in seconds.
    pub age: u64,
    /// Lines before it that the agent did not keep, or that were too many to show.
    pub missed: u64,
}

/// Age from which a line says how old it is, in seconds.
const OLD: u64 = 2;

impl fmt::Display for VmLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VM: {}", self.text)?;
        if self.age >= OLD {
            write!(f, " ({} s ago)", self.age)?;
        }
        match self.missed {
            0 => Ok(()),
            1 => f.write_str(" (1 line before it was left out)"),
            missed => write!(f, " ({missed} lines before it were left out)"),
        }
    }
}

/// Receives every event of every pod. It is called in the pod's task and must not block: while it does, the pod's
/// connection stands still. A panic in it ends the pod's task.
pub type Observer = Arc<dyn Fn(&PodId, &PodEvent) + Send + Sync>;

/// The last error of each kind that can keep a pod from coming up.
#[derive(Clone, Debug, Default)]
struct LastSeen {
    connected: bool,
    connecting: Option<String>,
    keys: Option<String>,
    publish: Option<String>,
    /// The agent says that it has other init-data than is expected.
    init_data: Option<String>,
}

impl fmt::Display for LastSeen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.connecting, &self.keys) {
            (None, None) if self.connected => {
                f.write_str("connected; the agent has not reported on its keys yet")
            }
            (None, None) => f.write_str("no answer yet"),
            (Some(connecting), None) => write!(f, "connecting: {connecting}"),
            (None, Some(keys)) => write!(f, "keys: {keys}"),
            (Some(connecting), Some(keys)) => write!(f, "connecting: {connecting}; keys: {keys}"),
        }?;
        self.init_data.as_ref().map_or(Ok(()), |init_data| write!(f, "; {init_data}"))
    }
}

/// Holds one pod's state and emits its events.
#[derive(Clone)]
pub(crate) struct StatusReporter {
    id: PodId,
    current: watch::Sender<PodSnapshot>,
    observer: Observer,
    seen: Arc<Mutex<LastSeen>>,
    throttles: Arc<Mutex<Throttles>>,
    answered: Flag,
    account: Account,
}

/// Limits of the events that an unproven peer can cause as often as it likes, by new connections or new texts.
#[derive(Debug)]
struct Throttles {
    keys: Throttle,
    connections: Throttle,
    failures: Throttle,
    mismatches: Throttle,
    /// What the network can cause: it may break each connection of a session as soon as that is there.
    lanes: Throttle,
    /// The same of lane `data`, which must not hide what becomes of the main one.
    data_lane: Throttle,
}

impl Default for Throttles {
    fn default() -> Self {
        Self {
            keys: Throttle::new(30),
            // Several for each connection.
            connections: Throttle::new(60),
            failures: Throttle::new(30),
            mismatches: Throttle::new(6),
            // Two for each connection of a lane.
            lanes: Throttle::new(60),
            data_lane: Throttle::new(60),
        }
    }
}

impl Throttles {
    fn of(&mut self, event: &PodEvent) -> Option<&mut Throttle> {
        match event {
            PodEvent::Keys(_) => Some(&mut self.keys),
            PodEvent::Attesting(_) | PodEvent::Upgrade(_) | PodEvent::Down(PhaseName::Attestation, _) => {
                Some(&mut self.connections)
            }
            PodEvent::ConnectFailed(_) => Some(&mut self.failures),
            PodEvent::TunnelMismatch(_) | PodEvent::InitDataMismatch(_) => Some(&mut self.mismatches),
            event if is_counted(event) => Some(&mut self.lanes),
            _ => None,
        }
    }
}

/// Whether observers count these events: they get each one, and only the log is limited.
fn is_counted(event: &PodEvent) -> bool {
    matches!(event, PodEvent::Down(PhaseName::Kubernetes, _) | PodEvent::Resumed { .. })
}

impl fmt::Debug for StatusReporter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StatusReporter")
            .field("id", &self.id)
            .field("current", &self.current)
            .finish_non_exhaustive()
    }
}

impl StatusReporter {
    pub(crate) fn new(id: PodId, observer: Observer) -> Self {
        let snapshot = PodSnapshot {
            state: PodState::NotPrepared,
            since: SystemTime::now(),
            labels: Labels::new(),
            addresses: Vec::new(),
            endpoints: Vec::new(),
            init_data: None,
            session: None,
        };
        Self {
            id,
            current: watch::Sender::new(snapshot),
            observer,
            seen: Arc::default(),
            throttles: Arc::default(),
            answered: Flag::default(),
            account: Account::unlimited(),
        }
    }

    /// The same pod, whose streams use this account.
    pub(crate) fn charged_to(self, account: Account) -> Self {
        Self { account, ..self }
    }

    /// What the pod's streams hold and move.
    pub(crate) fn account(&self) -> &Account {
        &self.account
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<PodSnapshot> {
        self.current.subscribe()
    }

    pub(crate) fn snapshot(&self) -> PodSnapshot {
        self.current.borrow().clone()
    }

    /// Whether an SSH server has answered at an address of the pod, in any of its starts.
    pub(crate) fn answered(&self) -> &Flag {
        &self.answered
    }

    pub(crate) fn set_state(&self, state: PodState) {
        self.current.send_if_modified(|current| {
            let changes = current.state != state;
            if discriminant(&current.state) != discriminant(&state) {
                current.since = SystemTime::now();
            }
            current.state = state;
            changes
        });
    }

    /// An agent that attests needs the keys: observers of the state see to their publication.
    pub(super) fn keys_needed(&self) {
        self.current.send_modify(|_| {});
    }

    /// The inbounds listen.
    pub(crate) fn prepared(&self, endpoints: Vec<Endpoint>) {
        self.current.send_modify(|current| {
            *current = PodSnapshot {
                state: PodState::Prepared,
                since: SystemTime::now(),
                endpoints,
                init_data: None,
                session: None,
                labels: std::mem::take(&mut current.labels),
                addresses: Vec::new(),
            };
        });
    }

    /// The pod has these labels.
    pub(crate) fn labelled(&self, labels: Labels) {
        self.current.send_modify(|current| current.labels = labels);
    }

    /// The pod's VM is at these addresses.
    pub(crate) fn located(&self, addresses: &[Address]) {
        self.current.send_modify(|current| current.addresses = addresses.to_vec());
    }

    /// The pod's VM must show this init-data.
    pub(crate) fn bound(&self, init_data: Option<InitDataDigest>) {
        self.current.send_modify(|current| current.init_data = init_data);
    }

    /// The inbounds are closed.
    pub(crate) fn closed(&self) {
        self.current.send_modify(|current| {
            current.endpoints.clear();
            current.init_data = None;
        });
    }

    /// The last errors, for a start that ran into its deadline.
    pub(crate) fn last_seen(&self) -> String {
        self.seen().to_string()
    }

    fn seen(&self) -> MutexGuard<'_, LastSeen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a line may be logged now. Says how many were not.
    fn may_log(&self, throttle: impl FnOnce(&mut Throttles) -> Option<&mut Throttle>) -> bool {
        let mut throttles = self.throttles.lock().unwrap_or_else(PoisonError::into_inner);
        let allowed = throttle(&mut throttles).map_or(Some(0), Throttle::allow);
        drop(throttles);
        if let Some(left_out @ 1..) = allowed {
            tracing::warn!("pod {}: {left_out} events like the next one were left out", self.id);
        }
        allowed.is_some()
    }

    /// Logs what has happened to lane `data`, unless there were too many such lines in this minute.
    pub(super) fn log_data_lane(&self, is_warning: bool, what: fmt::Arguments<'_>) {
        let id = &self.id;
        match (self.may_log(|throttles| Some(&mut throttles.data_lane)), is_warning) {
            (false, _) => tracing::debug!("pod {id}: lane data: {what}"),
            (true, false) => tracing::info!("pod {id}: lane data: {what}"),
            (true, true) => tracing::warn!("pod {id}: lane data: {what}"),
        }
    }

    /// Logs the event and hands it to the observer, unless there were too many of its kind in this minute.
    pub(crate) fn emit(&self, event: &PodEvent) {
        if !self.may_log(|throttles| throttles.of(event)) {
            tracing::debug!("pod {}: {event}", self.id);
            if is_counted(event) {
                (self.observer)(&self.id, event);
            }
            return;
        }
        match event {
            PodEvent::Down(..)
            | PodEvent::SessionOver(..)
            | PodEvent::ConnectFailed(..)
            | PodEvent::PublishFailed(..)
            | PodEvent::WithdrawFailed(..)
            | PodEvent::InitDataMismatch(..) => {
                tracing::warn!("pod {}: {event}", self.id)
            }
            PodEvent::Keys(KeyProgress { error: Some(_), .. }) => tracing::warn!("pod {}: {event}", self.id),
            PodEvent::VmLog(line) if line.is_warning => tracing::warn!("pod {}: {event}", self.id),
            _ => tracing::info!("pod {}: {event}", self.id),
        }
        (self.observer)(&self.id, event);
    }

    /// A start begins: the errors of an earlier one no longer count.
    pub(crate) fn begin(&self) {
        *self.seen() = LastSeen::default();
        self.set_state(PodState::Connecting { last_error: None });
    }

    /// Connecting failed. Emits an event when the failures start and when their cause changes.
    pub(super) fn connect_failed(&self, why: &str) {
        let before = self.seen().connecting.replace(why.to_owned());
        if before.as_deref() != Some(why) {
            self.emit(&PodEvent::ConnectFailed(why.to_owned()));
        }
    }

    /// While an address is connected: why the others are not.
    pub(super) fn others_failed(&self, why: Option<String>) {
        self.seen().connecting = why;
    }

    /// Connecting succeeded: earlier connect errors no longer count.
    pub(super) fn connected(&self) {
        let mut seen = self.seen();
        (seen.connected, seen.connecting) = (true, None);
    }

    pub(super) fn up(&self, address: SocketAddr, instance: String) {
        *self.seen() = LastSeen::default();
        self.set_state(PodState::Up { instance });
        self.emit(&PodEvent::Up(address));
    }

    /// The main lane of a session is connected again.
    pub(super) fn resumed(&self, address: SocketAddr, instance: String, after: Duration, streams: usize) {
        *self.seen() = LastSeen::default();
        self.session(|session| session.resumed += 1);
        self.set_state(PodState::Up { instance });
        self.emit(&PodEvent::Resumed { address, after, streams });
    }

    /// A lane of the session is connected, or is not any more.
    pub(super) fn lane(&self, lane: Lane, is_connected: bool) {
        self.session(|session| {
            if is_connected {
                session.lanes.insert(lane)
            } else {
                session.lanes.remove(&lane)
            };
        });
    }

    fn session(&self, change: impl FnOnce(&mut SessionStatus)) {
        self.current.send_modify(|current| change(current.session.get_or_insert_default()));
    }

    /// There is no session any more.
    pub(super) fn session_over(&self) {
        self.current.send_modify(|current| current.session = None);
    }

    /// A connection ended.
    pub(super) fn down(&self, phase: PhaseName, why: &str) {
        self.seen().connecting = Some(format!("the {phase} connection ended: {why}"));
        self.emit(&PodEvent::Down(phase, why.to_owned()));
    }

    /// An attempt of an agent to get its keys ended. Emits an event if it is news: when the failures at its address
    /// start, when their cause changes, and when they end.
    pub(super) fn keys(&self, keys: KeyProgress, news: bool) {
        self.seen().keys = keys.error.as_ref().map(|error| format!("attempt {}: {error}", keys.attempt));
        if news {
            self.emit(&PodEvent::Keys(keys));
        }
    }

    /// The key was deleted from the KBS: earlier failures to do so no longer count.
    pub(super) fn withdrawn(&self) {
        self.seen().connecting = None;
        self.emit(&PodEvent::Withdrawn);
    }

    /// The key could not be deleted from the KBS, so that no client is served.
    pub(super) fn withdraw_failed(&self, why: &str) {
        let before = self.seen().connecting.replace(why.to_owned());
        if before.as_deref() != Some(why) {
            self.emit(&PodEvent::WithdrawFailed(why.to_owned()));
        }
    }

    /// The state with the advice on the agent's init-data, which may be why it gets no keys.
    pub(super) fn with_init_data(&self, state: PodState) -> PodState {
        match (state, &self.seen().init_data) {
            (PodState::Attesting { attempt, last_error: Some(error) }, Some(hint)) => {
                PodState::Attesting { attempt, last_error: Some(format!("{error}; {hint}")) }
            }
            (state, _) => state,
        }
    }

    /// What an agent in the Attestation phase says of its init-data, if that is not what is expected.
    pub(super) fn init_data(&self, mismatch: Option<String>) {
        let before = std::mem::replace(&mut self.seen().init_data, mismatch.clone());
        if let Some(mismatch) = mismatch.filter(|mismatch| before.as_ref() != Some(mismatch)) {
            self.emit(&PodEvent::InitDataMismatch(mismatch));
        }
    }

    /// Publishing the keys again failed.
    pub(crate) fn publish_failed(&self, why: &str) {
        let before = self.seen().publish.replace(why.to_owned());
        if before.as_deref() != Some(why) {
            self.emit(&PodEvent::PublishFailed(why.to_owned()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn lines_of_lanes_are_limited_and_their_events_are_not() {
        let events = Arc::new(Mutex::new(0));
        let counted = Arc::clone(&events);
        let observer: Observer = Arc::new(move |_, _| *counted.lock().unwrap() += 1);
        let status = StatusReporter::new("p1".parse().unwrap(), observer);
        let logs = || status.may_log(|throttles| Some(&mut throttles.lanes));
        for _ in 0..29 {
            status.down(PhaseName::Kubernetes, "reset");
            status.resumed(([127, 0, 0, 1], 1).into(), "x".to_owned(), Duration::ZERO, 1);
        }
        for _ in 0..100 {
            status.log_data_lane(true, format_args!("reset"));
        }
        assert!(logs() && logs(), "those of lane data have a limit of their own");
        assert!(!logs());
        status.down(PhaseName::Kubernetes, "reset");
        assert_eq!(*events.lock().unwrap(), 59);
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert!(logs());
    }

    #[tokio::test(start_paused = true)]
    async fn an_unproven_peer_causes_a_bounded_number_of_events() {
        let events = Arc::new(Mutex::new(Vec::new()));
        let recorded = Arc::clone(&events);
        let observer: Observer = Arc::new(move |_, event| recorded.lock().unwrap().push(event.to_string()));
        let status = StatusReporter::new("p1".parse().unwrap(), observer);
        let keys = |n: u64| KeyProgress { attempt: n, error: Some(format!("no {n}")) };
        for n in 0..10_000 {
            status.emit(&PodEvent::Attesting(([127, 0, 0, 1], 1).into()));
            status.emit(&PodEvent::TunnelMismatch(format!("tunnel x{n}")));
            status.keys(keys(n), true);
            status.emit(&PodEvent::Upgrade(([127, 0, 0, 1], 1).into()));
            status.down(PhaseName::Attestation, &n.to_string());
            status.connect_failed(&n.to_string());
        }
        let emitted = events.lock().unwrap().len();
        assert!((100..200).contains(&emitted), "{emitted}");
        // The state is up to date all the same, and the events of a proven agent are not held back by a stranger's.
        assert!(status.last_seen().contains("9999"), "{}", status.last_seen());
        status.up(([127, 0, 0, 1], 1).into(), "x".to_owned());
        status.down(PhaseName::Kubernetes, "gone");
        assert_eq!(events.lock().unwrap().len(), emitted + 2);
        tokio::time::sleep(std::time::Duration::from_secs(60)).await;
        status.keys(keys(1), true);
        assert_eq!(events.lock().unwrap().last().unwrap(), "keys: attempt 1: no 1");
    }
}
