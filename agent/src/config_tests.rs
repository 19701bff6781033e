use std::ffi::OsString;
use std::path::PathBuf;

use base64ct::{Base64, Encoding};
use secure_comms_protocol::tag::Target;

use super::*;

const PRIVATE: &str = include_str!("../testdata/ed25519.openssh");
const PUBLIC: &str = include_str!("../testdata/ed25519.pub");

fn options(args: &[&str]) -> Options {
    crate::cli::parse(args.iter().map(OsString::from)).unwrap()
}

fn base64(text: &str) -> String {
    Base64::encode_string(text.as_bytes())
}

fn daemon(json: &str) -> DaemonConfig {
    serde_json::from_str(json).unwrap()
}

fn load_text(text: &[u8]) -> (PathBuf, Result<Option<DaemonConfig>, ConfigError>) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("apf.json");
    std::fs::write(&path, text).unwrap();
    (path.clone(), load(&path))
}

fn resolve(args: &[&str], json: &str) -> Result<Config, ConfigError> {
    Config::resolve(options(args), Some(daemon(json)))
}

#[test]
fn a_missing_daemon_config_is_none_and_an_unreadable_one_an_error() {
    let directory = tempfile::tempdir().unwrap();
    assert!(load(&directory.path().join("apf.json")).unwrap().is_none());
    let text = load(directory.path()).unwrap_err().to_string();
    assert!(
        text.contains(&directory.path().display().to_string()) && text.contains("make it a file"),
        "{text}"
    );
}

#[test]
fn unknown_keys_are_ignored_and_null_is_absent() {
    let text =
        br#"{"pod-network":{"podip":""},"tls-server-key":"x","sc":null,"pod-name":"p","pod-namespace":"n"}"#;
    let config = load_text(text).1.unwrap().unwrap();
    assert_eq!(config.sc, None);
    assert_eq!(resolve(&["-secure-comms"], std::str::from_utf8(text).unwrap()).unwrap().pod.unwrap(), "n/p");
}

#[test]
fn a_broken_daemon_config_is_reported_with_path_place_key_and_advice() {
    for (json, parts) in [
        (&b""[..], &["line 1 column 0"][..]),
        (b"{\"sc\": true,\n \"sc-pp-prv\": ", &["line 2"]),
        (b"[]", &["expected an object", "line 1"]),
        (b"{\n\"sc\": \"yes\"}", &["key 'sc'", "expected a boolean", "line 2"]),
        (b"{\"sc-inbounds\": [1]}", &["key 'sc-inbounds'", "expected a string", "line 1"]),
        (b"{\"sc-pp-prv\": 7}", &["key 'sc-pp-prv'", "expected a string"]),
        (b"{\"sc\": true, \"sc\": false}", &["key 'sc': given twice"]),
        (b"{} trailing", &["trailing characters at line 1"]),
        (b"\xff", &["line 1"]),
    ] {
        let (path, loaded) = load_text(json);
        let text = loaded.unwrap_err().to_string();
        for part in parts.iter().copied().chain([path.to_str().unwrap(), "correct the VM's user data"]) {
            assert!(text.contains(part), "{part:?} is not in {text:?}");
        }
        assert_eq!(text.matches(" at line ").count(), 1, "{text}");
    }
    let (_, loaded) = load_text(&vec![b' '; CONFIG_MAX + 1]);
    assert!(loaded.unwrap_err().to_string().contains("longer than 1048576 bytes"));
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
fn a_pod_network_is_validated_and_one_that_says_nothing_is_none() {
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
    let (_, loaded) = load_text(br#"{"pod-network": "eth0"}"#);
    assert!(loaded.unwrap_err().to_string().contains("key 'pod-network'"));
    let (_, loaded) = load_text(br#"{"pod-network": {"mtu": 1, "mtu": 2}}"#);
    assert!(loaded.unwrap_err().to_string().contains("duplicate field"));
}

#[test]
fn a_kata_agent_socket_that_no_socket_can_have_is_refused() {
    for path in [format!("/{}", "x".repeat(200)), "/run/".into()] {
        let text = resolve(&["-secure-comms", "-kata-agent-socket", &path], "{}").unwrap_err().to_string();
        assert!(text.contains("-kata-agent-socket") && text.contains("at most 107 bytes"), "{text}");
    }
}
