//! What a driver needs to know about its pod.

use std::sync::Arc;
use std::time::Duration;

use secure_comms_protocol::{Attestation, Kubernetes, PodId};

use super::expected_agent::ExpectedAgent;
use crate::address::Address;
use crate::key_source::KeySource;
use crate::transport::session::Tunnels;
use secure_comms_keys::{PodPublic, WorkerNodeKey};

/// [`AttestationLimits::progress`].
const ATTESTATION_PROGRESS: Duration = Duration::from_secs(3 * 60);
/// [`AttestationLimits::total`].
const ATTESTATION_TOTAL: Duration = Duration::from_secs(10 * 60);

/// The addresses, keys and tunnels of one pod.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) id: PodId,
    /// Never empty. The address that worked last comes first.
    pub(crate) addresses: Vec<Address>,
    pub(crate) node_key: WorkerNodeKey,
    pub(crate) pod_key: PodPublic,
    /// What the agent may run with.
    pub(crate) expected: Arc<ExpectedAgent>,
    /// For a VM that attests: the tunnels of the Attestation phase.
    pub(crate) attestation: KeySource<Tunnels<Attestation>>,
    pub(crate) kubernetes: Tunnels<Kubernetes>,
    /// Bytes in one direction after which the session keys are renewed.
    pub(crate) rekey_bytes: usize,
    pub(crate) attestation_limits: AttestationLimits,
}

/// How long a connection in the Attestation phase is kept. That phase authenticates neither
/// end, so a stranger at one address could hold the pod there, and no other address would be tried.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AttestationLimits {
    /// Without a report of the agent on its keys. It reports each attempt, and an attempt takes less than a minute.
    pub(crate) progress: Duration,
    /// Without the end of the phase, whatever the agent reports.
    pub(crate) total: Duration,
}

impl Default for AttestationLimits {
    fn default() -> Self {
        Self { progress: ATTESTATION_PROGRESS, total: ATTESTATION_TOTAL }
    }
}
