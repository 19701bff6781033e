//! What callers learn about a pod: its state, its events, and the last error of a start.

use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use secure_comms_protocol::{KeyProgress, PhaseName, PodId};
use tokio::sync::watch;

/// The state of a pod's channel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PodState {
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
    /// The start failed. No connection is attempted any more.
    Failed {
        /// Error that ended the start.
        reason: String,
    },
    /// The caller stopped the pod's channel.
    Stopped,
}

/// Something that happened to a pod. Its text is one line, and fit for a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PodEvent {
    /// Connected in the Attestation phase.
    Attesting(SocketAddr),
    /// An attempt of the agent to get its keys ended.
    Keys(KeyProgress),
    /// The agent has its keys. The adaptor reconnects for the Kubernetes phase.
    Upgrade,
    /// The Kubernetes phase is up at this address.
    Up(SocketAddr),
    /// A connection in this phase ended, and why.
    Down(PhaseName, String),
    /// Connecting failed. Emitted when the failures start and when their cause changes; connecting is retried.
    ConnectFailed(String),
    /// One end has a tunnel that the other end has no matching tag for.
    TunnelMismatch(String),
    /// The agent in the VM logged a line for the operator.
    VmLog(VmLine),
    /// The caller stopped the pod's channel.
    Stopped,
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
            Self::Upgrade => f.write_str("attestation done; reconnecting for the Kubernetes phase"),
            Self::Up(address) => write!(f, "kubernetes phase up at {address}"),
            Self::Down(PhaseName::Kubernetes, why) => write!(f, "channel down: {why}"),
            Self::Down(PhaseName::Attestation, why) => write!(f, "attestation: connection ended: {why}"),
            Self::ConnectFailed(why) => write!(f, "connecting: {why}"),
            Self::TunnelMismatch(what) => f.write_str(what),
            Self::VmLog(line) => line.fmt(f),
            Self::Stopped => f.write_str("stopped"),
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
/// connection stands still.
pub type Observer = Arc<dyn Fn(&PodId, &PodEvent) + Send + Sync>;

/// The last error of each kind that can keep a pod from coming up.
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
                f.write_str("connected; the agent has not reported on its keys yet")
            }
            (None, None) => f.write_str("no answer yet"),
            (Some(connecting), None) => write!(f, "connecting: {connecting}"),
            (None, Some(keys)) => write!(f, "keys: {keys}"),
            (Some(connecting), Some(keys)) => write!(f, "connecting: {connecting}; keys: {keys}"),
        }
    }
}

/// Holds one pod's state and emits its events.
#[derive(Clone)]
pub(crate) struct StatusReporter {
    id: PodId,
    state: watch::Sender<PodState>,
    observer: Observer,
    seen: Arc<Mutex<LastSeen>>,
}

impl fmt::Debug for StatusReporter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StatusReporter")
            .field("id", &self.id)
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

impl StatusReporter {
    pub(crate) fn new(id: PodId, observer: Observer) -> Self {
        Self { id, state: watch::Sender::new(PodState::Prepared), observer, seen: Arc::default() }
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<PodState> {
        self.state.subscribe()
    }

    pub(crate) fn set_state(&self, state: PodState) {
        self.state.send_replace(state);
    }

    /// The last errors, for a start that ran into its deadline.
    pub(crate) fn last_seen(&self) -> String {
        self.seen().to_string()
    }

    fn seen(&self) -> MutexGuard<'_, LastSeen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn emit(&self, event: &PodEvent) {
        match event {
            PodEvent::Down(..) | PodEvent::ConnectFailed(..) => tracing::warn!("pod {}: {event}", self.id),
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

    /// A connection ended.
    pub(super) fn down(&self, phase: PhaseName, why: &str) {
        self.seen().connecting = Some(format!("the {phase} connection ended: {why}"));
        self.emit(&PodEvent::Down(phase, why.to_owned()));
    }

    pub(super) fn keys(&self, keys: KeyProgress) {
        let attempt = keys.attempt;
        self.seen().keys = keys.error.as_ref().map(|error| format!("attempt {attempt}: {error}"));
        self.set_state(PodState::Attesting { attempt, last_error: keys.error.clone() });
        self.emit(&PodEvent::Keys(keys));
    }
}
