//! What the agent of a pod may run with.
//!
//! The agent is measured, what feeds it may not be. So it says in its hello of the Kubernetes phase which worker nodes it
//! lets in and where its tunnels lead, and the adaptor compares that with its own configuration before the agent gets a
//! client.

use std::collections::HashSet;
use std::fmt;

use secure_comms_keys::WorkerNodeKey;
use secure_comms_keys::text::one_line;
use secure_comms_protocol::tag::{Host, Tag};
use secure_comms_protocol::{
    AgentConfig, Bind, Hello, InboundTag, InitDataDigest, OutboundTag, PhaseName, PhaseSet, PodId, Target,
    TunnelName,
};

use crate::key_source::KeySource;
use crate::publication::Given;

/// Paths at which image and distributions have the kata agent's socket.
pub const KATA_AGENT_SOCKETS: [&str; 2] = ["/run/kata-agent/agent.sock", "/run/kata-containers/agent.sock"];

/// Most faults that are shown. An attested VM may be compromised, and name thousands of tunnels.
const FAULTS_MAX: usize = 8;
/// Longest quote of one text of the agent, in bytes.
const QUOTE_MAX: usize = 160;

/// The tunnels that the agents of all pods may have.
#[derive(Clone, Debug)]
pub struct AgentTunnels {
    /// Inbounds beyond the built-in `BOTH_PHASES:KBS:<any port>`, which a tag of the same name replaces.
    pub inbounds: Vec<InboundTag>,
    /// Outbounds beyond the built-in KATAAGENT, which a tag of the same name replaces.
    pub outbounds: Vec<OutboundTag>,
    /// Unix sockets to which the built-in KATAAGENT may lead.
    pub kata_agent_sockets: Vec<String>,
}

impl Default for AgentTunnels {
    /// The built-in tunnels alone.
    fn default() -> Self {
        let kata_agent_sockets = KATA_AGENT_SOCKETS.map(str::to_owned).to_vec();
        Self { inbounds: Vec::new(), outbounds: Vec::new(), kata_agent_sockets }
    }
}

/// What the agent of one pod may run with.
#[derive(Clone, Debug)]
pub(crate) struct ExpectedAgent {
    pub(crate) pod: PodId,
    /// Fingerprint of our own key.
    pub(crate) node: String,
    /// Fingerprints of the worker-node keys that the pod was given, ours included.
    pub(crate) given: Given,
    pub(crate) tunnels: AgentTunnels,
    /// Whether an agent that does not say what it runs with is accepted.
    pub(crate) old_agents: bool,
    /// Whether the agent has its keys from the KBS.
    pub(crate) attests: bool,
    /// The init-data that the VM was started with, if it is known.
    pub(crate) init_data: Option<InitDataDigest>,
}

/// An agent that is accepted, and what its operator should hear of.
pub(crate) type Warnings = Vec<String>;

/// The agent runs with what is not expected. The text names each difference, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Unexpected {
    faults: Vec<String>,
    more: usize,
}

impl fmt::Display for Unexpected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the agent is refused, no client was connected to it: {}", self.faults.join("; "))?;
        match self.more {
            0 => Ok(()),
            more => write!(f, "; and {more} more"),
        }
    }
}

/// Collects the differences, at most [`FAULTS_MAX`] of them.
#[derive(Default)]
struct Faults {
    shown: HashSet<String>,
    faults: Vec<String>,
    more: usize,
}

impl Faults {
    fn add(&mut self, fault: String) {
        if self.shown.contains(&fault) {
            return;
        }
        if self.faults.len() < FAULTS_MAX {
            self.shown.insert(fault.clone());
            self.faults.push(fault);
        } else {
            self.more += 1;
        }
    }
}

impl ExpectedAgent {
    /// What the configuration of an adaptor expects of a pod's agent.
    pub(crate) fn new(pod: &PodId, node: &WorkerNodeKey, given: &Given, tunnels: &AgentTunnels) -> Self {
        Self {
            pod: pod.clone(),
            node: node.fingerprint(),
            given: given.clone(),
            tunnels: tunnels.clone(),
            old_agents: false,
            attests: true,
            init_data: None,
        }
    }

    /// Accepts agents that do not say what they run with.
    pub(crate) fn with_old_agents(self, old_agents: bool) -> Self {
        Self { old_agents, ..self }
    }

    /// Where the agent has its keys from.
    pub(crate) fn with_keys_from<T>(self, source: &KeySource<T>) -> Self {
        Self { attests: source.attests(), ..self }
    }

    /// The init-data that the VM must have been started with.
    pub(crate) fn with_init_data(self, init_data: Option<InitDataDigest>) -> Self {
        Self { init_data, ..self }
    }

    /// Compares the agent's hello of the Kubernetes phase with what is expected. The agent must have proven that it has
    /// the pod's key.
    ///
    /// # Errors
    /// Every difference.
    pub(crate) fn check(&self, hello: &Hello) -> Result<Warnings, Unexpected> {
        let (mut faults, mut warnings) = (Faults::default(), Warnings::new());
        self.check_init_data(hello, &mut faults);
        match &hello.config {
            Some(config) => self.check_config(config, &mut faults, &mut warnings),
            None if self.old_agents => warnings.push(
                "the agent does not say what it runs with, which tunnels and which worker nodes; it is accepted \
                 because old agents are allowed (--allow-old-agents)"
                    .to_owned(),
            ),
            None => faults.add(
                "it does not say what it runs with: it is older than this adaptor: update the VM image, or accept it \
                 unchecked (--allow-old-agents)"
                    .to_owned(),
            ),
        }
        match faults {
            Faults { faults, more, .. } if !faults.is_empty() => Err(Unexpected { faults, more }),
            _ => Ok(warnings),
        }
    }

    fn check_init_data(&self, hello: &Hello, faults: &mut Faults) {
        let Some(expected) = &self.init_data else { return };
        match hello.init_data.as_deref() {
            Some(found) if found.eq_ignore_ascii_case(expected.as_str()) => {}
            Some(found) => faults.add(format!(
                "the VM was started with the init-data {}, expected {expected}: check --init-data, or make a new VM",
                quoted(found)
            )),
            None if hello.config.is_none() && self.old_agents => {}
            None => faults.add(format!(
                "it knows no digest of init-data, expected {expected}: check that the VM gets its init-data"
            )),
        }
    }

    fn check_config(&self, config: &AgentConfig, faults: &mut Faults, warnings: &mut Warnings) {
        if let Some(pod) = config.pod_id.as_deref().filter(|pod| *pod != self.pod.as_str()) {
            faults.add(format!("it has the keys of pod {}, expected {}", quoted(pod), self.pod));
        }
        self.check_worker_nodes(&config.worker_nodes, faults);
        for text in &config.inbounds {
            self.check_inbound(text, faults);
        }
        for text in &config.outbounds {
            self.check_outbound(text, faults);
        }
        match config.user_data.as_str() {
            "none" => {}
            "tunnels" | "all" if !self.attests => {}
            found @ ("tunnels" | "all") => warnings.push(format!(
                "the agent obeys user data that is not measured (-secure-comms-user-data {found}), which the cloud can \
                 write: set it to none in the VM image"
            )),
            found => faults.add(format!(
                "it obeys '{}' of its user data, expected none, tunnels or all: update this adaptor",
                quoted(found)
            )),
        }
    }

    fn check_worker_nodes(&self, found: &[String], faults: &mut Faults) {
        if !found.contains(&self.node) {
            faults.add(format!(
                "it does not let this worker node in again, whose key is {}: make a new VM",
                self.node
            ));
        }
        for key in found {
            if *key != self.node && !self.given.contains(key) {
                faults.add(format!(
                    "it lets in the worker-node key {}, which is not this node's: its holder can drive the pod; \
                     make a new VM, or if the key is right add it to --worker-node-keys",
                    quoted(key)
                ));
            }
        }
    }

    fn check_inbound(&self, text: &str, faults: &mut Faults) {
        let Some(tag) = parsed::<InboundTag>("inbound", text, faults) else { return };
        // In both phases.
        let is_built_in = |_| {
            let own_namespace = matches!(tag.bind, Bind::Tcp { namespace: None, .. });
            (tag.name == TunnelName::kbs()).then(|| (own_namespace, "BOTH_PHASES:KBS:<any port>".to_owned()))
        };
        let own = self.tunnels.inbounds.iter().filter(|own| own.name == tag.name);
        let own = own.map(|own| (own.phases, same_bind(&own.bind, &tag.bind), own.to_string()));
        let found = Found { kind: "inbound", flag: "--pp-inbounds", text, phases: tag.phases };
        found.compare(&own.collect::<Vec<_>>(), is_built_in, faults);
    }

    fn check_outbound(&self, text: &str, faults: &mut Faults) {
        let Some(tag) = parsed::<OutboundTag>("outbound", text, faults) else { return };
        let sockets = &self.tunnels.kata_agent_sockets;
        let is_built_in = |phase| {
            let expected = format!("KUBERNETES_PHASE:KATAAGENT:{}", sockets.join(" or "));
            let known = matches!(&tag.target, Target::Unix(path) if sockets.contains(path));
            let is_kata = tag.name == TunnelName::kata_agent() && phase == PhaseName::Kubernetes;
            is_kata.then_some((known, expected))
        };
        let own = self.tunnels.outbounds.iter().filter(|own| own.name == tag.name);
        let own = own.map(|own| (own.phases, same_target(&own.target, &tag.target), own.to_string()));
        let to_kata = tag.name == TunnelName::kata_agent() && matches!(tag.target, Target::Unix(_));
        let flag = if to_kata { "--kata-agent-socket" } else { "--pp-outbounds" };
        let found = Found { kind: "outbound", flag, text, phases: tag.phases };
        found.compare(&own.collect::<Vec<_>>(), is_built_in, faults);
    }
}

/// A tag of the agent.
struct Found<'a> {
    kind: &'static str,
    /// The flag that makes it expected.
    flag: &'static str,
    text: &'a str,
    phases: PhaseSet,
}

impl Found<'_> {
    /// Compares the tag in each of its phases: with the operator's tags of its name, else with the built-in one. Both are
    /// given as what they expect, and whether the agent's end is that.
    fn compare(
        &self,
        own: &[(PhaseSet, bool, String)],
        built_in: impl Fn(PhaseName) -> Option<(bool, String)>,
        faults: &mut Faults,
    ) {
        for phase in [PhaseName::Attestation, PhaseName::Kubernetes] {
            if !self.phases.includes(phase) {
                continue;
            }
            // An operator's tag replaces the built-in one, as it does at the agent.
            let own = own.iter().find(|(phases, ..)| phases.includes(phase));
            let expected = own.map(|(_, same, text)| (*same, text.clone())).or_else(|| built_in(phase));
            let expected = match expected {
                Some((true, _)) => continue,
                Some((false, expected)) => format!("expected {expected}"),
                None => "expected none of this name there".to_owned(),
            };
            faults.add(format!(
                "its {} {} is not expected in the {phase} phase: {expected}; if it is right, add it with {}",
                self.kind,
                quoted(self.text),
                self.flag
            ));
        }
    }
}

fn parsed<T: Tag>(kind: &str, text: &str, faults: &mut Faults) -> Option<T> {
    let parsed = T::parse(text);
    if parsed.is_err() {
        faults
            .add(format!("its {kind} {} is not a tag: update this adaptor, or make a new VM", quoted(text)));
    }
    parsed.ok()
}

/// Text of the agent: one line, cut, without anything that could forge a line.
fn quoted(text: &str) -> String {
    one_line(text, QUOTE_MAX)
}

/// Whether an agent listens where it is expected to. Port 0 stands for any port.
fn same_bind(expected: &Bind, found: &Bind) -> bool {
    match (expected, found) {
        (Bind::Unix(expected), Bind::Unix(found)) => expected == found,
        (Bind::Tcp { namespace: expected, port }, Bind::Tcp { namespace: found, port: at }) => {
            let path = |namespace: &Option<String>| namespace.as_deref().map(namespace_path);
            path(expected) == path(found) && (*port == 0 || port == at)
        }
        _ => false,
    }
}

fn namespace_path(namespace: &str) -> String {
    if namespace.starts_with('/') { namespace.to_owned() } else { format!("/run/netns/{namespace}") }
}

fn same_target(expected: &Target, found: &Target) -> bool {
    match (expected, found) {
        (
            Target::Tcp { host: Host::Name(expected), port },
            Target::Tcp { host: Host::Name(found), port: at },
        ) => expected.eq_ignore_ascii_case(found) && port == at,
        _ => expected == found,
    }
}

#[cfg(test)]
#[path = "expected_agent_tests.rs"]
mod tests;
