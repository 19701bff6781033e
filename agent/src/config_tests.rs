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
    serde_json::from_str(json).unwrap()
}

fn resolve(args: &[&str], json: &str) -> Result<Config, ConfigError> {
    Config::resolve(options(args), Some(daemon(json)))
}

#[test]
fn unknown_keys_are_ignored_and_null_is_absent() {
    let text =
        r#"{"pod-network":{"podip":""},"tls-server-key":"x","sc":null,"pod-name":"p","pod-namespace":"n"}"#;
    assert_eq!(daemon(text).sc, None);
    assert_eq!(resolve(&["-secure-comms"], text).unwrap().pod.unwrap(), "n/p");
}

#[test]
fn without_secure_comms_the_error_says_what_to_set() {
    for json in ["{}", r#"{"sc":false}"#] {
        let text = resolve(&[], json).unwrap_err().to_string();
        assert!(text.contains("-secure-comms") && text.contains(r#""sc": true"#), "{text}");
    }
    let text = Config::resolve(options(&["-config", "/a.json"]), None).unwrap_err().to_string();
    assert!(text.contains("/a.json"), "{text}");
}

#[test]
fn the_flag_alone_means_keys_from_the_kbs() {
    let config = Config::resolve(options(&["-secure-comms"]), None).unwrap();
    assert!(matches!(config.source, KeySource::Kbs { worker_node: None }));
    let json = format!(r#"{{"sc-wn-pub":"{}"}}"#, base64(PUBLIC));
    let config = resolve(&["-secure-comms"], &json).unwrap();
    assert!(matches!(config.source, KeySource::Kbs { worker_node: Some(_) }));
    assert!(resolve(&[], &json).is_err(), "a key does not switch Secure Comms on");
}

#[test]
fn user_data_with_both_keys_means_no_attestation() {
    let mut wrapped = base64(PRIVATE);
    wrapped.insert_str(60, "\\n");
    let json = format!(r#"{{"sc":true,"sc-pp-prv":"{wrapped}","sc-wn-pub":"{}"}}"#, base64(PUBLIC));
    for args in [&[][..], &["-secure-comms"]] {
        let config = resolve(args, &json).unwrap();
        assert!(matches!(config.source, KeySource::UserData(_)));
        assert!(!format!("{config:?} {:?}", daemon(&json)).contains(&base64(PRIVATE)[100..150]));
    }
}

#[test]
fn user_data_takes_every_text_that_the_other_readers_take() {
    let both = |private: &[u8], public: &[u8]| {
        let [private, public] = [private, public].map(Base64::encode_string);
        resolve(&[], &format!(r#"{{"sc":true,"sc-pp-prv":"{private}","sc-wn-pub":"{public}"}}"#))
    };
    for (what, text) in variants::private_keys() {
        assert!(both(&text, PUBLIC.as_bytes()).is_ok(), "{what}");
    }
    for (what, text) in variants::authorized_keys() {
        assert!(both(PRIVATE.as_bytes(), &text).is_ok(), "{what}");
        let alone = format!(r#"{{"sc-wn-pub":"{}"}}"#, Base64::encode_string(&text));
        assert!(resolve(&["-secure-comms"], &alone).is_ok(), "{what}");
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
        let text = resolve(&["-secure-comms", "-config=/a.json"], &json).unwrap_err().to_string();
        for part in parts.iter().copied().chain(["/a.json"]) {
            assert!(text.contains(part), "{part:?} is not in {text:?}");
        }
        assert!(!text.contains(&private), "{text}");
    }
}

#[test]
fn tags_of_flags_and_file_add_up_with_what_is_built_in() {
    let config = resolve(
        &["-secure-comms", "-secure-comms-inbounds=KUBERNETES_PHASE:A:1", "-kata-agent-socket=/k.sock"],
        r#"{"sc-inbounds":"KUBERNETES_PHASE:B:podns:2,","sc-outbounds":"KUBERNETES_PHASE:C:3"}"#,
    )
    .unwrap();
    let names = |tags: &[InboundTag]| tags.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
    assert_eq!(
        names(&config.inbounds),
        "KUBERNETES_PHASE:A:1 KUBERNETES_PHASE:B:podns:2 BOTH_PHASES:KBS:8080"
    );
    assert_eq!(config.outbounds.len(), 2);
    assert_eq!(config.outbounds[1].target, Target::Unix("/k.sock".into()));
    assert_eq!(config.outbounds[1].to_string(), "KUBERNETES_PHASE:KATAAGENT:/k.sock");
    let moved = resolve(&["-secure-comms"], r#"{"sc-inbounds":"BOTH_PHASES:KBS:8081"}"#).unwrap();
    assert_eq!(
        names(&moved.inbounds),
        "BOTH_PHASES:KBS:8081",
        "the operator's KBS replaces the built-in one"
    );
}

#[test]
fn every_fault_of_all_tags_is_reported_together() {
    let text = resolve(
        &["-secure-comms", "-secure-comms-inbounds=KUBERNETES_PHASE:A:1,X:B:2"],
        r#"{"sc-inbounds":"KUBERNETES_PHASE:a:3","sc-outbounds":"KUBERNETES_PHASE:C:0"}"#,
    )
    .unwrap_err()
    .to_string();
    for part in [
        "inbounds: tag 'X:B:2': phase",
        "tag 'KUBERNETES_PHASE:a:3': name",
        "outbounds: tag 'KUBERNETES_PHASE:C:0': port",
        "correct the flags or apf.json",
    ] {
        assert!(text.contains(part), "{part:?} is not in {text:?}");
    }
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
    let fault = |json| serde_json::from_str::<DaemonConfig>(json).unwrap_err().to_string();
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
    for args in [&[][..], &["-secure-comms"]] {
        assert!(Config::check_flags(&options(args)).is_ok(), "{args:?}");
    }
    let wrong =
        [&["-secure-comms-inbounds", "NO_PHASE:x:1"][..], &["-secure-comms-outbounds", "KUBERNETES_PHASE:q"]];
    for args in wrong {
        assert_eq!(Config::check_flags(&options(args)).unwrap_err().exit_code(), 2, "{args:?}");
    }
}
