//! The tunnels of this end, and their partners at the other.

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
    /// With the port to ask for, which means nothing to the agent.
    pub(super) forwards: Vec<(TunnelName, u16)>,
    outbounds: Arc<Outbounds<P>>,
}

impl<P: Phase> Tunnels<P> {
    /// Those of the tags that exist in the phase.
    pub(crate) fn new(inbounds: &[InboundTag], outbounds: &[OutboundTag]) -> Self {
        let port = |target: &Target| match target {
            Target::Tcp { port, .. } => *port,
            Target::Unix(_) => 1,
        };
        Self {
            inbounds: here::<P, _>(inbounds).map(|tag| tag.name.clone()).collect(),
            forwards: here::<P, _>(outbounds).map(|tag| (tag.name.clone(), port(&tag.target))).collect(),
            outbounds: Arc::new(Outbounds::new(outbounds)),
        }
    }

    /// What streams of the agent may reach.
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

fn here<P: Phase, T: Tag>(tags: &[T]) -> impl Iterator<Item = &T> {
    tags.iter().filter(|tag| tag.phases().includes(P::NAME))
}

/// A line for each tunnel without a partner.
pub(super) fn unpartnered<P: Phase>(
    tunnels: &Tunnels<P>,
    agent: &Hello,
    refused: &[TunnelName],
) -> Vec<String> {
    // What is not a name can't be a partner.
    let names =
        |texts: &[String]| texts.iter().filter_map(|text| text.parse().ok()).collect::<Vec<TunnelName>>();
    let (inbounds, outbounds) = (names(&agent.inbounds), names(&agent.outbounds));
    let ours: Vec<TunnelName> = tunnels.forwards.iter().map(|(name, _)| name.clone()).collect();
    let mut lines = Vec::new();
    let mut missing = |have: &[TunnelName], partners: &[TunnelName], what: &str| {
        let alone = have.iter().filter(|name| !partners.contains(name));
        lines.extend(alone.map(|name| format!("tunnel {name}, {} phase: {what}", P::NAME)));
    };
    missing(&tunnels.inbounds, &outbounds, "our inbound has no outbound at the agent");
    missing(&ours, &inbounds, "our outbound has no inbound at the agent");
    missing(&inbounds, &ours, "the agent's inbound has no outbound here");
    missing(&outbounds, &tunnels.inbounds, "the agent's outbound has no inbound here");
    missing(refused, &[], "the agent refuses to forward it to us");
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
    fn a_tunnel_without_a_partner_is_named_on_either_side() {
        let texts = |names: &[&str]| names.iter().map(ToString::to_string).collect();
        let agent = Hello {
            inbounds: texts(&["kbs", "logs", "not a\nname"]),
            outbounds: texts(&["KATAAGENT", "y"]),
            ..Hello::default()
        };
        let expected = [
            "tunnel x, Kubernetes phase: our inbound has no outbound at the agent",
            "tunnel sock, Kubernetes phase: our outbound has no inbound at the agent",
            "tunnel logs, Kubernetes phase: the agent's inbound has no outbound here",
            "tunnel y, Kubernetes phase: the agent's outbound has no inbound here",
            "tunnel KBS, Kubernetes phase: the agent refuses to forward it to us",
        ];
        assert_eq!(unpartnered(&tunnels(), &agent, &[TunnelName::kbs()]), expected);
    }
}
