//! The tunnels of this end in a phase, and how they match the agent's.

use std::sync::Arc;

use secure_comms_protocol::control::Hello;
use secure_comms_protocol::limits::PROTOCOL_VERSION;
use secure_comms_protocol::tag::Tag;
use secure_comms_protocol::{InboundTag, OutboundTag, Phase, PodId, Target, TunnelName};
use secure_comms_tunnel::Outbounds;

/// The tunnels of this end in a phase.
#[derive(Clone, Debug)]
pub(crate) struct Tunnels<P> {
    inbounds: Vec<TunnelName>,
    /// Names of the local outbounds, with the port to request; the agent ignores the port.
    pub(super) forwards: Vec<(TunnelName, u16)>,
    outbounds: Arc<Outbounds<P>>,
}

impl<P: Phase> Tunnels<P> {
    /// Selects the tags of the phase.
    pub(crate) fn new(inbounds: &[InboundTag], outbounds: &[OutboundTag]) -> Self {
        let port = |target: &Target| match target {
            Target::Tcp { port, .. } => *port,
            Target::Unix(_) => 1,
        };
        Self {
            inbounds: in_phase::<P, _>(inbounds).map(|tag| tag.name.clone()).collect(),
            forwards: in_phase::<P, _>(outbounds).map(|tag| (tag.name.clone(), port(&tag.target))).collect(),
            outbounds: Arc::new(Outbounds::new(outbounds)),
        }
    }

    /// The targets that the agent's streams may reach.
    pub(crate) fn outbounds(&self) -> Arc<Outbounds<P>> {
        Arc::clone(&self.outbounds)
    }

    pub(super) fn hello(&self, pod: &PodId, credit: u32) -> Hello {
        Hello {
            version: PROTOCOL_VERSION,
            credit: Some(credit),
            pod_id: Some(pod.to_string()),
            inbounds: self.inbounds.iter().map(ToString::to_string).collect(),
            outbounds: self.forwards.iter().map(|(name, _)| name.to_string()).collect(),
            ..Hello::default()
        }
    }
}

fn in_phase<P: Phase, T: Tag>(tags: &[T]) -> impl Iterator<Item = &T> {
    tags.iter().filter(|tag| tag.phases().includes(P::NAME))
}

/// One line for each tunnel that only one end has.
pub(super) fn mismatches<P: Phase>(
    tunnels: &Tunnels<P>,
    agent: &Hello,
    refused: &[TunnelName],
) -> Vec<String> {
    // A text that is not a valid name cannot match a tunnel of ours.
    let names =
        |texts: &[String]| texts.iter().filter_map(|text| text.parse().ok()).collect::<Vec<TunnelName>>();
    let (inbounds, outbounds) = (names(&agent.inbounds), names(&agent.outbounds));
    let ours: Vec<TunnelName> = tunnels.forwards.iter().map(|(name, _)| name.clone()).collect();
    let mut lines = Vec::new();
    let mut missing = |have: &[TunnelName], others: &[TunnelName], what: &str| {
        let alone = have.iter().filter(|name| !others.contains(name));
        lines.extend(alone.map(|name| format!("tunnel {name}, {} phase: {what}", P::NAME)));
    };
    missing(&tunnels.inbounds, &outbounds, "our inbound has no matching outbound on the agent");
    missing(&ours, &inbounds, "our outbound has no matching inbound on the agent");
    missing(&inbounds, &ours, "the agent listens for it, but no --outbounds tag here serves it");
    missing(&outbounds, &tunnels.inbounds, "the agent serves it, but no --inbounds tag here listens for it");
    missing(refused, &[], "the agent refuses to forward its streams");
    lines
}

#[cfg(test)]
mod tests {
    use secure_comms_protocol::Kubernetes;
    use secure_comms_protocol::tag::parse_list;

    use super::*;

    fn tunnels() -> Tunnels<Kubernetes> {
        let inbounds = parse_list("KUBERNETES_PHASE:KATAAGENT:0,KUBERNETES_PHASE:x:0,ATTESTATION_PHASE:no:0");
        let outbounds = parse_list("BOTH_PHASES:KBS:kbs:8080,KUBERNETES_PHASE:sock:/run/s");
        Tunnels::new(&inbounds.unwrap(), &outbounds.unwrap())
    }

    #[test]
    fn the_hello_names_the_tunnels_of_its_phase() {
        let hello = tunnels().hello(&"p1".parse().unwrap(), 5);
        assert_eq!(hello.inbounds, ["KATAAGENT", "x"]);
        assert_eq!(hello.outbounds, ["KBS", "sock"]);
        assert_eq!((hello.pod_id.as_deref(), hello.credit), (Some("p1"), Some(5)));
    }

    #[test]
    fn a_tunnel_without_a_match_is_named_on_either_side() {
        let texts = |names: &[&str]| names.iter().map(ToString::to_string).collect();
        let agent = Hello {
            inbounds: texts(&["kbs", "logs", "not a\nname"]),
            outbounds: texts(&["KATAAGENT", "y"]),
            ..Hello::default()
        };
        let expected = [
            "tunnel x, Kubernetes phase: our inbound has no matching outbound on the agent",
            "tunnel sock, Kubernetes phase: our outbound has no matching inbound on the agent",
            "tunnel logs, Kubernetes phase: the agent listens for it, but no --outbounds tag here serves it",
            "tunnel y, Kubernetes phase: the agent serves it, but no --inbounds tag here listens for it",
            "tunnel KBS, Kubernetes phase: the agent refuses to forward its streams",
        ];
        assert_eq!(mismatches(&tunnels(), &agent, &[TunnelName::kbs()]), expected);
    }
}
