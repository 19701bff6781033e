//! What a driver needs to know about its pod.

use secure_comms_protocol::{Attestation, Kubernetes, PodId};

use crate::address::Address;
use crate::key_source::KeySource;
use crate::transport::session::Tunnels;
use secure_comms_keys::{PodPublic, WorkerNodeKey};

/// The addresses, keys and tunnels of one pod.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) id: PodId,
    /// Never empty. The address that worked last comes first.
    pub(crate) addresses: Vec<Address>,
    pub(crate) node_key: WorkerNodeKey,
    pub(crate) pod_key: PodPublic,
    /// For a VM that attests: the tunnels of the Attestation phase.
    pub(crate) attestation: KeySource<Tunnels<Attestation>>,
    pub(crate) kubernetes: Tunnels<Kubernetes>,
    /// Bytes in one direction after which the session keys are renewed.
    pub(crate) rekey_bytes: usize,
}
