//! Who may come in now: the one place that decides, for every connection, from the phase the agent is in.
//!
//! ```text
//! Attestation -> Kubernetes, fresh (nobody has logged in) -> Kubernetes, latched (for the rest of this boot)
//! ```

use std::sync::{Mutex, MutexGuard, PoisonError};

use secure_comms_keys::{PodKeys, PublicKey, WorkerNodeKeys};
use secure_comms_protocol::PhaseName;
use tokio::sync::watch;

use crate::latch::LatchError;
use crate::ssh::Identity;

/// Who may attest: whoever connects, or only holders of a key that the VM was given beforehand.
#[derive(Clone, Debug)]
pub enum Attesters {
    /// Anyone: nothing is proven to either side.
    Anyone,
    /// Only who proves one of these keys.
    Holding(WorkerNodeKeys),
}

/// Keeps the keys for the rest of this boot; must not return before they are safe.
pub type Keep = Box<dyn Fn(&PodKeys) -> Result<(), LatchError> + Send + Sync>;

/// The state of the agent, as connections see it.
#[derive(Debug)]
enum State {
    Attestation { attesters: Attesters },
    Kubernetes { keys: PodKeys, standing: Standing },
}

#[derive(Debug)]
enum Standing {
    /// Nobody has logged in with these keys; if that lasts, attesters are let in again.
    Fresh { reopened: Option<Attesters> },
    /// Somebody has: these keys and no others.
    Latched,
}

/// What a new connection is served as. It holds as long as the generation does.
#[derive(Clone, Debug)]
pub struct Admission {
    /// Changes with the host key.
    pub generation: u64,
    /// The phase, for the banner.
    pub phase: PhaseName,
    /// The host key and the methods to offer.
    pub identity: Identity,
}

/// The agent has latched: no keys take the place of those in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AlreadyLatched;

/// The gate.
pub struct Gate {
    inner: Mutex<Inner>,
    latched: watch::Sender<bool>,
    keep: Keep,
    rekey_bytes: usize,
}

struct Inner {
    state: State,
    admission: Admission,
}

impl std::fmt::Debug for Gate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gate").field("state", &self.inner().state).finish_non_exhaustive()
    }
}

impl Gate {
    /// A gate in the Attestation phase; `identity` is a host key made for this process.
    pub fn attestation(identity: Identity, attesters: Attesters, keep: Keep, rekey_bytes: usize) -> Self {
        let admission = Admission { generation: 0, phase: PhaseName::Attestation, identity };
        Self::new(Inner { state: State::Attestation { attesters }, admission }, keep, rekey_bytes)
    }

    /// A gate in the Kubernetes phase from the start: the keys were latched earlier in this boot, or came by user data.
    pub fn kubernetes(keys: PodKeys, keep: Keep, rekey_bytes: usize) -> Self {
        let identity = Identity::new(PhaseName::Kubernetes, keys.pod_key().ssh(), rekey_bytes);
        let admission = Admission { generation: 0, phase: PhaseName::Kubernetes, identity };
        let gate = Self::new(
            Inner { state: State::Kubernetes { keys, standing: Standing::Latched }, admission },
            keep,
            rekey_bytes,
        );
        gate.latched.send_replace(true);
        gate
    }

    fn new(inner: Inner, keep: Keep, rekey_bytes: usize) -> Self {
        Self { inner: Mutex::new(inner), latched: watch::Sender::new(false), keep, rekey_bytes }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a connection that arrives now is served as.
    pub fn admission(&self) -> Admission {
        self.inner().admission.clone()
    }

    /// The phase the agent is in.
    pub fn phase(&self) -> PhaseName {
        self.inner().admission.phase
    }

    /// What the banner says: a hint for the other side, for before authentication it proves nothing.
    pub fn banner(&self) -> &'static str {
        match self.inner().state {
            State::Attestation { .. } => "Secure Comms agent in the Attestation phase\r\n",
            State::Kubernetes { standing: Standing::Fresh { .. }, .. } => {
                "Secure Comms agent in the Kubernetes phase, fresh\r\n"
            }
            State::Kubernetes { standing: Standing::Latched, .. } => {
                "Secure Comms agent in the Kubernetes phase, latched\r\n"
            }
        }
    }

    /// Whether a connection of this generation may attest without a key.
    pub fn attests_unproven(&self, generation: u64) -> bool {
        matches!(self.attesters(generation), Some(Attesters::Anyone))
    }

    /// Whether a connection of this generation may attest with this key.
    pub fn attests_with(&self, generation: u64, key: &PublicKey) -> bool {
        matches!(self.attesters(generation), Some(Attesters::Holding(keys)) if keys.matches(key))
    }

    /// Whether a connection of this generation may attest at all.
    pub fn attests(&self, generation: u64) -> bool {
        self.attesters(generation).is_some()
    }

    fn attesters(&self, generation: u64) -> Option<Attesters> {
        let inner = self.inner();
        match &inner.state {
            _ if inner.admission.generation != generation => None,
            State::Attestation { attesters } => Some(attesters.clone()),
            State::Kubernetes { standing: Standing::Fresh { reopened }, .. } => reopened.clone(),
            State::Kubernetes { standing: Standing::Latched, .. } => None,
        }
    }

    /// Whether this key would be let into the Kubernetes phase.
    pub fn would_log_in(&self, generation: u64, key: &PublicKey) -> bool {
        let inner = self.inner();
        inner.admission.generation == generation
            && matches!(&inner.state, State::Kubernetes { keys, .. } if keys.worker_node_keys().matches(key))
    }

    /// Lets the holder of this key, proven, into the Kubernetes phase; the first one latches.
    ///
    /// # Errors
    /// The keys could not be kept for this boot: then nobody gets in, for after a restart of this process anybody
    /// might attest again.
    pub fn log_in(&self, generation: u64, key: &PublicKey) -> Result<bool, LatchError> {
        let mut inner = self.inner();
        if inner.admission.generation != generation {
            return Ok(false);
        }
        let State::Kubernetes { keys, standing } = &mut inner.state else { return Ok(false) };
        if !keys.worker_node_keys().matches(key) {
            return Ok(false);
        }
        if matches!(standing, Standing::Fresh { .. }) {
            (self.keep)(keys)?;
            *standing = Standing::Latched;
            drop(inner);
            self.latched.send_replace(true);
        }
        Ok(true)
    }

    /// Enters the Kubernetes phase, fresh, with these keys (or better ones than before).
    ///
    /// # Errors
    /// Somebody has logged in meanwhile.
    pub fn open_kubernetes(&self, keys: PodKeys) -> Result<(), AlreadyLatched> {
        let mut inner = self.inner();
        if matches!(inner.state, State::Kubernetes { standing: Standing::Latched, .. }) {
            return Err(AlreadyLatched);
        }
        inner.admission = Admission {
            generation: inner.admission.generation + 1,
            phase: PhaseName::Kubernetes,
            identity: Identity::new(PhaseName::Kubernetes, keys.pod_key().ssh(), self.rekey_bytes),
        };
        inner.state = State::Kubernetes { keys, standing: Standing::Fresh { reopened: None } };
        Ok(())
    }

    /// Lets attesters in beside the Kubernetes user, until somebody logs in.
    ///
    /// # Errors
    /// Somebody has logged in meanwhile.
    pub fn reopen_attestation(&self, attesters: Attesters) -> Result<(), AlreadyLatched> {
        match &mut self.inner().state {
            State::Kubernetes { standing: Standing::Fresh { reopened }, .. } => {
                *reopened = Some(attesters);
                Ok(())
            }
            State::Kubernetes { standing: Standing::Latched, .. } => Err(AlreadyLatched),
            // Attesters are in anyway.
            State::Attestation { .. } => Ok(()),
        }
    }

    /// Waits until somebody has logged in.
    pub async fn latched(&self) {
        // The sender lives in self, so this ends by the value only.
        drop(self.latched.subscribe().wait_for(|latched| *latched).await);
    }
}
