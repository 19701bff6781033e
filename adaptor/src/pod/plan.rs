//! What a driver needs to know about its pod.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use secure_comms_protocol::tag::Host;
use secure_comms_protocol::{Attestation, Kubernetes, PodId, SessionId};
use secure_comms_ssh::profile::KeyExchange;
use secure_comms_tunnel::Account;

use super::expected_agent::ExpectedAgent;
use super::lost_vm::LostLimits;
use crate::address::Address;
use crate::key_source::KeySource;
use crate::publication::Publication;
use crate::transport::agent_connection::Tunnels;
use crate::transport::ssh::{Admission, Flag};
use secure_comms_keys::{PodPublic, WorkerNodeKey};

/// [`LaneLimits::silence`].
const LANE_SILENCE: Duration = Duration::from_millis(750);
/// [`LaneLimits::idle`].
const LANE_IDLE: Duration = Duration::from_secs(60);

/// [`AttestationLimits::progress`].
const ATTESTATION_PROGRESS: Duration = Duration::from_secs(3 * 60);
/// [`AttestationLimits::total`].
const ATTESTATION_TOTAL: Duration = Duration::from_secs(10 * 60);
/// [`AttestationLimits::share`]: most agents get their keys within some seconds. One that takes longer goes on when its
/// address has a slot again.
const ATTESTATION_SHARE: Duration = Duration::from_secs(30);

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
    /// The pod's keys at the KBS; none if the VM has its keys from user data.
    pub(crate) publication: Option<Arc<Publication>>,
    /// For a VM that attests: the tunnels of the Attestation phase.
    pub(crate) attestation: KeySource<Tunnels<Attestation>>,
    pub(crate) kubernetes: Tunnels<Kubernetes>,
    /// Bytes in one direction after which the session keys are renewed.
    pub(crate) rekey_bytes: usize,
    /// Which key exchange is offered and accepted.
    pub(crate) kex: KeyExchange,
    /// The key exchanges of all pods.
    pub(crate) admission: Admission,
    pub(crate) attestation_limits: AttestationLimits,
    /// When a start fails because the VM is lost.
    pub(crate) lost_limits: LostLimits,
    /// When a lane of a session is silent, and when it is not needed.
    pub(crate) lane_limits: LaneLimits,
    /// Learns of an SSH server at one of the addresses.
    pub(crate) answered: Flag,
    /// What the pod's streams hold and move.
    pub(crate) account: Account,
    /// The session that the next connection in the Kubernetes phase is to resume; none to begin one.
    pub(crate) session: Option<SessionId>,
}

impl Plan {
    /// The same plan for one socket address only.
    pub(crate) fn at(&self, address: SocketAddr) -> Self {
        let only = Address { host: Host::Ip(address.ip()), port: address.port() };
        Self { addresses: vec![only], ..self.clone() }
    }
}

/// How long a connection in the Attestation phase is kept. That phase authenticates neither end: a stranger could hold
/// the pod's only address for as long as it answers pings, while the agent there has its keys already.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AttestationLimits {
    /// Without a report of the agent on its keys. It reports each attempt, and an attempt takes less than a minute.
    pub(crate) progress: Duration,
    /// Without the end of the phase, whatever the agent reports.
    pub(crate) total: Duration,
    /// While another address waits for a slot.
    pub(crate) share: Duration,
}

impl Default for AttestationLimits {
    fn default() -> Self {
        Self { progress: ATTESTATION_PROGRESS, total: ATTESTATION_TOTAL, share: ATTESTATION_SHARE }
    }
}

/// How long a lane of a session may be silent, or without use.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LaneLimits {
    /// A lane is silent if nothing arrives for this long although the agent owes an answer; and for some round trips.
    pub(crate) silence: Duration,
    /// The time without a stream after which lane `data` is closed.
    pub(crate) idle: Duration,
}

impl Default for LaneLimits {
    fn default() -> Self {
        Self { silence: LANE_SILENCE, idle: LANE_IDLE }
    }
}
