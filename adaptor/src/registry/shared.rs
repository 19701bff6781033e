//! What all pods of an adaptor have in common.

use std::fmt;
use std::sync::Arc;

use secure_comms_keys::WorkerNodeKeys;
use secure_comms_protocol::limits::REKEY_BYTES;
use secure_comms_protocol::{InboundTag, InitDataDigest, OutboundTag, PodId};
use secure_comms_tunnel::MemoryBudget;

use super::retry::Retries;
use crate::kbs::KbsClient;
use crate::key_source::KeySource;
use crate::pod::{AgentTunnels, Observer};
use crate::publication::{Policy, Publication};
use crate::store::{Labels, Store};
use crate::transport::ssh::Admission;

/// A memory budget for some hundred pods, in bytes: one pod has at most half of it, which lets a window grow to the largest
/// that a stream may have; 250 pods that all want more than they can get have half a MiB each.
pub const MEMORY: usize = 128 * 1024 * 1024;

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
    /// Further worker nodes that may log in to the pods: their keys are published with ours.
    pub worker_nodes: Option<WorkerNodeKeys>,
    /// Whether agents before version 0.2 are served: their two separate resources are published as well, and an agent that
    /// does not say what it runs with is accepted.
    pub old_agents: bool,
    /// Whether the streams to the outbound KBS are limited to the requests of an agent that attests.
    pub kbs_filter: bool,
    /// Bytes in one direction after which the session keys of a connection are renewed.
    pub rekey_bytes: usize,
    /// Whether only post-quantum key exchange is offered and accepted, in both phases.
    pub require_pq: bool,
    /// Memory, in bytes, that the streams of all pods together may hold for slow readers, beyond the initial windows: 32 KiB
    /// for each open stream, and 256 KiB for each connection. [`MEMORY`] is a choice for some hundred pods.
    ///
    /// What a pod's session keeps until its agent has acknowledged it is not part of it: at most as much as the agent grants,
    /// and 96 MiB for each pod; beyond that the session ends.
    pub memory: usize,
    /// Receives every event of every pod.
    pub observer: Observer,
}

impl Config {
    /// Without tunnels, and otherwise with the defaults of the documents: the KBS filter, no older agents, both kinds of key
    /// exchange, [`REKEY_BYTES`] and [`MEMORY`].
    pub fn new(observer: Observer) -> Self {
        Self {
            inbounds: Vec::new(),
            outbounds: Vec::new(),
            agent: AgentTunnels::default(),
            worker_nodes: None,
            old_agents: false,
            kbs_filter: true,
            rekey_bytes: REKEY_BYTES,
            require_pq: false,
            memory: MEMORY,
            observer,
        }
    }
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Config")
            .field("inbounds", &self.inbounds)
            .field("outbounds", &self.outbounds)
            .finish_non_exhaustive()
    }
}

/// What is particular to one pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PodSpec {
    /// Digest of the init-data that the pod's VM is started with. The pod's keys are published under a path that names
    /// it, which a resource policy can bind to the VM's evidence. `None`: the path binds no VM.
    pub init_data: Option<InitDataDigest>,
    /// What the caller wants to find again with the pod, also after a restart. `None`: as before.
    pub labels: Option<Labels>,
}

impl PodSpec {
    /// A pod whose VM is started with init-data of this digest, if any.
    pub fn bound_to(init_data: Option<InitDataDigest>) -> Self {
        Self { init_data, labels: None }
    }

    /// The same pod with these labels in place of earlier ones.
    #[must_use]
    pub fn labelled(self, labels: Labels) -> Self {
        Self { labels: Some(labels), ..self }
    }
}

/// The store, the KBS and the configuration.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) store: Arc<dyn Store>,
    pub(super) key_source: KeySource<KbsClient>,
    pub(super) config: Config,
    pub(super) retries: Retries,
    pub(super) admission: Admission,
    pub(super) memory: MemoryBudget,
}

impl Shared {
    /// A pod's keys at the KBS; none if the VMs have their keys from user data.
    pub(super) fn publication(&self, id: &PodId) -> Option<Arc<Publication>> {
        let KeySource::Kbs(kbs) = &self.key_source else { return None };
        let (worker_nodes, old_agents) = (self.config.worker_nodes.clone(), self.config.old_agents);
        let policy = Policy { worker_nodes, old_agents };
        Some(Arc::new(Publication::new(id.clone(), Arc::clone(&self.store), kbs.clone(), policy)))
    }
}
