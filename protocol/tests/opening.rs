//! The messages before the first byte of a stream: banner, hello and refusal.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "clippy.toml lets tests fail loudly; clippy does not take the helpers of an integration test for tests"
)]

use proptest::prelude::*;
use secure_comms_protocol::limits::PROTOCOL_VERSION;
use secure_comms_protocol::{
    Banner, BannerHint, Control, Hello, LoginState, MismatchKind, PhaseName, Refusal, RefusalKind,
    RefusalReason, TunnelNames,
};

const BANNERS: [(Banner, &str); 3] = [
    (Banner::Attestation, "Secure Comms agent in the Attestation phase\r\n"),
    (Banner::Kubernetes(LoginState::Fresh), "Secure Comms agent in the Kubernetes phase, fresh\r\n"),
    (Banner::Kubernetes(LoginState::Latched), "Secure Comms agent in the Kubernetes phase, latched\r\n"),
];

fn names(texts: &[&str]) -> Vec<String> {
    texts.iter().map(ToString::to_string).collect()
}

#[test]
fn a_banner_is_read_as_it_was_written() {
    for (banner, text) in BANNERS {
        assert_eq!(banner.text(), text);
        assert_eq!(BannerHint::parse(text), banner.into());
    }
    assert_eq!(BannerHint::parse("SSH server of somebody else"), BannerHint::default());
    let fresh = BannerHint { phase: None, login: Some(LoginState::Fresh) };
    assert_eq!(BannerHint::parse("fresh"), fresh, "each part is read alone");
}

#[test]
fn each_end_names_only_itself_in_its_hello() {
    let tunnels = || TunnelNames { inbounds: names(&["a"]), outbounds: names(&["b"]) };
    let agent = Hello::from_agent(PhaseName::Kubernetes, "cafe", 5, tunnels());
    assert_eq!((agent.phase, agent.instance.as_deref()), (Some(PhaseName::Kubernetes), Some("cafe")));
    let adaptor = Hello::from_adaptor(&"p1".parse().unwrap(), 5, tunnels());
    assert_eq!(adaptor.pod_id.as_deref(), Some("p1"));
    assert_eq!((agent.pod_id, adaptor.phase, adaptor.instance), (None, None, None));
    for (version, credit) in [(agent.version, agent.credit), (adaptor.version, adaptor.credit)] {
        assert_eq!((version, credit), (PROTOCOL_VERSION, Some(5)));
    }
}

#[test]
fn mismatches_are_ours_then_the_peers_without_regard_to_case() {
    let ours = Hello { inbounds: names(&["A", "only"]), outbounds: names(&["kbs", "x"]), ..Hello::default() };
    let peer =
        Hello { inbounds: names(&["KBS", "not a\nname"]), outbounds: names(&["a", "y"]), ..Hello::default() };
    let found: Vec<_> = ours.mismatches(&peer, usize::MAX).map(|found| (found.kind, found.name)).collect();
    let expected = [
        (MismatchKind::OurInbound, "only"),
        (MismatchKind::OurOutbound, "x"),
        (MismatchKind::PeerInbound, "not a\nname"),
        (MismatchKind::PeerOutbound, "y"),
    ];
    assert_eq!(found, expected);
}

fn any_reason() -> impl Strategy<Value = RefusalReason> {
    prop_oneof![
        Just(RefusalReason::BadName),
        Just(RefusalReason::NoOutbound),
        Just(RefusalReason::NotRequested),
        Just(RefusalReason::TooManyStreams),
        any::<u32>().prop_map(RefusalReason::BadStreamId),
        Just(RefusalReason::ConnectionGone),
        "[a-z ]{0,20}".prop_map(RefusalReason::Unreachable),
    ]
}

fn any_hello() -> impl Strategy<Value = Hello> {
    let list = || prop::collection::vec("[A-Ca-c]{1,2}", 0..6);
    (list(), list()).prop_map(|(inbounds, outbounds)| Hello { inbounds, outbounds, ..Hello::default() })
}

proptest! {
    #[test]
    fn any_text_around_a_banner_keeps_its_parts(before in "[0-9 ]{0,20}", after in "[0-9 ]{0,20}", index in 0..3usize) {
        let (banner, text) = BANNERS[index];
        prop_assert_eq!(BannerHint::parse(&format!("{before}{text}{after}")), banner.into());
    }

    #[test]
    fn any_text_is_a_banner_without_a_panic(text in ".*") {
        BannerHint::parse(&text);
    }

    #[test]
    fn a_reason_code_is_read_as_it_was_written(code in 0..10u32) {
        prop_assert!(RefusalKind::from_code(code).is_none_or(|kind| kind.code() == code));
    }

    #[test]
    fn a_refusal_is_one_line_of_bounded_length(name in ".*", reason in any_reason()) {
        let refusal = Refusal::new(&name, PhaseName::Kubernetes, &reason);
        prop_assert_eq!(RefusalKind::from_code(refusal.kind.code()), Some(reason.kind()));
        let end = format!(", Kubernetes phase: {reason}");
        prop_assert!(refusal.reason.ends_with(&end));
        prop_assert!(!refusal.reason.contains(char::is_control));
        // 64 characters of up to 10 bytes each when escaped, and the reason.
        prop_assert!(refusal.reason.len() < 800);
    }

    #[test]
    fn a_hello_is_read_as_it_was_written(
        pod in "[A-Za-z0-9]{1,64}", credit: u32, inbounds: Vec<String>, outbounds: Vec<String>
    ) {
        let tunnels = TunnelNames { inbounds, outbounds };
        let sent = Control::Hello(Hello::from_adaptor(&pod.parse().unwrap(), credit, tunnels));
        let mut line = Vec::new();
        sent.write_line(&mut line);
        prop_assert_eq!(Control::parse(&line), Ok(Some(sent)));
    }

    #[test]
    fn both_ends_find_the_same_mismatches(ours in any_hello(), peers in any_hello()) {
        let swapped = |kind| match kind {
            MismatchKind::OurInbound => MismatchKind::PeerInbound,
            MismatchKind::OurOutbound => MismatchKind::PeerOutbound,
            MismatchKind::PeerInbound => MismatchKind::OurInbound,
            MismatchKind::PeerOutbound => MismatchKind::OurOutbound,
        };
        let here: Vec<_> = ours.mismatches(&peers, usize::MAX).map(|found| (found.kind, found.name)).collect();
        let there: Vec<_> = peers.mismatches(&ours, usize::MAX).collect();
        prop_assert_eq!(here.len(), there.len());
        for found in there {
            prop_assert!(here.contains(&(swapped(found.kind), found.name)));
        }
        prop_assert!(ours.mismatches(&peers, 1).count() <= 4, "one of each list");
    }
}
