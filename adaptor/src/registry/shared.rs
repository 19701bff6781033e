//! What all pods of an adaptor have in common.

use std::fmt;
use std::sync::Arc;

use secure_comms_keys::WorkerNodeKeys;
use secure_comms_protocol::{InboundTag, OutboundTag};

use crate::kbs::KbsClient;
use crate::key_source::KeySource;
use crate::pod::{AgentTunnels, Observer};
use crate::store::Store;

/// What all pods of an adaptor have in common.
#[derive(Clone)]
pub struct Config {
    /// Inbounds of each pod, KATAAGENT included. All pods share the list, so a fixed port or path serves one pod only;
    /// `{pod}` in a unix path stands for the pod's id.
    pub inbounds: Vec<InboundTag>,
    /// Outbounds of each pod, KBS included.
    pub outbounds: Vec<OutboundTag>,
    /// Tunnels that the agent of each pod may have.
    pub agent: AgentTunnels,
    /// Worker nodes that may drive the pods besides this one: their keys are published with ours.
    pub worker_nodes: Option<WorkerNodeKeys>,
    /// Whether agents are accepted that do not say what they run with.
    pub old_agents: bool,
    /// Whether the streams to the outbound KBS are limited to the requests of an agent that attests.
    pub kbs_filter: bool,
    /// Bytes in one direction after which the session keys of a connection are renewed.
    pub rekey_bytes: usize,
    /// Receives every event of every pod.
    pub observer: Observer,
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Config")
            .field("inbounds", &self.inbounds)
            .field("outbounds", &self.outbounds)
            .finish_non_exhaustive()
    }
}

/// The store, the KBS and the configuration.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) store: Arc<dyn Store>,
    pub(super) key_source: KeySource<KbsClient>,
    pub(super) config: Config,
}
