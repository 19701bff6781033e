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
use secure_comms_node::cli::ConnectArgs;
use secure_comms_node::settings::{ConnectSettings, UsageError};
use secure_comms_protocol::limits::REKEY_BYTES;

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
    assert_eq!(shown(&settings.inbounds), ["KUBERNETES_PHASE:KATAAGENT:0"]);
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
    assert_eq!(shown(&settings.inbounds), ["BOTH_PHASES:A:1", "KUBERNETES_PHASE:KATAAGENT:0"]);
    assert_eq!(shown(&settings.outbounds), ["BOTH_PHASES:KBS:[::1]:8080"]);
    let flags = ConnectArgs { inbounds: Some("BOTH_PHASES:B:2".into()), kbs: Some("kbs:1".into()), ..args() };
    let settings = read(flags, &env).unwrap();
    assert_eq!(shown(&settings.inbounds), ["BOTH_PHASES:B:2", "KUBERNETES_PHASE:KATAAGENT:0"]);
    assert_eq!(shown(&settings.outbounds), ["BOTH_PHASES:KBS:kbs:1"]);
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
