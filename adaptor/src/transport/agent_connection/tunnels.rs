//! The tunnels of this end in a phase, and how they match the agent's.

use std::collections::HashSet;
use std::sync::Arc;

use secure_comms_protocol::tag::Tag;
use secure_comms_protocol::{
    Hello, InboundTag, Mismatch, MismatchKind, OutboundTag, Phase, PodId, Target, TunnelName, TunnelNames,
};
use secure_comms_tunnel::Outbounds;

use crate::transport::kbs_filter::KbsFilter;

/// The tunnels of this end in a phase.
#[derive(Clone, Debug)]
pub(crate) struct Tunnels<P> {
    inbounds: Vec<TunnelName>,
    /// Names of the local outbounds, with the port to request; the agent ignores the port.
    pub(super) forwards: Vec<(TunnelName, u16)>,
    outbounds: Arc<Outbounds<P, KbsFilter>>,
}

impl<P: Phase> Tunnels<P> {
    /// Selects the tags of the phase. `kbs_filter`: only the requests of an attesting agent reach the outbound KBS.
    pub(crate) fn new(inbounds: &[InboundTag], outbounds: &[OutboundTag], kbs_filter: bool) -> Self {
        let port = |target: &Target| match target {
            Target::Tcp { port, .. } => *port,
            Target::Unix(_) => 1,
        };
        Self {
            inbounds: in_phase::<P, _>(inbounds).map(|tag| tag.name.clone()).collect(),
            forwards: in_phase::<P, _>(outbounds).map(|tag| (tag.name.clone(), port(&tag.target))).collect(),
            outbounds: Arc::new(
                Outbounds::new(outbounds).with_interceptor(TunnelName::kbs(), KbsFilter::new(kbs_filter)),
            ),
        }
    }

    /// The targets that the agent's streams may reach.
    pub(crate) fn outbounds(&self) -> Arc<Outbounds<P, KbsFilter>> {
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

/// Most names that are shown of each kind of mismatch. An unproven agent may name thousands.
const SHOWN_MAX: usize = 8;

/// What mismatched tunnels have in common, for one and for more of them.
type Fault = (&'static str, &'static str);

const REFUSED: Fault =
    ("the agent refuses to forward its streams", "the agent refuses to forward their streams");

fn fault(kind: MismatchKind) -> Fault {
    match kind {
        MismatchKind::OurInbound => (
            "our inbound has no matching outbound on the agent",
            "our inbounds have no matching outbounds on the agent",
        ),
        MismatchKind::OurOutbound => (
            "our outbound has no matching inbound on the agent",
            "our outbounds have no matching inbounds on the agent",
        ),
        MismatchKind::PeerInbound => (
            "the agent listens for it, but no --outbounds tag here serves it",
            "the agent listens for them, but no --outbounds tag here serves them",
        ),
        MismatchKind::PeerOutbound => (
            "the agent serves it, but no --inbounds tag here listens for it",
            "the agent serves them, but no --inbounds tag here listens for them",
        ),
    }
}

/// The tunnels that only one end has, in one line; `None` if there are none.
pub(super) fn mismatches<P: Phase>(ours: &Hello, agent: &Hello, refused: &[TunnelName]) -> Option<String> {
    let mut groups: Vec<(Fault, Vec<TunnelName>)> = Vec::new();
    // Names are equal without regard to case.
    let mut known = HashSet::new();
    let mut add = |fault: Fault, name: TunnelName| {
        if !known.insert((fault, name.as_str().to_ascii_lowercase())) {
            return;
        }
        match groups.iter_mut().find(|(of, _)| *of == fault) {
            Some((_, names)) => names.push(name),
            None => groups.push((fault, vec![name])),
        }
    };
    for Mismatch { kind, name } in ours.mismatches(agent, usize::MAX) {
        // The agent's text is untrusted. One that is not a tunnel name is left out.
        if let Ok(name) = name.parse() {
            add(fault(kind), name);
        }
    }
    refused.iter().for_each(|name| add(REFUSED, name.clone()));
    let lines: Vec<String> = groups.iter().map(|(fault, names)| line::<P>(fault, names)).collect();
    (!lines.is_empty()).then(|| lines.join("; "))
}

fn line<P: Phase>((one, more): &Fault, names: &[TunnelName]) -> String {
    let shown: Vec<&str> = names.iter().take(SHOWN_MAX).map(TunnelName::as_str).collect();
    let (noun, fault) = if names.len() == 1 { ("tunnel", one) } else { ("tunnels", more) };
    let rest = match names.len() - shown.len() {
        0 => String::new(),
        rest => format!(" ... and {rest} more"),
    };
    format!("{noun} {}{rest}, {} phase: {fault}", shown.join(", "), P::NAME)
}

#[cfg(test)]
mod tests {
    use secure_comms_protocol::Kubernetes;
    use secure_comms_protocol::tag::parse_list;

    use super::*;

    fn tunnels() -> Tunnels<Kubernetes> {
        let inbounds = parse_list("KUBERNETES_PHASE:KATAAGENT:0,KUBERNETES_PHASE:x:0,ATTESTATION_PHASE:no:0");
        let outbounds = parse_list("BOTH_PHASES:KBS:kbs:8080,KUBERNETES_PHASE:sock:/run/s");
        Tunnels::new(&inbounds.unwrap(), &outbounds.unwrap(), true)
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
        let found = mismatches::<Kubernetes>(&ours, &agent, &[TunnelName::kbs()]);
        assert_eq!(found.as_deref(), Some(expected.join("; ").as_str()));
    }

    #[test]
    fn thousands_of_names_are_one_short_line() {
        let ours = tunnels().hello(&"p1".parse().unwrap(), 5);
        let repeated = ["a", "A", "b", "a", "b\u{202e}", ""].iter().cycle().take(16_000);
        let many = |from: usize| (from..from + 16_000).map(|n| format!("t{n}"));
        let agent = Hello {
            inbounds: repeated
                .map(ToString::to_string)
                .chain(["kbs".to_owned(), "sock".to_owned()])
                .collect(),
            outbounds: many(0).chain(many(0)).chain(["kataagent".to_owned(), "X".to_owned()]).collect(),
            ..Hello::default()
        };
        assert_eq!(
            mismatches::<Kubernetes>(&ours, &agent, &[]).unwrap(),
            "tunnels a, b, Kubernetes phase: the agent listens for them, but no --outbounds tag here serves them; \
             tunnels t0, t1, t2, t3, t4, t5, t6, t7 ... and 15992 more, Kubernetes phase: the agent serves them, but no \
             --inbounds tag here listens for them"
        );
        let long = (0..1000).map(|n| format!("{n:064}"));
        let agent = Hello { inbounds: long.clone().collect(), outbounds: long.collect(), ..Hello::default() };
        let line = mismatches::<Kubernetes>(&ours, &agent, &[]).unwrap();
        assert!(line.len() < 2000, "{} bytes", line.len());
        let same =
            Hello { inbounds: ours.outbounds.clone(), outbounds: ours.inbounds.clone(), ..Hello::default() };
        assert_eq!(mismatches::<Kubernetes>(&ours, &same, &[]), None);
    }
}
