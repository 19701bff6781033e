//! What is told about a pod: its state, its events, and what was last seen of it.

use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use secure_comms_protocol::{KeyProgress, PhaseName, PodId};
use tokio::sync::watch;

/// The state of a pod's channel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PodState {
    /// Its keys are published and its inbounds listen; nothing connects yet.
    Prepared,
    /// Connecting.
    Connecting {
        /// Why the last try failed.
        last_error: Option<String>,
    },
    /// Connected in the Attestation phase.
    Attesting {
        /// The agent's attempts to get its keys, so far.
        attempt: u64,
        /// Why the last one failed.
        last_error: Option<String>,
    },
    /// The agent has its keys; coming back in the Kubernetes phase.
    Upgrading,
    /// The Kubernetes phase is up.
    Up {
        /// The agent's process, as it names itself.
        instance: String,
    },
    /// The Kubernetes phase was up, and will be again.
    Down {
        /// Why it is not.
        reason: String,
    },
    /// The start failed; nothing connects any more.
    Failed {
        /// Why.
        reason: String,
    },
    /// Stopped from this side.
    Stopped,
}

/// What happens to a pod, for people and programs that follow it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PodEvent {
    /// Connected in the Attestation phase.
    Attesting(SocketAddr),
    /// The agent's attempt to get its keys ended.
    Keys(KeyProgress),
    /// The agent has its keys.
    Upgrade,
    /// The Kubernetes phase is up.
    Up(SocketAddr),
    /// A connection ended.
    Down(PhaseName, String),
    /// Connecting fails, and did not before or not for this reason.
    Failing(String),
    /// Something is set up differently at the two ends.
    Unpartnered(String),
    /// Stopped from this side.
    Stopped,
}

impl fmt::Display for PodEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Attesting(address) => write!(f, "attestation: connected to {address}"),
            Self::Keys(KeyProgress { attempt, error: None }) => {
                write!(f, "keys: attempt {attempt}: they are here")
            }
            Self::Keys(KeyProgress { attempt, error: Some(error) }) => {
                write!(f, "keys: attempt {attempt}: {error}")
            }
            Self::Upgrade => f.write_str("attestation: done, coming back as kubernetes"),
            Self::Up(address) => write!(f, "kubernetes phase up at {address}"),
            Self::Down(PhaseName::Kubernetes, why) => write!(f, "channel down: {why}"),
            Self::Down(PhaseName::Attestation, why) => write!(f, "attestation: connection ended: {why}"),
            Self::Failing(why) => write!(f, "connecting: {why}"),
            Self::Unpartnered(what) => f.write_str(what),
            Self::Stopped => f.write_str("stopped"),
        }
    }
}

/// Who is told of events; called in the pod's task, so it must not wait.
pub type Observer = Arc<dyn Fn(&PodId, &PodEvent) + Send + Sync>;

/// The last word on each thing that keeps a pod from coming up.
#[derive(Clone, Debug, Default)]
struct LastSeen {
    connected: bool,
    connecting: Option<String>,
    keys: Option<String>,
}

impl fmt::Display for LastSeen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.connecting, &self.keys) {
            (None, None) if self.connected => {
                f.write_str("connected, and the agent has not told of its keys yet")
            }
            (None, None) => f.write_str("no answer yet"),
            (Some(connecting), None) => write!(f, "connecting: {connecting}"),
            (None, Some(keys)) => write!(f, "keys: {keys}"),
            (Some(connecting), Some(keys)) => write!(f, "connecting: {connecting}; keys: {keys}"),
        }
    }
}

/// Tells of one pod.
#[derive(Clone)]
pub(crate) struct Report {
    id: PodId,
    state: watch::Sender<PodState>,
    observer: Observer,
    seen: Arc<Mutex<LastSeen>>,
}

impl fmt::Debug for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Report").field("id", &self.id).field("state", &self.state).finish_non_exhaustive()
    }
}

impl Report {
    pub(crate) fn new(id: PodId, observer: Observer) -> Self {
        Self { id, state: watch::Sender::new(PodState::Prepared), observer, seen: Arc::default() }
    }

    pub(crate) fn watch(&self) -> watch::Receiver<PodState> {
        self.state.subscribe()
    }

    pub(crate) fn state(&self, state: PodState) {
        self.state.send_replace(state);
    }

    /// What was last seen, for the error of a start that took too long.
    pub(crate) fn last_seen(&self) -> String {
        self.seen().to_string()
    }

    fn seen(&self) -> MutexGuard<'_, LastSeen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn event(&self, event: &PodEvent) {
        match event {
            PodEvent::Down(..) | PodEvent::Failing(..) => tracing::warn!("pod {}: {event}", self.id),
            PodEvent::Keys(KeyProgress { error: Some(_), .. }) => tracing::warn!("pod {}: {event}", self.id),
            _ => tracing::info!("pod {}: {event}", self.id),
        }
        (self.observer)(&self.id, event);
    }

    /// Connecting begins anew.
    pub(crate) fn begin(&self) {
        *self.seen() = LastSeen::default();
        self.state(PodState::Connecting { last_error: None });
    }

    /// Connecting has failed: told when it starts and when the reason changes.
    pub(super) fn failing(&self, why: &str) {
        let before = self.seen().connecting.replace(why.to_owned());
        if before.as_deref() != Some(why) {
            self.event(&PodEvent::Failing(why.to_owned()));
        }
    }

    /// Connecting has worked: what failed before is history.
    pub(super) fn connected(&self) {
        let mut seen = self.seen();
        (seen.connected, seen.connecting) = (true, None);
    }

    pub(super) fn up(&self, address: SocketAddr, instance: String) {
        *self.seen() = LastSeen::default();
        self.state(PodState::Up { instance });
        self.event(&PodEvent::Up(address));
    }

    /// A connection has ended.
    pub(super) fn down(&self, phase: PhaseName, why: &str) {
        self.seen().connecting = Some(format!("the {phase} connection ended: {why}"));
        self.event(&PodEvent::Down(phase, why.to_owned()));
    }

    pub(super) fn keys(&self, keys: KeyProgress) {
        let attempt = keys.attempt;
        self.seen().keys = keys.error.as_ref().map(|error| format!("attempt {attempt}: {error}"));
        self.state(PodState::Attesting { attempt, last_error: keys.error.clone() });
        self.event(&PodEvent::Keys(keys));
    }
}
