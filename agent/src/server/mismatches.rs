//! The tunnels that one end has and the other lacks: one line of the log for each hello.

use secure_comms_keys::text::one_line;
use secure_comms_protocol::{Hello, MismatchKind, PhaseName, TunnelName};

/// Names of each list in a hello that are compared with ours: a stranger may send thousands.
const COMPARED_MAX: usize = 1024;
/// Names of one kind that are shown. The others are counted.
const SHOWN: usize = 8;
/// The longest name that is shown, in bytes: more than a tunnel's name may have.
const NAME_MAX: usize = 64;

/// Describes the mismatches of two hellos; none if there are none. The names of `theirs` are untrusted text.
pub(super) fn describe(phase: PhaseName, ours: &Hello, theirs: &Hello) -> Option<String> {
    let kinds = [
        (MismatchKind::OurInbound, "inbound here has no matching outbound on the peer", 0),
        (MismatchKind::OurOutbound, "outbound here has no matching inbound on the peer", 0),
        (
            MismatchKind::PeerInbound,
            "inbound on the peer has no matching outbound here",
            theirs.inbounds.len().saturating_sub(COMPARED_MAX),
        ),
        (
            MismatchKind::PeerOutbound,
            "outbound on the peer has no matching inbound here",
            theirs.outbounds.len().saturating_sub(COMPARED_MAX),
        ),
    ];
    let kbs = TunnelName::kbs().to_string();
    let mismatches: Vec<_> = ours
        .mismatches(theirs, COMPARED_MAX)
        // Every agent has this inbound, and a pod without Trustee needs no partner for it.
        .filter(|mismatch| {
            !(phase == PhaseName::Kubernetes
                && mismatch.kind == MismatchKind::OurInbound
                && mismatch.name.eq_ignore_ascii_case(&kbs))
        })
        .collect();
    let texts: Vec<_> = kinds
        .into_iter()
        .filter_map(|(kind, what, not_compared)| {
            let names: Vec<_> =
                mismatches.iter().filter(|mismatch| mismatch.kind == kind).map(|other| other.name).collect();
            let shown: Vec<_> = names.iter().take(SHOWN).map(|name| one_line(name, NAME_MAX)).collect();
            let more = names.len() - shown.len() + not_compared;
            let more = if more == 0 { String::new() } else { format!(" and {more} more") };
            (!shown.is_empty()).then(|| format!("{what}: {}{more}", shown.join(", ")))
        })
        .collect();
    (!texts.is_empty()).then(|| format!("tunnels of the {phase} phase: {}", texts.join("; ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(inbounds: &[&str], outbounds: &[&str]) -> Hello {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        Hello { inbounds: names(inbounds), outbounds: names(outbounds), ..Hello::default() }
    }

    #[test]
    fn each_kind_is_named_once_with_its_tunnels() {
        let ours = hello(&["KBS", "A", "B"], &["C"]);
        let theirs = hello(&["D"], &["kbs", "E"]);
        assert_eq!(
            describe(PhaseName::Attestation, &ours, &theirs).unwrap(),
            "tunnels of the Attestation phase: inbound here has no matching outbound on the peer: A, B; \
             outbound here has no matching inbound on the peer: C; \
             inbound on the peer has no matching outbound here: D; \
             outbound on the peer has no matching inbound here: E"
        );
        let theirs = hello(&["C"], &["KBS", "A", "B"]);
        assert_eq!(describe(PhaseName::Attestation, &ours, &theirs), None);
    }

    #[test]
    fn a_pod_without_trustee_is_no_mismatch() {
        let (ours, theirs) = (hello(&["KBS"], &["KATAAGENT"]), hello(&["KATAAGENT"], &[]));
        assert_eq!(describe(PhaseName::Kubernetes, &ours, &theirs), None);
        assert!(describe(PhaseName::Attestation, &ours, &theirs).unwrap().ends_with("on the peer: KBS"));
        // A tunnel of the peer with that name is none of ours.
        let theirs = hello(&["KBS", "KATAAGENT"], &[]);
        assert!(describe(PhaseName::Kubernetes, &ours, &theirs).is_some());
    }

    #[test]
    fn a_hello_with_thousands_of_names_is_one_bounded_line() {
        let long = "\u{202e}\n".repeat(1000);
        let names: Vec<String> = (0..16_000).map(|n| format!("{n}{long}")).collect();
        let theirs = Hello { inbounds: names.clone(), outbounds: names, ..Hello::default() };
        let text = describe(PhaseName::Attestation, &hello(&["KBS"], &[]), &theirs).unwrap();
        assert!(text.len() < 2500 && text.contains(" and 15992 more"), "{}: {text}", text.len());
        assert!(!text.contains(['\n', '\u{202e}']), "{text}");
    }
}
