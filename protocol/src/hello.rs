//! The first control message of each end, and the tunnels that exist at one end only.

use alloc::string::{String, ToString};
use alloc::vec::Vec;

use serde::{Deserialize, Serialize};

use crate::limits::PROTOCOL_VERSION;
use crate::{PhaseName, PodId};

/// First control message of each end.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Hello {
    /// Version of the control protocol that the sender speaks.
    pub version: u32,
    /// Credit that the sender grants each new stream, in bytes. Without it streams have no credits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub credit: Option<u32>,
    /// Pod that the adaptor serves. Only the adaptor sends it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod_id: Option<String>,
    /// Lane that this connection is to be, in a session. Only the adaptor sends it, in the Kubernetes phase; without it the
    /// connection has no session.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lane: Option<String>,
    /// Id of the session that the connection is to join; none for a new session. Only the adaptor sends it, with a lane.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub session: Option<String>,
    /// Phase of the agent. Only the agent sends it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub phase: Option<PhaseName>,
    /// Random hex digits that identify the agent's process. Only the agent sends it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instance: Option<String>,
    /// Names of the sender's inbounds in this phase.
    pub inbounds: Vec<String>,
    /// Names of the sender's outbounds in this phase.
    pub outbounds: Vec<String>,
    /// First 64 hex digits of the digest of the VM's init-data. Only the agent sends it, if it knows them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init_data: Option<String>,
    /// The configuration that the agent runs with. Only the agent sends it, in the Kubernetes phase.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub config: Option<AgentConfig>,
}

/// What an agent runs with and lets in. The agent is measured, what feeds it may not be: so the adaptor compares this with
/// what it expects before it gives the agent a client.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct AgentConfig {
    /// Pod whose keys the agent has; none if the keys are from the user data.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod_id: Option<String>,
    /// SHA256 fingerprints of the worker-node keys that may log in.
    pub worker_nodes: Vec<String>,
    /// Tags of all inbounds, of both phases.
    pub inbounds: Vec<String>,
    /// Tags of all outbounds, of both phases.
    pub outbounds: Vec<String>,
    /// What user data may decide: `none`, `tunnels` or `all`.
    pub user_data: String,
}

/// Names of the tunnels of one end in one phase.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TunnelNames {
    /// Names of the inbounds.
    pub inbounds: Vec<String>,
    /// Names of the outbounds.
    pub outbounds: Vec<String>,
}

/// A tunnel that only one end has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mismatch<'a> {
    /// The list in which the name stands alone.
    pub kind: MismatchKind,
    /// Name of the tunnel. That of a peer may be any text.
    pub name: &'a str,
}

/// The end and the direction of a tunnel that only one end has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MismatchKind {
    /// Our inbound has no outbound at the peer.
    OurInbound,
    /// Our outbound has no inbound at the peer.
    OurOutbound,
    /// The peer's inbound has no outbound here.
    PeerInbound,
    /// The peer's outbound has no inbound here.
    PeerOutbound,
}

impl Hello {
    /// The agent's hello; `credit` is what it grants each new stream, in bytes.
    pub fn from_agent(phase: PhaseName, instance: &str, credit: u32, tunnels: TunnelNames) -> Self {
        let agent = Self { phase: Some(phase), instance: Some(instance.to_string()), ..Self::default() };
        agent.with(credit, tunnels)
    }

    /// The adaptor's hello; `credit` is what it grants each new stream, in bytes.
    pub fn from_adaptor(pod: &PodId, credit: u32, tunnels: TunnelNames) -> Self {
        Self { pod_id: Some(pod.to_string()), ..Self::default() }.with(credit, tunnels)
    }

    fn with(self, credit: u32, TunnelNames { inbounds, outbounds }: TunnelNames) -> Self {
        Self { version: PROTOCOL_VERSION, credit: Some(credit), inbounds, outbounds, ..self }
    }

    /// Tunnels that only one of this end and its `peer` has: our inbounds, our outbounds, then the peer's. Names are
    /// compared without regard to ASCII case. At most `limit` names of each list are looked up, because a peer may
    /// name thousands.
    pub fn mismatches<'a>(
        &'a self,
        peer: &'a Self,
        limit: usize,
    ) -> impl Iterator<Item = Mismatch<'a>> + use<'a> {
        let lists = [
            (MismatchKind::OurInbound, &self.inbounds, &peer.outbounds),
            (MismatchKind::OurOutbound, &self.outbounds, &peer.inbounds),
            (MismatchKind::PeerInbound, &peer.inbounds, &self.outbounds),
            (MismatchKind::PeerOutbound, &peer.outbounds, &self.inbounds),
        ];
        lists.into_iter().flat_map(move |(kind, names, others)| {
            let alone = |name: &&String| !others.iter().any(|other| other.eq_ignore_ascii_case(name));
            names.iter().take(limit).filter(alone).map(move |name| Mismatch { kind, name })
        })
    }
}
