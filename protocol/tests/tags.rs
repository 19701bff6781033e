//! Every form and every fault of a tag, and properties of any text.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "clippy.toml lets tests fail loudly; clippy does not take the helpers of an integration test for tests"
)]

use proptest::prelude::*;
use secure_comms_protocol::tag::{Host, Tag, UNIX_PATH_MAX, parse_list, parse_lists, with_built_in};
use secure_comms_protocol::{Bind, InboundTag, OutboundTag, PhaseName, PhaseSet, Target};

fn inbound(text: &str) -> InboundTag {
    InboundTag::parse(text).unwrap_or_else(|error| panic!("{error}"))
}

fn outbound(text: &str) -> OutboundTag {
    OutboundTag::parse(text).unwrap_or_else(|error| panic!("{error}"))
}

fn inbound_fault(text: &str) -> String {
    InboundTag::parse(text).expect_err(text).to_string()
}

fn outbound_fault(text: &str) -> String {
    OutboundTag::parse(text).expect_err(text).to_string()
}

fn tcp(host: Host, port: u16) -> Target {
    Target::Tcp { host, port }
}

#[test]
fn an_inbound_is_a_port_a_namespace_and_port_or_a_path() {
    let cases = [
        ("0", Bind::Tcp { namespace: None, port: 0 }),
        ("8080", Bind::Tcp { namespace: None, port: 8080 }),
        ("podns:8080", Bind::Tcp { namespace: Some("podns".into()), port: 8080 }),
        ("/run/netns/podns:65535", Bind::Tcp { namespace: Some("/run/netns/podns".into()), port: 65535 }),
        ("/run/netns/a:b:1", Bind::Tcp { namespace: Some("/run/netns/a:b".into()), port: 1 }),
        ("/run/x.sock", Bind::Unix("/run/x.sock".into())),
        ("/run/x:y", Bind::Unix("/run/x:y".into())),
    ];
    for (rest, bind) in cases {
        let tag = inbound(&format!("BOTH_PHASES:KBS:{rest}"));
        assert_eq!((tag.phases, tag.name.as_str(), tag.bind), (PhaseSet::Both, "KBS", bind), "{rest}");
    }
}

#[test]
fn an_outbound_is_a_port_a_host_and_port_or_a_path() {
    let name = |text: &str| Host::Name(text.into());
    let ip = |text: &str| Host::Ip(text.parse().unwrap());
    let cases = [
        ("8080", tcp(ip("127.0.0.1"), 8080)),
        ("10.1.2.3:1", tcp(ip("10.1.2.3"), 1)),
        ("[::1]:65535", tcp(ip("::1"), 65535)),
        ("kbs-service.trustee-operator-system:8080", tcp(name("kbs-service.trustee-operator-system"), 8080)),
        ("kbs_1.example.:443", tcp(name("kbs_1.example."), 443)),
        ("/run/a:80", Target::Unix("/run/a:80".into())),
    ];
    for (rest, target) in cases {
        let tag = outbound(&format!("KUBERNETES_PHASE:a.b-C_1:{rest}"));
        assert_eq!(
            (tag.phases, tag.name.as_str(), tag.target),
            (PhaseSet::Kubernetes, "a.b-C_1", target),
            "{rest}"
        );
    }
}

#[test]
fn a_phase_set_says_in_which_phases_a_tunnel_exists() {
    let cases =
        [("ATTESTATION_PHASE", true, false), ("KUBERNETES_PHASE", false, true), ("BOTH_PHASES", true, true)];
    for (text, attestation, kubernetes) in cases {
        let phases = inbound(&format!("{text}:X:1")).phases();
        assert_eq!(phases.includes(PhaseName::Attestation), attestation, "{text}");
        assert_eq!(phases.includes(PhaseName::Kubernetes), kubernetes, "{text}");
        assert_eq!(phases.to_string(), text);
    }
}

#[test]
fn a_fault_names_the_tag_the_part_and_what_was_expected() {
    let phase = "phase: expected ATTESTATION_PHASE, KUBERNETES_PHASE or BOTH_PHASES";
    let name = "name: expected 1 to 64 characters out of A-Z a-z 0-9 . _ -";
    let parts = "parts: expected Phase:Name:Port, Phase:Name:";
    for (tag, fault) in [
        ("X", phase),
        ("BOTH_PHASE:KBS:1", phase),
        (" BOTH_PHASES:KBS:1", phase),
        ("BOTH_PHASES", parts),
        ("BOTH_PHASES:KBS", parts),
        ("BOTH_PHASES::1", name),
        ("BOTH_PHASES:K S:1", name),
        ("BOTH_PHASES:K\u{e4}:1", name),
    ] {
        let start = format!("tag '{}': {fault}", tag.escape_default());
        assert!(inbound_fault(tag).starts_with(&start), "{}", inbound_fault(tag));
        assert!(outbound_fault(tag).starts_with(&start), "{}", outbound_fault(tag));
    }
    assert!(InboundTag::parse(&format!("BOTH_PHASES:{}:1", "n".repeat(64))).is_ok());
    assert!(inbound_fault(&format!("BOTH_PHASES:{}:1", "n".repeat(65))).contains(name));
    assert!(
        inbound_fault("BOTH_PHASES")
            .ends_with("Phase:Name:Port, Phase:Name:Namespace:Port or Phase:Name:/unix/path")
    );
    assert!(
        outbound_fault("BOTH_PHASES")
            .ends_with("Phase:Name:Port, Phase:Name:Host:Port or Phase:Name:/unix/path")
    );
}

#[test]
fn a_port_is_a_plain_number_and_an_outbound_has_no_port_0() {
    for port in ["", "x", "+1", "-1", "1 ", "65536", "99999999999", "\u{661}"] {
        let found = port.escape_default();
        for rest in ["", "podns:"] {
            let tag = format!("BOTH_PHASES:X:{rest}{port}");
            let expected = format!(
                "tag '{}': port: expected a number from 0 to 65535, found '{found}'",
                tag.escape_default()
            );
            assert_eq!(inbound_fault(&tag), expected);
        }
        for rest in ["", "host:"] {
            let tag = format!("BOTH_PHASES:X:{rest}{port}");
            let expected = format!(
                "tag '{}': port: expected a number from 1 to 65535, found '{found}'",
                tag.escape_default()
            );
            assert_eq!(outbound_fault(&tag), expected);
        }
    }
    assert!(
        outbound_fault("BOTH_PHASES:X:0").ends_with("port: expected a number from 1 to 65535, found '0'")
    );
    assert!(outbound_fault("BOTH_PHASES:X:host:0").ends_with("found '0'"));
}

#[test]
fn a_namespace_never_leads_out_of_run_netns_by_accident() {
    for namespace in ["", ".", "..", "a/b", "../x", "a:b", "po\nd", "/run/\u{1b}[2J"] {
        let tag = format!("BOTH_PHASES:X:{namespace}:80");
        let expected = format!(
            "tag '{}': namespace: expected a name under /run/netns or an absolute path",
            tag.escape_default()
        );
        assert_eq!(inbound_fault(&tag), expected);
    }
}

#[test]
fn an_inbound_with_a_host_is_a_fault_that_says_so() {
    for host in [
        "10.0.0.1",
        "0.0.0.0",
        "127.0.0.1",
        "localhost",
        "LocalHost",
        "[::1]",
        "::1",
        "::",
        "[::]",
        "[fe80::1%eth0]",
        "*",
        "db.example",
        "1.2.3",
        "db.",
    ] {
        let tag = format!("KUBERNETES_PHASE:LOG:{host}:7000");
        let fault = format!(
            "tag '{tag}': host: an inbound has no host, it listens on 127.0.0.1; {host} would be a network namespace \
             (if there is one of this name, give its path: /run/netns/{host})"
        );
        assert_eq!(inbound_fault(&tag), fault);
    }
    // The paths of the advice, and names that no host has.
    for namespace in ["/run/netns/10.0.0.1", "/run/netns/localhost", "podns", "cni-1f2e", "7"] {
        let bind = Bind::Tcp { namespace: Some(namespace.to_owned()), port: 7000 };
        assert_eq!(inbound(&format!("KUBERNETES_PHASE:LOG:{namespace}:7000")).bind, bind);
    }
}

#[test]
fn a_phase_is_read_in_any_case_and_shown_in_one() {
    for phase in ["kubernetes_phase", "Kubernetes_Phase", "KUBERNETES_PHASE"] {
        assert_eq!(inbound(&format!("{phase}:A:1")).to_string(), "KUBERNETES_PHASE:A:1");
        assert_eq!(outbound(&format!("{phase}:A:h:1")).to_string(), "KUBERNETES_PHASE:A:h:1");
    }
    assert!(inbound_fault("KUBERNETES:A:1").contains("phase: expected ATTESTATION_PHASE"));
}

#[test]
fn another_separator_than_a_comma_is_a_fault_that_says_so() {
    for list in [
        "KUBERNETES_PHASE:A:1;KUBERNETES_PHASE:B:2",
        "KUBERNETES_PHASE:A:1; kubernetes_phase:B:2",
        "KUBERNETES_PHASE:A:1 BOTH_PHASES:B:2",
        "KUBERNETES_PHASE:A:1\nBOTH_PHASES:B:2",
        // With this path the rest would pass for a part of it.
        "KUBERNETES_PHASE:A:/run/a;KUBERNETES_PHASE:B:2",
    ] {
        let fault = format!("tag '{}': separator: expected ',' between tags", list.escape_default());
        assert_eq!(parse_list::<InboundTag>(list).unwrap_err().to_string(), fault);
        assert_eq!(parse_list::<OutboundTag>(list).unwrap_err().to_string(), fault);
    }
    assert_eq!(inbound("BOTH_PHASES:A:/run/a;b c").bind, Bind::Unix("/run/a;b c".to_owned()));
}

#[test]
fn a_host_is_a_name_or_an_address() {
    let long_label = "a".repeat(64);
    let long_name = ["a".repeat(63).as_str(); 4].join(".");
    for host in [
        "",
        "::1",
        "[::1",
        "[]",
        "[host]",
        "[1.2.3.4]",
        "1.2.3",
        "1.2.3.4.5",
        "256.1.1.1",
        "-a",
        "a-",
        "a..b",
        ".",
        "a b",
        "http://kbs",
        "user@host",
        "[fe80::1%eth0]",
        &long_label,
        &long_name,
    ] {
        let tag = format!("BOTH_PHASES:X:{host}:80");
        let expected = format!(
            "tag '{tag}': host: expected a host name, an IPv4 address or an IPv6 address in brackets"
        );
        assert_eq!(outbound_fault(&tag), expected);
    }
}

#[test]
fn a_unix_path_fits_a_socket_address() {
    let longest = format!("/{}", "p".repeat(UNIX_PATH_MAX - 1));
    assert!(InboundTag::parse(&format!("BOTH_PHASES:X:{longest}")).is_ok());
    assert!(OutboundTag::parse(&format!("BOTH_PHASES:X:{longest}")).is_ok());
    for path in [format!("{longest}p"), "/".into(), "/dir/".into(), "/a\0b".into(), "/a\nb".into()] {
        let tag = format!("BOTH_PHASES:X:{path}");
        let expected = format!(
            "tag '{}': unix path: expected the path of a socket, at most 107 bytes, without control characters",
            tag.escape_default()
        );
        assert_eq!(inbound_fault(&tag), expected);
        assert_eq!(outbound_fault(&tag), expected);
    }
}

#[test]
fn a_list_skips_blanks_and_empty_tags() {
    let tags: Vec<InboundTag> = parse_list(" , BOTH_PHASES:A:1 ,,\tATTESTATION_PHASE:B:2\n,").unwrap();
    assert_eq!(
        tags.iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["BOTH_PHASES:A:1", "ATTESTATION_PHASE:B:2"]
    );
    assert_eq!(parse_list::<OutboundTag>("").unwrap(), []);
}

#[test]
fn all_faults_of_a_list_are_reported_at_once() {
    let list = "X:A:1,BOTH_PHASES:B:1,BOTH_PHASES:C:x,KUBERNETES_PHASE:b:2,BOTH_PHASES:$:1";
    let errors = parse_list::<InboundTag>(list).unwrap_err();
    assert_eq!(errors.iter().count(), 4);
    assert_eq!(
        errors.to_string(),
        "tag 'X:A:1': phase: expected ATTESTATION_PHASE, KUBERNETES_PHASE or BOTH_PHASES; \
         tag 'BOTH_PHASES:C:x': port: expected a number from 0 to 65535, found 'x'; \
         tag 'KUBERNETES_PHASE:b:2': name: expected a name once in a phase; 'BOTH_PHASES:B:1' has it too; \
         tag 'BOTH_PHASES:$:1': name: expected 1 to 64 characters out of A-Z a-z 0-9 . _ -"
    );
}

#[test]
fn a_name_may_occur_once_in_each_phase_over_all_lists() {
    let both = "ATTESTATION_PHASE:KBS:1,KUBERNETES_PHASE:KBS:2";
    assert_eq!(parse_list::<OutboundTag>(both).unwrap().len(), 2);
    let error = parse_lists::<OutboundTag>([both, "BOTH_PHASES:kbs:3"]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "tag 'BOTH_PHASES:kbs:3': name: expected a name once in a phase; 'ATTESTATION_PHASE:KBS:127.0.0.1:1' has it too"
    );
}

#[test]
fn the_operators_tag_replaces_a_built_in_one_in_its_phases() {
    let built_in = || inbound("KUBERNETES_PHASE:KATAAGENT:0");
    let mine = vec![inbound("BOTH_PHASES:kataagent:7000")];
    assert_eq!(with_built_in(mine.clone(), built_in()), mine);
    let other = vec![inbound("ATTESTATION_PHASE:KATAAGENT:7000")];
    assert_eq!(with_built_in(other.clone(), built_in()), [other[0].clone(), built_in()]);
    // The built-in tag stays in the phase that the operator did not configure.
    let mine = vec![inbound("KUBERNETES_PHASE:KBS:9090")];
    let left = inbound("ATTESTATION_PHASE:KBS:8080");
    assert_eq!(with_built_in(mine.clone(), inbound("BOTH_PHASES:KBS:8080")), [mine[0].clone(), left]);
}

fn any_phase() -> impl Strategy<Value = &'static str> {
    prop_oneof![Just("ATTESTATION_PHASE"), Just("KUBERNETES_PHASE"), Just("BOTH_PHASES")]
}

/// Texts near the grammar, so that many of them parse.
fn near_tag() -> impl Strategy<Value = String> {
    let rest = prop_oneof![
        "[0-9]{1,5}",
        "[a-z0-9._:/\\[\\]-]{0,30}:[0-9]{1,5}",
        "/[a-z0-9:/. ]{1,110}",
        "\\[[0-9a-f:]{2,39}\\]:[0-9]{1,5}",
        "\\PC{0,20}",
    ];
    (any_phase(), "[A-Za-z0-9._-]{1,64}", rest)
        .prop_map(|(phase, name, rest)| format!("{phase}:{name}:{rest}"))
}

proptest! {
    #[test]
    fn a_shown_tag_parses_back_to_the_same_tag(text in near_tag()) {
        if let Ok(tag) = InboundTag::parse(&text) {
            prop_assert_eq!(InboundTag::parse(&tag.to_string()), Ok(tag));
        }
        if let Ok(tag) = OutboundTag::parse(&text) {
            prop_assert_eq!(OutboundTag::parse(&tag.to_string()), Ok(tag));
        }
    }

    #[test]
    fn a_shown_ipv6_outbound_parses_back(bits in any::<u128>(), port in 1u16..) {
        let tag = outbound(&format!("BOTH_PHASES:X:[{}]:{port}", core::net::Ipv6Addr::from(bits)));
        prop_assert_eq!(OutboundTag::parse(&tag.to_string()), Ok(tag));
    }

    #[test]
    fn no_text_makes_the_parser_panic_and_no_fault_forges_a_line(text in any::<String>()) {
        for fault in [
            parse_list::<InboundTag>(&text).err().map(|e| e.to_string()),
            parse_list::<OutboundTag>(&text).err().map(|e| e.to_string()),
        ].into_iter().flatten() {
            prop_assert!(!fault.chars().any(char::is_control), "{:?}", fault);
        }
    }

    #[test]
    fn a_list_parses_if_and_only_if_each_of_its_tags_does(tags in proptest::collection::vec(near_tag(), 0..4)) {
        let list = tags.join(",");
        let alone = tags.iter().flat_map(|tag| tag.split(',')).map(str::trim).filter(|tag| !tag.is_empty());
        let faults = alone.filter(|tag| InboundTag::parse(tag).is_err()).count();
        match parse_list::<InboundTag>(&list) {
            Ok(_) => prop_assert_eq!(faults, 0),
            // Repeated names are faults in addition to those of single tags.
            Err(errors) => prop_assert!(errors.iter().count() >= faults),
        }
    }
}
