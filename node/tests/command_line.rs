//! The real binary: its errors and exit codes for bad input.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "clippy.toml lets tests fail loudly; clippy does not take the helpers of an integration test for tests"
)]

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Output};

fn adaptor(args: &[&str], env: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_secure-comms-adaptor"));
    command.args(args).env_clear().envs(env.iter().copied()).output().unwrap()
}

/// The lines on stderr, without the program's name before each.
fn faults(output: &Output) -> Vec<String> {
    let text = String::from_utf8(output.stderr.clone()).unwrap();
    let line = |line: &str| {
        line.strip_prefix("secure-comms-adaptor: ").unwrap_or_else(|| panic!("{text}")).to_owned()
    };
    text.lines().map(line).collect()
}

#[track_caller]
fn refused(args: &[&str], env: &[(&str, &str)], expected: &[&str]) {
    let output = adaptor(args, env);
    assert_eq!(faults(&output), expected);
    assert_eq!(output.status.code(), Some(2), "a fault of usage");
    assert!(output.stdout.is_empty());
}

const GOOD: [&str; 5] = ["connect", "--pod-id", "p1", "--address", "127.0.0.1:1"];

#[track_caller]
fn connect_refused(more: &[&str], env: &[(&str, &str)], expected: &[&str]) {
    refused(&[&GOOD, more].concat(), env, expected);
}

#[test]
fn the_version_and_the_help_are_there() {
    let version = adaptor(&["--version"], &[]);
    assert_eq!(version.status.code(), Some(0));
    assert_eq!(
        String::from_utf8(version.stdout).unwrap(),
        concat!("secure-comms-adaptor ", env!("CARGO_PKG_VERSION"), "\n")
    );
    let help = String::from_utf8(adaptor(&["connect", "--help"], &[]).stdout).unwrap();
    for word in [
        "SECURE_COMMS_INBOUNDS",
        "SECURE_COMMS_OUTBOUNDS",
        "SECURE_COMMS_KBS_ADDR",
        "SECURE_COMMS_NO_TRUSTEE",
        "--delete-on-exit",
    ] {
        assert!(help.contains(word), "{word}: {help}");
    }
}

#[test]
fn an_unknown_flag_or_command_is_a_fault_of_usage() {
    for args in [&["connect", "--pod"][..], &["serve"], &[], &["keygen", "x"]] {
        let output = adaptor(args, &[]);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(text.contains("--help") && args.last().is_none_or(|last| text.contains(last)), "{text}");
    }
}

#[test]
fn all_faults_of_a_command_line_come_at_once() {
    refused(
        &[
            "connect",
            "--address",
            "a b",
            "--inbounds",
            "X:A:1,BOTH_PHASES:B:x",
            "--outbounds",
            "BOTH_PHASES:C",
            "--deadline",
            "soon",
            "--rekey-bytes",
            "1",
            "--kbs",
            "kbs",
            "--kbs-url",
            "ftp://kbs",
        ],
        &[("SECURE_COMMS_NO_TRUSTEE", "false")],
        &[
            "--pod-id: missing: give the pod's id (the runtime's sandbox id)",
            "--address 'a b': expected HOST, HOST:PORT, an IPv6 address or [IPv6]:PORT (port 1 to 65535, 2222 if left out)",
            "--inbounds: tag 'X:A:1': phase: expected ATTESTATION_PHASE, KUBERNETES_PHASE or BOTH_PHASES",
            "--inbounds: tag 'BOTH_PHASES:B:x': port: expected a number from 0 to 65535, found 'x'",
            "--outbounds: tag 'BOTH_PHASES:C': parts: expected Phase:Name:Port, Phase:Name:Host:Port or Phase:Name:/unix/path",
            "--deadline 'soon': expected whole seconds from 1 to 86400",
            "--rekey-bytes '1': expected bytes from 1048576 to 34359738368",
            "--kbs 'kbs': expected HOST:PORT or [IPv6]:PORT, without a scheme (for publishing there is --kbs-url)",
            "--kbs-url: expected http://HOST[:PORT] or https://HOST[:PORT], without user, query or fragment",
        ],
    );
}

#[test]
fn a_fault_of_the_environment_names_the_variable() {
    connect_refused(
        &[],
        &[
            ("SECURE_COMMS", "1"),
            ("SECURE_COMMS_INBOUNDS", "X:A:1"),
            ("SECURE_COMMS_OUTBOUNDS", "X:A:1"),
            ("SECURE_COMMS_NO_TRUSTEE", "yes"),
            ("SECURE_COMMS_KBS_ADDR", "http://kbs:8080"),
        ],
        &[
            "SECURE_COMMS '1': expected true or false",
            "SECURE_COMMS_INBOUNDS: tag 'X:A:1': phase: expected ATTESTATION_PHASE, KUBERNETES_PHASE or BOTH_PHASES",
            "SECURE_COMMS_OUTBOUNDS: tag 'X:A:1': phase: expected ATTESTATION_PHASE, KUBERNETES_PHASE or BOTH_PHASES",
            "SECURE_COMMS_NO_TRUSTEE 'yes': expected true or false",
            "SECURE_COMMS_KBS_ADDR 'http://kbs:8080': expected HOST:PORT or [IPv6]:PORT, without a scheme (for publishing \
             there is --kbs-url)",
        ],
    );
}

#[test]
fn secure_comms_switched_off_is_a_fault() {
    let off = "SECURE_COMMS 'false': Secure Comms is off: set it to true, or do not start this program";
    connect_refused(&[], &[("SECURE_COMMS", "false")], &[off]);
    refused(&["user-data", "--pod-id", "p1"], &[("SECURE_COMMS", "false")], &[off]);
}

#[test]
fn flags_that_contradict_each_other_are_refused() {
    let without = "contradicts --no-trustee (or SECURE_COMMS_NO_TRUSTEE=true): remove one of them";
    connect_refused(
        &["--no-trustee", "--kbs-url", "http://k", "--kbs-admin-key", "f"],
        &[],
        &[&format!("--kbs-url: {without}"), &format!("--kbs-admin-key: {without}")],
    );
    connect_refused(
        &["--kbs-ca", "ca.pem", "--kbs-admin-issuer", "me"],
        &[],
        &[
            "--kbs-ca: needs HTTPS: give an https URL with --kbs-url",
            "--kbs-admin-issuer: needs --kbs-admin-key",
        ],
    );
}

#[test]
fn an_invalid_pod_id_or_log_level_is_refused() {
    refused(
        &["connect", "--pod-id", "../x\n", "--address", "vm"],
        &[],
        &[
            "--pod-id: pod id '../x\\n': expected 1 to 128 characters out of A-Z a-z 0-9 . _ -, the first a letter or digit \
           (the runtime's sandbox id)",
        ],
    );
    connect_refused(&["--log", "loud"], &[], &["--log 'loud': expected error, warn, info, debug or trace"]);
    connect_refused(
        &[],
        &[("SECURE_COMMS_LOG", "2")],
        &["SECURE_COMMS_LOG '2': expected error, warn, info, debug or trace"],
    );
}

#[test]
fn a_password_in_a_url_is_refused_and_not_repeated() {
    let output = adaptor(&[&GOOD[..], &["--kbs-url", "http://me:secret@kbs"]].concat(), &[]);
    assert_eq!(output.status.code(), Some(2));
    assert!(!String::from_utf8(output.stderr).unwrap().contains("secret"));
}

fn store_args<'a>(command: &'a str, store: &'a Path) -> Vec<&'a str> {
    vec![command, "--store", store.to_str().unwrap()]
}

#[test]
fn keygen_makes_the_key_once_and_prints_its_public_half() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    let keygen = |more: &[&str]| adaptor(&[&store_args("keygen", &store), more].concat(), &[]);
    let first = keygen(&[]);
    assert_eq!(first.status.code(), Some(0), "{first:?}");
    let line = String::from_utf8(first.stdout).unwrap();
    assert!(
        line.starts_with("ssh-ed25519 AAAA") && line.ends_with('\n') && line.lines().count() == 1,
        "{line}"
    );
    let both = String::from_utf8(keygen(&["--pod-id", "p1"]).stdout).unwrap();
    assert!(both.starts_with(&line) && both.lines().count() == 2, "{both}");
    assert_eq!(String::from_utf8(keygen(&["--pod-id", "p1"]).stdout).unwrap(), both);
    let public =
        Command::new("ssh-keygen").args(["-y", "-f"]).arg(store.join("worker-node.key")).output().unwrap();
    assert_eq!(String::from_utf8(public.stdout).unwrap().trim(), line.trim(), "OpenSSH reads the key");
}

#[test]
fn user_data_goes_to_standard_output_or_to_a_file_for_us_alone() {
    let dir = tempfile::tempdir().unwrap();
    let (store, file) = (dir.path().join("store"), dir.path().join("apf.json"));
    let env = [("SECURE_COMMS_PP_INBOUNDS", "KUBERNETES_PHASE:LOG:7000"), ("SECURE_COMMS_PP_OUTBOUNDS", "")];
    let args = [
        &store_args("user-data", &store)[..],
        &["--pod-id", "p1", "--pp-outbounds", "BOTH_PHASES:DB:db:5432"],
    ]
    .concat();
    let printed = adaptor(&args, &env);
    assert_eq!(printed.status.code(), Some(0), "{printed:?}");
    let json: serde_json::Value = serde_json::from_slice(&printed.stdout).unwrap();
    assert_eq!((&json["sc"], &json["sc-inbounds"]), (&true.into(), &"KUBERNETES_PHASE:LOG:7000".into()));
    assert_eq!(json["sc-outbounds"], "BOTH_PHASES:DB:db:5432");
    let written = adaptor(&[&args[..], &["--output", file.to_str().unwrap()]].concat(), &env);
    assert_eq!((written.status.code(), written.stdout.as_slice()), (Some(0), &b""[..]));
    assert_eq!(fs::read(&file).unwrap(), printed.stdout, "the same keys again");
    assert_eq!(fs::metadata(&file).unwrap().mode() & 0o7777, 0o600);
    refused(&["user-data"], &[], &["--pod-id: missing: give the pod's id (the runtime's sandbox id)"]);
    refused(
        &["user-data", "--pod-id", "p1", "--pp-outbounds", "x"],
        &[],
        &["--pp-outbounds: tag 'x': phase: expected ATTESTATION_PHASE, KUBERNETES_PHASE or BOTH_PHASES"],
    );
}

#[test]
fn an_unusable_store_is_an_error_with_file_and_fix() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    adaptor(&store_args("keygen", &store), &[]);
    let key = store.join("worker-node.key");
    let failure = |expected: String| {
        let output = adaptor(&store_args("keygen", &store), &[]);
        assert_eq!((output.status.code(), faults(&output)), (Some(1), vec![expected]));
    };
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    failure(format!(
        "key store: {}: others may access it (mode 0644): run chmod 0600 on it, and make new keys if they did",
        key.display()
    ));
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(&key, "garbage").unwrap();
    failure(format!(
        "key store: {}: no usable key: restore the file from a backup, or delete it to have a new key made: \
         reading the worker node's private key: not PEM: no '-----BEGIN' line; \
         give an unencrypted Ed25519 key (ssh-keygen -t ed25519 -N '')",
        key.display()
    ));
    let output = adaptor(&["keygen", "--store", "/dev/null/x"], &[]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(
        faults(&output),
        ["key store: making the directory /dev/null/x: Not a directory (os error 20)"]
    );
}
