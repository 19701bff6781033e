//! The access policy: who may come in now. The one place that decides for every connection, by the phase of the agent.
//!
//! ```text
//! Attestation -> Kubernetes, fresh (no login yet) -> Kubernetes, latched (until the VM reboots)
//! ```

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use secure_comms_keys::PrivateKey;
use secure_comms_keys::{PodKeys, PublicKey, WorkerNodeKeys};
use secure_comms_protocol::{Banner, LoginState, PhaseName};
use tokio::sync::watch;

use super::latch::LatchError;

/// Who may connect for attestation.
#[derive(Clone, Debug)]
pub(crate) enum Attesters {
    /// Every client: neither end is authenticated.
    Anyone,
    /// Clients that prove one of these keys, which the VM got with its user data.
    Holding(WorkerNodeKeys),
}

/// Stores the keys until the VM reboots. Must not return before they are stored.
pub(crate) type PersistKeys = Box<dyn Fn(&PodKeys) -> Result<(), LatchError> + Send + Sync>;

/// The state of the agent, as connections see it.
#[derive(Debug)]
enum State {
    Attestation { attesters: Attesters },
    Kubernetes { keys: PodKeys, login: Login },
}

#[derive(Debug)]
enum Login {
    /// No worker node has logged in with these keys. `reopened`: who may attest again, because none has for long.
    Fresh { reopened: Option<Attesters> },
    /// A worker node has logged in: these keys and no others are accepted.
    Latched,
}

/// How a new connection is served. Valid as long as the generation is.
#[derive(Clone, Debug)]
pub(crate) struct Admission {
    /// Counts the host keys of this process.
    pub(crate) generation: u64,
    /// The phase, which the banner and the authentication methods depend on.
    pub(crate) phase: PhaseName,
    /// The host key to show.
    pub(crate) host_key: Arc<PrivateKey>,
}

/// The agent has latched: the keys in use can't be replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AlreadyLatched;

/// Decides who may come in.
pub(crate) struct AccessPolicy {
    inner: Mutex<Inner>,
    latched: watch::Sender<bool>,
    persist: PersistKeys,
}

struct Inner {
    state: State,
    admission: Admission,
}

impl std::fmt::Debug for AccessPolicy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AccessPolicy").field("state", &self.inner().state).finish_non_exhaustive()
    }
}

impl AccessPolicy {
    /// Fingerprints of the worker nodes that may log in; none in the Attestation phase.
    pub(crate) fn worker_nodes(&self) -> Vec<String> {
        match &self.inner().state {
            State::Attestation { .. } => Vec::new(),
            State::Kubernetes { keys, .. } => keys.worker_node_keys().fingerprints().collect(),
        }
    }

    /// The policy of the Attestation phase; `host_key` was made for this process.
    pub(crate) fn attestation(host_key: Arc<PrivateKey>, attesters: Attesters, persist: PersistKeys) -> Self {
        Self::new(State::Attestation { attesters }, PhaseName::Attestation, host_key, persist)
    }

    /// The policy of an agent that starts in the Kubernetes phase: the keys were latched earlier in this boot, or are in
    /// the user data.
    pub(crate) fn kubernetes(keys: PodKeys, persist: PersistKeys) -> Self {
        let host_key = keys.pod_key().ssh();
        let state = State::Kubernetes { keys, login: Login::Latched };
        let policy = Self::new(state, PhaseName::Kubernetes, host_key, persist);
        policy.latched.send_replace(true);
        policy
    }

    fn new(state: State, phase: PhaseName, host_key: Arc<PrivateKey>, persist: PersistKeys) -> Self {
        let admission = Admission { generation: 0, phase, host_key };
        let inner = Mutex::new(Inner { state, admission });
        Self { inner, latched: watch::Sender::new(false), persist }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How a connection that arrives now is served.
    pub(crate) fn admission(&self) -> Admission {
        self.inner().admission.clone()
    }

    /// The phase of the agent.
    pub(crate) fn phase(&self) -> PhaseName {
        self.inner().admission.phase
    }

    /// The banner to send. A hint for the client, not proof: the agent is not authenticated yet.
    pub(crate) fn banner(&self) -> Banner {
        match self.inner().state {
            State::Attestation { .. } => Banner::Attestation,
            State::Kubernetes { login: Login::Fresh { .. }, .. } => Banner::Kubernetes(LoginState::Fresh),
            State::Kubernetes { login: Login::Latched, .. } => Banner::Kubernetes(LoginState::Latched),
        }
    }

    /// Whether a connection of this generation may attest without a key.
    pub(crate) fn allows_anonymous_attestation(&self, generation: u64) -> bool {
        matches!(self.attesters(generation), Some(Attesters::Anyone))
    }

    /// Whether a connection of this generation may attest with this key.
    pub(crate) fn allows_attestation_with(&self, generation: u64, key: &PublicKey) -> bool {
        matches!(self.attesters(generation), Some(Attesters::Holding(keys)) if keys.matches(key))
    }

    /// Whether a connection of this generation may attest at all.
    pub(crate) fn allows_attestation(&self, generation: u64) -> bool {
        self.attesters(generation).is_some()
    }

    fn attesters(&self, generation: u64) -> Option<Attesters> {
        let inner = self.inner();
        match &inner.state {
            _ if inner.admission.generation != generation => None,
            State::Attestation { attesters } => Some(attesters.clone()),
            State::Kubernetes { login: Login::Fresh { reopened }, .. } => reopened.clone(),
            State::Kubernetes { login: Login::Latched, .. } => None,
        }
    }

    /// Whether a connection of this generation could log in to the Kubernetes phase with this key.
    pub(crate) fn allows_login_with(&self, generation: u64, key: &PublicKey) -> bool {
        let inner = self.inner();
        inner.admission.generation == generation
            && matches!(&inner.state, State::Kubernetes { keys, .. } if keys.worker_node_keys().matches(key))
    }

    /// Logs the holder of this key in to the Kubernetes phase. The first login latches the keys. `Ok(false)`: the key is
    /// not one of the worker node's, or the connection is of an older generation.
    ///
    /// # Errors
    /// The keys could not be stored. The login is refused then: after a restart the agent would attest again, and any
    /// client could take part.
    pub(crate) fn log_in(&self, generation: u64, key: &PublicKey) -> Result<bool, LatchError> {
        let mut inner = self.inner();
        if inner.admission.generation != generation {
            return Ok(false);
        }
        let State::Kubernetes { keys, login } = &mut inner.state else { return Ok(false) };
        if !keys.worker_node_keys().matches(key) {
            return Ok(false);
        }
        if matches!(login, Login::Fresh { .. }) {
            (self.persist)(keys)?;
            *login = Login::Latched;
            drop(inner);
            self.latched.send_replace(true);
        }
        Ok(true)
    }

    /// Enters the Kubernetes phase, fresh, with these keys. Replaces keys with which no worker node has logged in.
    ///
    /// # Errors
    /// A worker node has logged in.
    pub(crate) fn open_kubernetes(&self, keys: PodKeys) -> Result<(), AlreadyLatched> {
        let mut inner = self.inner();
        if matches!(inner.state, State::Kubernetes { login: Login::Latched, .. }) {
            return Err(AlreadyLatched);
        }
        inner.admission = Admission {
            generation: inner.admission.generation + 1,
            phase: PhaseName::Kubernetes,
            host_key: keys.pod_key().ssh(),
        };
        inner.state = State::Kubernetes { keys, login: Login::Fresh { reopened: None } };
        Ok(())
    }

    /// Allows attestation in parallel with the Kubernetes phase, until a worker node logs in.
    ///
    /// # Errors
    /// A worker node has logged in.
    pub(crate) fn reopen_attestation(&self, attesters: Attesters) -> Result<(), AlreadyLatched> {
        match &mut self.inner().state {
            State::Kubernetes { login: Login::Fresh { reopened }, .. } => {
                *reopened = Some(attesters);
                Ok(())
            }
            State::Kubernetes { login: Login::Latched, .. } => Err(AlreadyLatched),
            // Attestation is open already.
            State::Attestation { .. } => Ok(()),
        }
    }

    /// Waits until a worker node has logged in.
    pub(crate) async fn until_latched(&self) {
        // The sender lives in self, so this ends by the value only.
        drop(self.latched.subscribe().wait_for(|latched| *latched).await);
    }
}
