use super::*;

fn rules(mode: UserDataMode, hosts: &[AllowedHost]) -> Rules<'_> {
    Rules { mode, hosts, pod_namespace: Some("/run/netns/podns") }
}

fn outbounds(mode: UserDataMode, list: &str) -> (Vec<OutboundTag>, Vec<String>) {
    let hosts = ["db.example", "10.0.0.7:5432", "[fd00::7]"].map(|host| host.parse().unwrap());
    let mut warnings = Vec::new();
    (admit("sc-outbounds", list, rules(mode, &hosts), &[], &mut warnings), warnings)
}

fn inbounds(mode: UserDataMode, list: &str) -> (Vec<InboundTag>, Vec<String>) {
    let mut warnings = Vec::new();
    (admit("sc-inbounds", list, rules(mode, &[]), &[], &mut warnings), warnings)
}

fn is_refused<T: std::fmt::Debug>(
    (tags, warnings): (Vec<T>, Vec<String>),
    key: &str,
    text: &str,
    rule: &str,
) {
    assert!(tags.is_empty(), "{tags:?}");
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    for part in ["user data", key, text, rule, "goes on without"] {
        assert!(warnings[0].contains(part), "{part:?} is not in {:?}", warnings[0]);
    }
}

#[test]
fn the_modes_are_three_words() {
    for mode in [UserDataMode::None, UserDataMode::Tunnels, UserDataMode::All] {
        assert_eq!(mode.to_string().parse(), Ok(mode));
    }
    for text in ["", "None", "ALL", "tunnel", "none,all"] {
        assert!(text.parse::<UserDataMode>().is_err(), "{text}");
    }
}

#[test]
fn outbounds_that_keep_the_rules_are_admitted() {
    for tag in [
        "KUBERNETES_PHASE:A:1",
        "kubernetes_phase:A:127.0.0.1:1",
        "KUBERNETES_PHASE:A:[::1]:1",
        "KUBERNETES_PHASE:A:LocalHost:1",
        "KUBERNETES_PHASE:A:DB.example:9",
        "KUBERNETES_PHASE:A:10.0.0.7:5432",
        "KUBERNETES_PHASE:A:[fd00::7]:9",
    ] {
        let (tags, warnings) = outbounds(UserDataMode::Tunnels, tag);
        assert!(tags.len() == 1 && warnings.is_empty(), "{tag}: {warnings:?}");
    }
    let (tags, warnings) = outbounds(UserDataMode::All, "KUBERNETES_PHASE:A:anywhere.example:1");
    assert!(tags.len() == 1 && warnings.is_empty(), "{warnings:?}");
}

#[test]
fn outbounds_that_break_a_rule_are_refused_in_every_mode() {
    for (tag, rule) in [
        ("ATTESTATION_PHASE:PWN:/run/systemd/private", "no unix socket"),
        ("KUBERNETES_PHASE:PWN:/run/systemd/private", "no unix socket"),
        ("BOTH_PHASES:PWN:127.0.0.1:1", "no outbound to unproven peers"),
        ("attestation_phase:PWN:[::1]:1", "no outbound to unproven peers"),
        ("KUBERNETES_PHASE:KATAAGENT:evil.example:1234", "may not move"),
        ("KUBERNETES_PHASE:kataagent:127.0.0.1:1234", "may not move"),
        ("ATTESTATION_PHASE:KataAgent:/run/kata-containers/agent.sock", "may not move"),
        ("KUBERNETES_PHASE:kBs:1", "may not move"),
        ("KUBERNETES_PHASE:A:0", "port"),
        ("NO_PHASE:A:1", "phase"),
    ] {
        for mode in [UserDataMode::Tunnels, UserDataMode::All] {
            is_refused(outbounds(mode, tag), "sc-outbounds", tag, rule);
        }
    }
}

#[test]
fn outbounds_to_other_hosts_need_the_flag() {
    for host in [
        "evil.example",
        "db.example.evil.example",
        "localhost.evil.example",
        "localhost.",
        "127.0.0.2",
        "0.0.0.0",
        "[::]",
        "[::ffff:127.0.0.1]",
        "169.254.169.254",
        "10.0.0.7",
        "[fd00::8]",
    ] {
        let tag = format!("KUBERNETES_PHASE:A:{host}:1");
        is_refused(
            outbounds(UserDataMode::Tunnels, &tag),
            "sc-outbounds",
            &tag,
            "-secure-comms-user-data-hosts",
        );
    }
}

#[test]
fn inbounds_stay_in_our_namespaces_and_the_kubernetes_phase() {
    let (tags, warnings) =
        inbounds(UserDataMode::Tunnels, "KUBERNETES_PHASE:A:1, KUBERNETES_PHASE:B:podns:2,");
    assert!(tags.len() == 2 && warnings.is_empty(), "{warnings:?}");
    for (tag, rule) in [
        ("KUBERNETES_PHASE:A:/run/x.sock", "no unix socket"),
        ("KUBERNETES_PHASE:KBS:8081", "may not move"),
        ("BOTH_PHASES:kbs:8081", "may not move"),
        ("KUBERNETES_PHASE:KATAAGENT:1", "may not move"),
    ] {
        for mode in [UserDataMode::Tunnels, UserDataMode::All] {
            is_refused(inbounds(mode, tag), "sc-inbounds", tag, rule);
        }
    }
    for (tag, rule) in [
        ("BOTH_PHASES:A:1", "Kubernetes phase only"),
        ("ATTESTATION_PHASE:A:1", "Kubernetes phase only"),
        ("KUBERNETES_PHASE:A:/run/netns/podns:1", "by its name"),
        ("KUBERNETES_PHASE:A:/proc/1/ns/net:1", "by its name"),
        ("KUBERNETES_PHASE:A:other:1", "by its name"),
        ("KUBERNETES_PHASE:A:PODNS:1", "by its name"),
    ] {
        is_refused(inbounds(UserDataMode::Tunnels, tag), "sc-inbounds", tag, rule);
        assert_eq!(inbounds(UserDataMode::All, tag).0.len(), 1, "{tag}");
    }
}

#[test]
fn a_refused_tag_does_not_cost_the_others() {
    let list =
        "X,KUBERNETES_PHASE:A:1,KUBERNETES_PHASE:a:2,KUBERNETES_PHASE:B:evil.example:3,KUBERNETES_PHASE:C:4";
    let (tags, warnings) = outbounds(UserDataMode::Tunnels, list);
    assert_eq!(tags.iter().map(|tag| tag.name.as_str()).collect::<Vec<_>>(), ["A", "C"]);
    assert_eq!(warnings.len(), 3, "{warnings:?}");
    assert!(warnings[1].contains("'KUBERNETES_PHASE:a:2' refused: a name once in a phase"), "{warnings:?}");
    assert!(warnings[1].contains("of user data has it too"), "{warnings:?}");
}

#[test]
fn a_long_list_makes_few_tunnels_and_few_warnings() {
    let tags: Vec<String> = (0..10_000).map(|number| format!("KUBERNETES_PHASE:T{number}:1")).collect();
    let (tags, warnings) = outbounds(UserDataMode::Tunnels, &tags.join(","));
    assert_eq!(tags.len(), USER_DATA_TUNNELS_MAX);
    assert_eq!(warnings.len(), REFUSED_SHOWN + 1);
    let more = 10_000 - USER_DATA_TUNNELS_MAX - REFUSED_SHOWN;
    assert!(warnings[REFUSED_SHOWN].contains(&format!("{more} more tags refused")), "{warnings:?}");
    let (_, warnings) = outbounds(UserDataMode::Tunnels, &"\u{202e}x".repeat(100_000));
    assert!(warnings[0].len() < 1000 && !warnings[0].contains('\u{202e}'), "{warnings:?}");
}

#[test]
fn hosts_are_read_as_tags_read_them() {
    for text in ["/run/x", "", "a:0", "a:70000", "fd00::1", "1.2.3", "a b", "a:1:2", "A:B"] {
        assert!(text.parse::<AllowedHost>().is_err(), "{text}");
    }
}

#[test]
fn hosts_are_written_as_they_are_read() {
    for text in ["kbs.example", "kbs.example:8080", "10.0.0.1", "10.0.0.1:80", "[fd00::1]", "[fd00::1]:443"] {
        assert_eq!(text.parse::<AllowedHost>().unwrap().to_string(), text);
    }
}
