//! The settings that flags and environment variables result in.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "clippy.toml lets tests fail loudly; clippy does not take the helpers of an integration test for tests"
)]

use std::ffi::OsString;
use std::time::Duration;

use secure_comms_adaptor::key_source::KeySource;
use secure_comms_keys::WorkerNodeKey;
use secure_comms_node::cli::ConnectArgs;
use secure_comms_node::settings::{ConnectSettings, ExpectedInitData, UsageError};
use secure_comms_protocol::limits::REKEY_BYTES;

/// The built-in inbound.
const KATAAGENT: &str = "KUBERNETES_PHASE:KATAAGENT:/run/secure-comms/pods/{pod}/agent.ttrpc";

fn args() -> ConnectArgs {
    ConnectArgs { pod_id: Some("p1".into()), addresses: vec!["vm".into()], ..ConnectArgs::default() }
}

fn read(args: ConnectArgs, env: &[(&str, &str)]) -> Result<ConnectSettings, UsageError> {
    ConnectSettings::read(args, &|name| {
        env.iter().find(|(key, _)| *key == name).map(|(_, value)| OsString::from(value))
    })
}

fn shown<T: ToString>(tags: &[T]) -> Vec<String> {
    tags.iter().map(ToString::to_string).collect()
}

#[test]
fn a_pod_and_an_address_are_enough() {
    let settings = read(args(), &[]).unwrap();
    assert_eq!(shown(&settings.addresses), ["vm:2222"]);
    assert_eq!(shown(&settings.inbounds), [KATAAGENT]);
    assert_eq!(shown(&settings.outbounds), ["BOTH_PHASES:KBS:kbs-service.trustee-operator-system:8080"]);
    assert_eq!(settings.store.to_str(), Some("/var/lib/secure-comms-adaptor"));
    assert_eq!(
        (settings.deadline, settings.rekey_bytes, settings.delete_on_exit),
        (Duration::from_secs(300), REKEY_BYTES, false)
    );
    let KeySource::Kbs(kbs) = settings.key_source else { panic!("not the KBS") };
    assert_eq!(kbs.url.as_str(), "http://kbs-service.trustee-operator-system:8080/");
    assert!(kbs.ca.is_none() && kbs.admin.is_none());
}

#[test]
fn a_flag_wins_over_its_variable_and_an_empty_variable_is_none() {
    let env = [
        ("SECURE_COMMS", "true"),
        ("SECURE_COMMS_INBOUNDS", "BOTH_PHASES:A:1"),
        ("SECURE_COMMS_OUTBOUNDS", ""),
        ("SECURE_COMMS_KBS_ADDR", "[::1]:8080"),
    ];
    let settings = read(args(), &env).unwrap();
    assert_eq!(shown(&settings.inbounds), ["BOTH_PHASES:A:1", KATAAGENT]);
    assert_eq!(shown(&settings.outbounds), ["BOTH_PHASES:KBS:[::1]:8080"]);
    let flags = ConnectArgs { inbounds: vec!["BOTH_PHASES:B:2".into()], kbs: Some("kbs:1".into()), ..args() };
    let settings = read(flags, &env).unwrap();
    assert_eq!(shown(&settings.inbounds), ["BOTH_PHASES:B:2", KATAAGENT]);
    assert_eq!(shown(&settings.outbounds), ["BOTH_PHASES:KBS:kbs:1"]);
}

#[test]
fn the_built_in_inbound_is_a_socket_in_the_run_directory() {
    let flags = || ConnectArgs { run_dir: Some("/run/a/".into()), ..args() };
    let tag = |dir: &str| format!("KUBERNETES_PHASE:KATAAGENT:{dir}/pods/{{pod}}/agent.ttrpc");
    let env = [("SECURE_COMMS_RUN_DIR", "/b")];
    assert_eq!(shown(&read(flags(), &env).unwrap().inbounds), [tag("/run/a")]);
    assert_eq!(shown(&read(args(), &env).unwrap().inbounds), [tag("/b")]);
    let tcp = ConnectArgs { inbounds: vec!["KUBERNETES_PHASE:KATAAGENT:0".into()], ..flags() };
    assert_eq!(shown(&read(tcp, &[]).unwrap().inbounds), ["KUBERNETES_PHASE:KATAAGENT:0"]);
    for dir in ["run", "", "/x\n", &format!("/{}", "x".repeat(90))] {
        let fault = read(ConnectArgs { run_dir: Some(dir.into()), ..args() }, &[]).unwrap_err().to_string();
        assert!(fault.contains("expected an absolute path of at most 84 bytes"), "{dir}: {fault}");
    }
}

#[test]
fn the_agents_tunnels_are_those_of_the_flags_or_the_variables() {
    let env =
        [("SECURE_COMMS_PP_INBOUNDS", "BOTH_PHASES:A:1"), ("SECURE_COMMS_PP_OUTBOUNDS", "BOTH_PHASES:B:h:2")];
    let agent = read(args(), &env).unwrap().agent;
    assert_eq!(shown(&agent.inbounds), ["BOTH_PHASES:A:1"]);
    assert_eq!(shown(&agent.outbounds), ["BOTH_PHASES:B:h:2"]);
    assert_eq!(agent.kata_agent_sockets, ["/run/kata-agent/agent.sock", "/run/kata-containers/agent.sock"]);
    let flags = ConnectArgs {
        pp_inbounds: vec!["BOTH_PHASES:C:podns:3".into()],
        pp_outbounds: vec![String::new()],
        kata_agent_sockets: vec!["/a".into(), "/b".into()],
        ..args()
    };
    let agent = read(flags, &env).unwrap().agent;
    assert_eq!(shown(&agent.inbounds), ["BOTH_PHASES:C:podns:3"]);
    assert!(agent.outbounds.is_empty());
    assert_eq!(agent.kata_agent_sockets, ["/a", "/b"]);
    let flags = ConnectArgs {
        pp_inbounds: vec!["x".into()],
        pp_outbounds: vec!["y".into()],
        kata_agent_sockets: vec!["z".into()],
        ..args()
    };
    let faults = read(flags, &[]).unwrap_err();
    let faults: Vec<&str> = faults.faults().collect();
    assert!(
        faults[0].starts_with("--pp-inbounds: ") && faults[1].starts_with("--pp-outbounds: "),
        "{faults:?}"
    );
    assert_eq!(faults[2], "--kata-agent-socket 'z': expected an absolute path");
}

#[test]
fn the_filter_is_on_unless_it_is_switched_off() {
    let filter = |flag: Option<&str>, env: &[(&str, &str)]| {
        read(ConnectArgs { kbs_filter: flag.map(Into::into), ..args() }, env)
            .map(|settings| settings.kbs_filter)
            .map_err(|fault| fault.to_string())
    };
    assert_eq!(filter(None, &[]), Ok(true));
    assert_eq!(filter(Some("off"), &[]), Ok(false));
    assert_eq!(filter(None, &[("SECURE_COMMS_KBS_FILTER", "OFF")]), Ok(false));
    assert_eq!(filter(Some("on"), &[("SECURE_COMMS_KBS_FILTER", "off")]), Ok(true));
    assert_eq!(filter(Some("no"), &[]), Err("--kbs-filter 'no': expected on or off".to_owned()));
}

#[test]
fn without_trustee_there_is_no_kbs_tunnel() {
    for (flag, env) in [(true, ""), (false, "true")] {
        let env = [("SECURE_COMMS_NO_TRUSTEE", env), ("SECURE_COMMS_KBS_ADDR", "kbs:1")];
        let env = if flag { &env[1..] } else { &env[..] };
        let settings = read(ConnectArgs { no_trustee: flag, ..args() }, env).unwrap();
        assert!(matches!(settings.key_source, KeySource::UserData));
        assert_eq!(shown(&settings.outbounds), [""; 0]);
    }
}

#[test]
fn the_publish_url_may_differ_from_the_tunnel_target() {
    let flags = ConnectArgs {
        kbs: Some("10.0.0.1:8080".into()),
        kbs_url: Some("https://kbs.example/trustee/".into()),
        kbs_ca: Some("ca.pem".into()),
        kbs_admin_key: Some("key.pem".into()),
        ..args()
    };
    let settings = read(flags, &[]).unwrap();
    assert_eq!(shown(&settings.outbounds), ["BOTH_PHASES:KBS:10.0.0.1:8080"]);
    let KeySource::Kbs(kbs) = settings.key_source else { panic!("not the KBS") };
    let admin = kbs.admin.unwrap();
    assert_eq!(kbs.url.as_str(), "https://kbs.example/trustee/");
    assert_eq!((admin.issuer.as_str(), admin.role.as_str()), ("secure-comms-adaptor", "admin"));
}

#[test]
fn the_same_address_twice_is_one() {
    let flags = ConnectArgs {
        addresses: vec!["vm".into(), "::1".into(), "vm:2222".into(), "[::1]:2222".into()],
        ..args()
    };
    assert_eq!(shown(&read(flags, &[]).unwrap().addresses), ["vm:2222", "[::1]:2222"]);
}

#[test]
fn a_repeated_list_of_tags_is_joined() {
    let lists = ["BOTH_PHASES:A:1,KUBERNETES_PHASE:B:2", "", "kubernetes_phase:C:3"];
    let flags = ConnectArgs { inbounds: lists.map(Into::into).into(), ..args() };
    let settings = read(flags, &[("SECURE_COMMS_INBOUNDS", "BOTH_PHASES:X:9")]).unwrap();
    assert_eq!(
        shown(&settings.inbounds),
        ["BOTH_PHASES:A:1", "KUBERNETES_PHASE:B:2", "KUBERNETES_PHASE:C:3", KATAAGENT]
    );
    let flags = ConnectArgs { outbounds: vec!["BOTH_PHASES:A:1".into(), "BOTH_PHASES:a:2".into()], ..args() };
    let fault = read(flags, &[]).unwrap_err().to_string();
    assert!(fault.contains("'BOTH_PHASES:A:127.0.0.1:1' has it too"), "a name twice, in two flags: {fault}");
    // A flag that is given and empty overrides the variable.
    let flags = ConnectArgs { inbounds: vec![String::new()], ..args() };
    let settings = read(flags, &[("SECURE_COMMS_INBOUNDS", "BOTH_PHASES:X:9")]).unwrap();
    assert_eq!(shown(&settings.inbounds), [KATAAGENT]);
}

#[test]
fn times_and_sizes_take_units() {
    let flags = ConnectArgs { deadline: Some("1h30m".into()), rekey_bytes: Some("1GiB".into()), ..args() };
    let settings = read(flags, &[]).unwrap();
    assert_eq!((settings.deadline, settings.rekey_bytes), (Duration::from_secs(5400), 1 << 30));
    for deadline in ["0", "0s", "24h1s", "86401", "soon"] {
        let fault = read(ConnectArgs { deadline: Some(deadline.into()), ..args() }, &[]).unwrap_err();
        assert_eq!(
            fault.to_string(),
            format!("--deadline '{deadline}': expected a time from 1s to 24h, such as 90s, 5m or 1h30m")
        );
    }
    for size in ["1023K", "1MB", "33GiB"] {
        let fault = read(ConnectArgs { rekey_bytes: Some(size.into()), ..args() }, &[]).unwrap_err();
        assert_eq!(
            fault.to_string(),
            format!(
                "--rekey-bytes '{size}': expected a size from 1MiB to 32GiB, such as 64MiB, 1GiB or bytes"
            )
        );
    }
}

#[test]
fn an_ipv6_address_that_may_lack_brackets_is_warned_of() {
    let warnings = |address: &str| {
        let flags = ConnectArgs { addresses: vec![address.into()], no_trustee: true, ..args() };
        read(flags, &[]).unwrap().warnings
    };
    assert_eq!(
        warnings("::1:2222"),
        [
            "--address '::1:2222': taken as the address ::1:2222, port 2222; for port 2222 of ::1 write [::1]:2222"
        ]
    );
    assert_eq!(warnings("fd00::7:443").len(), 1);
    for address in
        ["::1", "fd00::7", "fd00::1:2", "[::1:2222]", "[::1]:2222", "1:2:3:4:5:6:7:2222", "fd00::abcd"]
    {
        assert_eq!(warnings(address), [""; 0], "{address}");
    }
}

#[test]
fn booleans_are_read_in_any_case_and_empty_is_unset() {
    for (value, no_trustee) in [("TRUE", true), ("True", true), ("False", false), ("", false)] {
        let settings = read(args(), &[("SECURE_COMMS_NO_TRUSTEE", value), ("SECURE_COMMS", "")]).unwrap();
        assert_eq!(matches!(settings.key_source, KeySource::UserData), no_trustee, "{value}");
    }
}

/// The faults, or the init-data and the worker nodes.
fn bound(args: ConnectArgs, env: &[(&str, &str)]) -> Result<ConnectSettings, String> {
    read(args, env).map_err(|error| error.to_string())
}

#[test]
fn the_expected_init_data_comes_from_one_source() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(path("toml"), "algorithm = \"sha256\"\n").unwrap();
    let rules = "[[rule]]\nnamespace = \"n\"\npod = \"*\"\nfile = \"toml\"\n[[rule]]\nnamespace = \"u\"\npod = \"*\"\nunbound = true\n";
    std::fs::write(path("rules"), rules).unwrap();
    let digest = ExpectedInitData::Digest("2d".repeat(32).parse().unwrap());
    let of_file = bound(ConnectArgs { init_data: Some(path("toml")), ..args() }, &[]).unwrap().init_data;
    assert!(matches!(of_file, ExpectedInitData::Digest(_)) && of_file != digest);
    let hex = Some("2D".repeat(32));
    let flags = ConnectArgs { init_data_digest: hex.clone(), ..args() };
    assert_eq!(bound(flags.clone(), &[]).unwrap().init_data, digest);
    // A flag wins over any variable.
    let variables =
        [("SECURE_COMMS_INIT_DATA", path("toml")), ("SECURE_COMMS_INIT_DATA_RULES", path("rules"))];
    let variables: Vec<_> = variables.iter().map(|(name, value)| (*name, value.as_str())).collect();
    assert_eq!(bound(flags, &variables).unwrap().init_data, digest);
    assert_eq!(bound(args(), &variables[..1]).unwrap().init_data, of_file);
    let fault = bound(args(), &variables).unwrap_err();
    assert!(fault.starts_with("SECURE_COMMS_INIT_DATA_RULES: contradicts another source"), "{fault}");
    let two = ConnectArgs { init_data: Some(path("toml")), init_data_digest: hex, ..args() };
    let fault = bound(two, &[]).unwrap_err();
    assert_eq!(
        fault,
        "--init-data-digest: contradicts another source of init-data: give one of --init-data, --init-data-digest"
    );
    let by_rules = |pod: Option<&str>| ConnectArgs {
        init_data_rules: Some(path("rules")),
        pod: pod.map(Into::into),
        ..args()
    };
    assert_eq!(bound(by_rules(Some("n/x")), &[]).unwrap().init_data, of_file);
    assert_eq!(bound(by_rules(None), &[("SECURE_COMMS_POD", "n/x")]).unwrap().init_data, of_file);
    assert_eq!(bound(by_rules(Some("u/x")), &[]).unwrap().init_data, ExpectedInitData::Unbound);
    for (flags, expected) in [
        (by_rules(Some("m/x")), "no rule matches pod m/x"),
        (by_rules(Some("m")), "--pod 'm': expected NAMESPACE/NAME"),
        (by_rules(None), "--init-data-rules: needs --pod"),
        (ConnectArgs { pod: Some("n/x".into()), ..args() }, "--pod: needs --init-data-rules"),
        (ConnectArgs { init_data: Some(path("none")), ..args() }, "none: No such file"),
        (
            ConnectArgs { init_data_digest: Some("2d".into()), ..args() },
            "--init-data-digest '2d': not a digest",
        ),
        (
            ConnectArgs { no_trustee: true, ..by_rules(Some("n/x")) },
            "--init-data-rules: contradicts --no-trustee",
        ),
        (
            ConnectArgs { no_trustee: true, allow_old_agents: true, ..args() },
            "--allow-old-agents: contradicts",
        ),
    ] {
        let fault = bound(flags, &[]).unwrap_err();
        assert!(fault.contains(expected), "{expected}: {fault}");
    }
    assert_eq!(bound(args(), &[]).unwrap().init_data, ExpectedInitData::AsBefore);
}

#[test]
fn further_worker_nodes_are_public_keys_in_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("nodes");
    let flags = || ConnectArgs { worker_node_keys: Some(file.to_str().unwrap().into()), ..args() };
    let key = WorkerNodeKey::generate().unwrap().public().unwrap();
    std::fs::write(&file, key.authorized_keys_line().unwrap()).unwrap();
    let settings = bound(flags(), &[]).unwrap();
    assert!(settings.worker_nodes.unwrap().matches(&key.ssh()));
    assert!(
        !settings.old_agents
            && bound(flags(), &[("SECURE_COMMS_ALLOW_OLD_AGENTS", "true")]).unwrap().old_agents
    );
    for (content, expected) in [
        (Vec::new(), "no"),
        (b"-----BEGIN OPENSSH PRIVATE KEY-----".to_vec(), "line 1"),
        (vec![b'#'; 49 * 1024], "longer than 48 KiB"),
    ] {
        std::fs::write(&file, content).unwrap();
        let fault = bound(flags(), &[]).unwrap_err();
        assert!(fault.starts_with("--worker-node-keys: ") && fault.contains(expected), "{fault}");
    }
}

#[test]
fn a_kbs_that_gives_too_much_away_is_warned_of() {
    let read_with = |kbs: &str, url: Option<&str>, key: bool, filter: Option<&str>| {
        let kbs_admin_key = key.then(|| "admin.pem".into());
        let (kbs, kbs_url, kbs_filter) = (Some(kbs.into()), url.map(Into::into), filter.map(Into::into));
        read(ConnectArgs { kbs, kbs_url, kbs_admin_key, kbs_filter, ..args() }, &[]).unwrap().warnings
    };
    let warnings = |kbs: &str, url: Option<&str>, key: bool| read_with(kbs, url, key, None);
    let unfiltered = |kbs: &str, url: Option<&str>, key: bool| read_with(kbs, url, key, Some("off"));
    let same = "--kbs and --kbs-url are the same place";
    let clear = "--kbs-admin-key over http://";
    for (found, expected) in [
        // The filter of the tunnel lets nobody reach the admin API.
        (warnings("kbs:8080", None, false), vec![]),
        (warnings("kbs:8080", None, true), vec![clear]),
        (unfiltered("kbs:8080", None, false), vec![same]),
        (unfiltered("kbs:8080", None, true), vec![clear, same]),
        (unfiltered("kbs:8080", Some("http://KBS:8080/kbs/v0"), false), vec![same]),
        (warnings("kbs:443", Some("https://kbs"), true), vec![same]),
        (unfiltered("[::1]:80", Some("http://[0::1]"), false), vec![same]),
        (warnings("kbs:8080", Some("http://kbs:8081"), true), vec![clear]),
        (warnings("kbs:8080", Some("https://admin:8080"), true), vec![]),
    ] {
        assert_eq!(found.len(), expected.len(), "{found:?}");
        assert!(
            found.iter().zip(&expected).all(|(found, expected)| found.starts_with(expected)),
            "{found:?}"
        );
    }
}
