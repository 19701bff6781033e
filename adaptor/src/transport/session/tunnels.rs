//! The tunnels of this end in a phase, and how they match the agent's.

use std::sync::Arc;

use secure_comms_protocol::tag::Tag;
use secure_comms_protocol::{
    Hello, InboundTag, Mismatch, MismatchKind, OutboundTag, Phase, PodId, Target, TunnelName, TunnelNames,
};
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
        let names = TunnelNames {
            inbounds: self.inbounds.iter().map(ToString::to_string).collect(),
            outbounds: self.forwards.iter().map(|(name, _)| name.to_string()).collect(),
        };
        Hello::from_adaptor(pod, credit, names)
    }
}

fn in_phase<P: Phase, T: Tag>(tags: &[T]) -> impl Iterator<Item = &T> {
    tags.iter().filter(|tag| tag.phases().includes(P::NAME))
}

/// One line for each tunnel that only one end has.
pub(super) fn mismatches<P: Phase>(ours: &Hello, agent: &Hello, refused: &[TunnelName]) -> Vec<String> {
    let line = |name: &str, what| format!("tunnel {name}, {} phase: {what}", P::NAME);
    let mismatch = |Mismatch { kind, name }: Mismatch<'_>| {
        // The agent's text is untrusted. One that is not a tunnel name is left out.
        let name: TunnelName = name.parse().ok()?;
        let what = match kind {
            MismatchKind::OurInbound => "our inbound has no matching outbound on the agent",
            MismatchKind::OurOutbound => "our outbound has no matching inbound on the agent",
            MismatchKind::PeerInbound => "the agent listens for it, but no --outbounds tag here serves it",
            MismatchKind::PeerOutbound => "the agent serves it, but no --inbounds tag here listens for it",
        };
        Some(line(name.as_str(), what))
    };
    let mut lines: Vec<String> = ours.mismatches(agent, usize::MAX).filter_map(mismatch).collect();
    let refusal = |name: &TunnelName| line(name.as_str(), "the agent refuses to forward its streams");
    lines.extend(refused.iter().map(refusal));
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
        let ours = tunnels().hello(&"p1".parse().unwrap(), 5);
        assert_eq!(mismatches::<Kubernetes>(&ours, &agent, &[TunnelName::kbs()]), expected);
    }
}
