use std::ffi::OsString;

use base64ct::{Base64, Encoding};
use secure_comms_protocol::tag::Target;

use super::*;

#[path = "../../keys/testdata/variants.rs"]
mod variants;

const PRIVATE: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../keys/testdata/ed25519.openssh"));
const PUBLIC: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../keys/testdata/ed25519.pub"));

fn options(args: &[&str]) -> Options {
    crate::config::flags::parse(args.iter().map(OsString::from)).unwrap()
}

fn base64(text: &str) -> String {
    Base64::encode_string(text.as_bytes())
}

fn daemon(json: &str) -> DaemonConfig {
    DaemonConfig::read(json.as_bytes(), UserDataMode::All).unwrap()
}

fn resolve(args: &[&str], json: &str) -> Result<Config, ConfigError> {
    resolve_with(args, json, "")
}

fn resolve_with(args: &[&str], json: &str, init_data: &str) -> Result<Config, ConfigError> {
    let options = options(args);
    let daemon = Some(DaemonConfig::read(json.as_bytes(), options.user_data).unwrap());
    let init_data = (!init_data.is_empty()).then(|| init_data::parse(init_data.as_bytes()).unwrap());
    Config::resolve(options, Inputs { daemon, init_data, digest: None })
}

const ALL: &str = "-secure-comms-user-data=all";
const TUNNELS: &str = "-secure-comms-user-data=tunnels";

#[test]
fn unknown_keys_are_ignored_and_null_is_absent() {
    let text =
        r#"{"pod-network":{"podip":""},"tls-server-key":"x","sc":null,"pod-name":"p","pod-namespace":"n"}"#;
    assert_eq!(daemon(text).sc, None);
    assert_eq!(resolve(&["-secure-comms"], text).unwrap().pod.unwrap(), "n/p");
}

#[test]
fn without_secure_comms_the_error_says_what_to_set() {
    for (args, json) in [
        (&[][..], "{}"),
        (&[ALL], "{}"),
        (&[ALL], r#"{"sc":false}"#),
        (&[], r#"{"sc":true}"#),
        (&[TUNNELS], r#"{"sc":true}"#),
    ] {
        let text = resolve(args, json).unwrap_err().to_string();
        for part in ["the flag -secure-comms,", "-secure-comms-user-data all", r#""sc": true"#] {
            assert!(text.contains(part), "{part:?} is not in {text:?}");
        }
    }
    let text = Config::resolve(options(&["-config", "/a.json"]), Inputs::default()).unwrap_err().to_string();
    assert!(text.contains("/a.json"), "{text}");
}

#[test]
fn the_flag_alone_means_keys_from_the_kbs() {
    let config = Config::resolve(options(&["-secure-comms"]), Inputs::default()).unwrap();
    assert!(matches!(config.source, KeySource::Kbs { worker_node: None }));
    let json = format!(r#"{{"sc-wn-pub":"{}"}}"#, base64(PUBLIC));
    for mode in [ALL, TUNNELS] {
        let config = resolve(&["-secure-comms", mode], &json).unwrap();
        assert!(matches!(config.source, KeySource::Kbs { worker_node: Some(_) }));
        assert!(resolve(&[mode], &json).is_err(), "a key does not switch Secure Comms on");
    }
    let config = resolve(&["-secure-comms"], &json).unwrap();
    assert!(matches!(config.source, KeySource::Kbs { worker_node: None }));
}

#[test]
fn user_data_with_both_keys_means_no_attestation() {
    let mut wrapped = base64(PRIVATE);
    wrapped.insert_str(60, "\\n");
    let json = format!(r#"{{"sc":true,"sc-pp-prv":"{wrapped}","sc-wn-pub":"{}"}}"#, base64(PUBLIC));
    for args in [&[ALL][..], &["-secure-comms", ALL]] {
        let config = resolve(args, &json).unwrap();
        assert!(matches!(config.source, KeySource::UserData(_)));
        assert!(!format!("{config:?} {:?}", daemon(&json)).contains(&base64(PRIVATE)[100..150]));
    }
}

#[test]
fn user_data_takes_every_text_that_the_other_readers_take() {
    let both = |private: &[u8], public: &[u8]| {
        let [private, public] = [private, public].map(Base64::encode_string);
        resolve(&[ALL], &format!(r#"{{"sc":true,"sc-pp-prv":"{private}","sc-wn-pub":"{public}"}}"#))
    };
    for (what, text) in variants::private_keys() {
        assert!(both(&text, PUBLIC.as_bytes()).is_ok(), "{what}");
    }
    for (what, text) in variants::authorized_keys() {
        assert!(both(PRIVATE.as_bytes(), &text).is_ok(), "{what}");
        let alone = format!(r#"{{"sc-wn-pub":"{}"}}"#, Base64::encode_string(&text));
        assert!(resolve(&["-secure-comms", TUNNELS], &alone).is_ok(), "{what}");
    }
    for (text, part) in variants::no_private_keys() {
        let error = both(&text, PUBLIC.as_bytes()).unwrap_err().to_string();
        assert!(error.contains(part), "{part:?} is not in {error:?}");
    }
}

#[test]
fn user_data_that_is_not_whole_never_falls_back_to_attestation() {
    let (private, public) = (base64(PRIVATE), base64(PUBLIC));
    let both = |private: &str, public: &str| {
        format!(r#"{{"sc":true,"sc-pp-prv":"{private}","sc-wn-pub":"{public}"}}"#)
    };
    for (json, parts) in [
        (r#"{"sc":true}"#.to_owned(), &["'sc-pp-prv' and 'sc-wn-pub' are missing"][..]),
        (format!(r#"{{"sc":true,"sc-wn-pub":"{public}"}}"#), &["'sc-pp-prv' is missing", "give both"]),
        (format!(r#"{{"sc":true,"sc-pp-prv":"{private}"}}"#), &["'sc-wn-pub' is missing", "give both"]),
        (format!(r#"{{"sc-pp-prv":"{private}"}}"#), &["'sc' is not true", "remove it"]),
        (format!(r#"{{"sc":false,"sc-pp-prv":"{private}","sc-wn-pub":"{public}"}}"#), &["'sc' is not true"]),
        (both("%", &public), &["'sc-pp-prv'", "not base64", "base64 -w0"]),
        (both("", &public), &["'sc-pp-prv'", "it is empty"]),
        (both(&private, "%"), &["'sc-wn-pub'", "not base64"]),
        (both(&private, ""), &["'sc-wn-pub'", "it is empty"]),
        (both(&public, &public), &["'sc-pp-prv'", "not PEM"]),
        (both(&private, &private), &["'sc-wn-pub'", "not a public key"]),
        (r#"{"sc-wn-pub":""}"#.to_owned(), &["'sc-wn-pub'", "it is empty"]),
        (r#"{"sc-wn-pub":"AAAA"}"#.to_owned(), &["'sc-wn-pub'"]),
    ] {
        let text = resolve(&["-secure-comms", ALL, "-config=/a.json"], &json).unwrap_err().to_string();
        for part in parts.iter().copied().chain(["/a.json"]) {
            assert!(text.contains(part), "{part:?} is not in {text:?}");
        }
        assert!(!text.contains(&private), "{text}");
    }
}

fn names(tags: &[impl ToString]) -> String {
    tags.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

#[test]
fn tags_of_every_source_add_up_with_what_is_built_in() {
    let config = resolve_with(
        &[
            "-secure-comms",
            TUNNELS,
            "-secure-comms-inbounds=KUBERNETES_PHASE:A:1",
            "-kata-agent-socket=/k.sock",
        ],
        r#"{"sc-inbounds":"KUBERNETES_PHASE:B:podns:2,","sc-outbounds":"KUBERNETES_PHASE:C:3"}"#,
        "sc-inbounds = 'KUBERNETES_PHASE:D:4'\nsc-outbounds = 'KUBERNETES_PHASE:E:any.example:5'",
    )
    .unwrap();
    assert_eq!(
        names(&config.inbounds),
        "KUBERNETES_PHASE:A:1 KUBERNETES_PHASE:D:4 KUBERNETES_PHASE:B:podns:2 BOTH_PHASES:KBS:8080"
    );
    assert_eq!(config.outbounds.len(), 3);
    assert_eq!(config.outbounds[2].target, Target::Unix("/k.sock".into()));
    assert_eq!(config.outbounds[2].to_string(), "KUBERNETES_PHASE:KATAAGENT:/k.sock");
    let moved = resolve(&["-secure-comms", "-secure-comms-inbounds=BOTH_PHASES:KBS:8081"], "{}").unwrap();
    assert_eq!(
        names(&moved.inbounds),
        "BOTH_PHASES:KBS:8081",
        "the operator's KBS replaces the built-in one"
    );
}

#[test]
fn every_fault_of_the_tags_of_flags_is_reported_together() {
    let args = [
        "-secure-comms",
        "-secure-comms-inbounds=KUBERNETES_PHASE:A:1,X:B:2,KUBERNETES_PHASE:a:3",
        "-secure-comms-outbounds=KUBERNETES_PHASE:C:0",
    ];
    let text = resolve(&args, "{}").unwrap_err().to_string();
    for part in [
        "-secure-comms-inbounds: tag 'X:B:2': phase",
        "tag 'KUBERNETES_PHASE:a:3': name",
        "-secure-comms-outbounds: tag 'KUBERNETES_PHASE:C:0': port",
        "correct the tags where they are given",
    ] {
        assert!(text.contains(part), "{part:?} is not in {text:?}");
    }
}

/// What the cloud would have the agent do.
const HOSTILE: &str = r#"{"sc":true,"sc-pp-prv":"SECRET","sc-wn-pub":"SECRET",
    "sc-inbounds":"BOTH_PHASES:KBS:9", "sc-outbounds":"ATTESTATION_PHASE:PWN:/run/systemd/private,KUBERNETES_PHASE:A:1"}"#;

#[test]
fn by_default_user_data_decides_nothing_but_the_pods_network() {
    let plain = resolve(&["-secure-comms"], "{}").unwrap();
    for json in [
        HOSTILE,
        // Of the wrong type, no UTF-16, given twice: what is ignored decides nothing.
        r#"{"sc":"yes","sc-pp-prv":[1],"sc-wn-pub":{"a":1},"sc-inbounds":7,"sc-outbounds":"\ud800"}"#,
        r#"{"sc":1,"sc":2,"sc-pp-prv":"","sc-pp-prv":"","sc-wn-pub":0,"sc-inbounds":0,"sc-outbounds":0}"#,
    ] {
        let config = resolve(&["-secure-comms", "-config=/a.json"], json).unwrap();
        assert!(matches!(config.source, KeySource::Kbs { worker_node: None }), "{json}");
        assert_eq!(names(&config.inbounds), names(&plain.inbounds));
        assert_eq!(names(&config.outbounds), names(&plain.outbounds));
        for (key, mode) in [
            ("sc", "all"),
            ("sc-pp-prv", "all"),
            ("sc-wn-pub", "tunnels"),
            ("sc-inbounds", "tunnels"),
            ("sc-outbounds", "tunnels"),
        ] {
            let start = format!("/a.json: '{key}' ignored: ");
            let warnings: Vec<_> = config.warnings.iter().filter(|text| text.starts_with(&start)).collect();
            assert_eq!(warnings.len(), 1, "{key}: {:?}", config.warnings);
            assert!(warnings[0].contains(&format!("-secure-comms-user-data {mode} ")), "{warnings:?}");
        }
        assert!(!config.warnings.concat().contains("SECRET"), "{:?}", config.warnings);
    }
    let nothing = r#"{"sc":null,"sc-inbounds":null}"#;
    assert_eq!(resolve(&["-secure-comms"], nothing).unwrap().warnings, plain.warnings);
}

#[test]
fn with_tunnels_user_data_decides_no_keys() {
    let json = format!(
        r#"{{"sc":true,"sc-pp-prv":"{}","sc-wn-pub":"{}","sc-outbounds":"KUBERNETES_PHASE:A:1"}}"#,
        base64(PRIVATE),
        base64(PUBLIC)
    );
    let config = resolve(&["-secure-comms", TUNNELS], &json).unwrap();
    assert!(matches!(config.source, KeySource::Kbs { worker_node: Some(_) }), "it restricts who attests");
    assert_eq!(config.outbounds.len(), 2);
    let ignored = config.warnings.iter().filter(|text| text.contains("' ignored: "));
    assert_eq!(ignored.count(), 2, "{:?}", config.warnings);
    // A restriction that can't be read is not left out.
    assert!(resolve(&["-secure-comms", TUNNELS], r#"{"sc-wn-pub":"%"}"#).is_err());
}

#[test]
fn a_tag_that_is_refused_says_its_source_and_the_other_one() {
    let json = r#"{"sc-inbounds":"KUBERNETES_PHASE:A:3,KUBERNETES_PHASE:B:4,KUBERNETES_PHASE:C:5"}"#;
    let args = ["-secure-comms", TUNNELS, "-secure-comms-inbounds=KUBERNETES_PHASE:A:1"];
    let config = resolve_with(&args, json, "sc-inbounds = 'KUBERNETES_PHASE:B:2'").unwrap();
    assert_eq!(config.inbounds.len(), 4);
    let text = config.warnings.join("\n");
    for part in [
        "user data: 'sc-inbounds': tag 'KUBERNETES_PHASE:A:3' refused",
        "'KUBERNETES_PHASE:A:1' of -secure-comms-inbounds has it too",
        "tag 'KUBERNETES_PHASE:B:4' refused",
        "'KUBERNETES_PHASE:B:2' of init-data has it too",
    ] {
        assert!(text.contains(part), "{part:?} is not in {text:?}");
    }
    let error = resolve_with(&args, "{}", "sc-inbounds = 'KUBERNETES_PHASE:a:2'").unwrap_err().to_string();
    assert!(
        error.contains("init-data's sc-inbounds: tag 'KUBERNETES_PHASE:a:2'")
            && error.contains("'KUBERNETES_PHASE:A:1' of -secure-comms-inbounds"),
        "{error}"
    );
}

#[test]
fn init_data_counts_only_with_keys_from_the_kbs() {
    let keys = format!(r#"{{"sc":true,"sc-pp-prv":"{}","sc-wn-pub":"{}"}}"#, base64(PRIVATE), base64(PUBLIC));
    let toml =
        format!("sc-outbounds = 'KUBERNETES_PHASE:A:1'\nsc-pod-id = 'p'\nsc-wn-pub = '{}'", PUBLIC.trim());
    let config = resolve_with(&["-secure-comms"], "{}", &toml).unwrap();
    assert_eq!((config.outbounds.len(), config.pod_id.unwrap().as_str()), (2, "p"));
    assert!(matches!(config.source, KeySource::Kbs { worker_node: Some(_) }));
    let config = resolve_with(&[ALL], &keys, &toml).unwrap();
    assert!(config.outbounds.len() == 1 && config.pod_id.is_none());
    assert!(config.warnings.concat().contains("secure-comms.toml ignored"), "{:?}", config.warnings);
}

#[test]
fn flag_and_init_data_name_one_pod() {
    let resolve = |flag| resolve_with(&["-secure-comms", flag], "{}", "sc-pod-id = 'p'");
    assert_eq!(resolve("-secure-comms-pod-id=p").unwrap().pod_id.unwrap().as_str(), "p");
    let error = resolve("-secure-comms-pod-id=q").unwrap_err();
    assert!(error.to_string().contains("names pod p, and -secure-comms-pod-id names pod q"), "{error}");
    assert_eq!(error.exit_code(), 1);
}

#[test]
fn a_start_without_a_digest_of_init_data_is_warned_of() {
    let warns = |args: &[&str], part| {
        let config = resolve(args, "{}").unwrap();
        assert_eq!(config.warnings.len(), 1, "{:?}", config.warnings);
        assert!(config.warnings[0].contains(part), "{part:?} is not in {:?}", config.warnings);
    };
    warns(&["-secure-comms"], "no digest of init-data: /run/peerpod/initdata.digest does not exist");
    warns(&["-secure-comms", "-secure-comms-init-data-digest="], "-secure-comms-init-data-digest is empty");
    warns(&["-secure-comms", "-secure-comms-separate-resources"], "nothing binds the pod's key");
    let digest = Some("0".repeat(64).parse().unwrap());
    let config =
        Config::resolve(options(&["-secure-comms"]), Inputs { digest, ..Inputs::default() }).unwrap();
    assert!(config.warnings.is_empty() && config.init_data.is_some(), "{:?}", config.warnings);
}

#[test]
fn a_configuration_that_no_hello_can_carry_is_refused_at_the_start() {
    let flag = |count: usize| {
        let tags: Vec<_> = (0..count)
            .map(|number| format!("KUBERNETES_PHASE:TUNNEL{number}:host{number}.example:8080"))
            .collect();
        format!("-secure-comms-outbounds={}", tags.join(","))
    };
    assert!(Config::check_flags(&options(&["-secure-comms", &flag(200)])).is_ok());
    let error = Config::check_flags(&options(&["-secure-comms", &flag(2000)])).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().contains("longer than a control line may be (65536)"), "{error}");
}

#[test]
fn an_empty_pod_network_counts_as_none() {
    let whole = r#"{"pod-network":{"podip":"10.244.1.7/24","interface":"eth0","worker-node-ip":"10.0.0.9/24",
        "tunnel-type":"vxlan"}}"#;
    assert!(resolve(&["-secure-comms"], whole).unwrap().pod_network.is_some());
    for json in ["{}", r#"{"pod-network":null}"#, r#"{"pod-network":{"podip":"","mtu":0,"routes":null}}"#] {
        assert!(
            resolve(&["-secure-comms", "-pod-namespace="], json).unwrap().pod_network.is_none(),
            "{json}"
        );
    }
    for (args, json, code, parts) in [
        (
            &["-config=/a.json"][..],
            r#"{"pod-network":{"podip":"x"}}"#,
            1,
            &["/a.json", "'podip': 'x'", "'interface': missing"][..],
        ),
        (&["-pod-namespace="], whole, 1, &["-pod-namespace is empty", "take 'pod-network' out"]),
        (&["-host-interface", "a/b"], whole, 2, &["-host-interface: 'a/b'", "an interface's name"]),
    ] {
        let args: Vec<_> = ["-secure-comms"].iter().chain(args).copied().collect();
        let error = resolve(&args, json).unwrap_err();
        assert_eq!(error.exit_code(), code);
        let text = error.to_string();
        for part in parts {
            assert!(text.contains(part), "{part:?} is not in {text:?}");
        }
    }
    let fault = |json: &str| DaemonConfig::read(json.as_bytes(), UserDataMode::None).unwrap_err().to_string();
    assert!(fault(r#"{"pod-network": "eth0"}"#).contains("key 'pod-network'"));
    assert!(fault(r#"{"pod-network": ["10.244.1.7/24"]}"#).contains("expected an object"));
    assert!(fault(r#"{"pod-network": {"mtu": 1, "mtu": 2}}"#).contains("duplicate field"));
}

#[test]
fn a_kata_agent_socket_that_no_socket_can_have_is_refused() {
    for path in [format!("/{}", "x".repeat(200)), "/run/".into()] {
        let text = resolve(&["-secure-comms", "-kata-agent-socket", &path], "{}").unwrap_err().to_string();
        assert!(text.contains("-kata-agent-socket") && text.contains("at most 107 bytes"), "{text}");
    }
}

#[test]
fn faults_of_flags_are_found_without_a_daemon_config() {
    for args in [&[ALL][..], &["-secure-comms"]] {
        assert!(Config::check_flags(&options(args)).is_ok(), "{args:?}");
    }
    let wrong =
        [&["-secure-comms-inbounds", "NO_PHASE:x:1"][..], &["-secure-comms-outbounds", "KUBERNETES_PHASE:q"]];
    for args in wrong {
        assert_eq!(Config::check_flags(&options(args)).unwrap_err().exit_code(), 2, "{args:?}");
    }
}
