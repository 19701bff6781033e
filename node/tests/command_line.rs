//! The real binary: its errors and exit codes for bad input.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "clippy.toml lets tests fail loudly; clippy does not take the helpers of an integration test for tests"
)]

use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Output, Stdio};

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
fn a_mistyped_flag_or_command_gets_a_suggestion_in_one_line() {
    for (args, expected) in [
        (
            &["connect", "--adress", "vm"][..],
            "unexpected argument '--adress' found; a similar argument exists: '--address'; see --help",
        ),
        (&["conect"], "unrecognized subcommand 'conect'; a similar subcommand exists: 'connect'; see --help"),
        (
            &["connect", "--pod-id"],
            "a value is required for '--pod-id <ID>' but none was supplied; see --help",
        ),
        (&["keygen", "x\ny"], "unexpected argument 'x y' found; see --help"),
    ] {
        refused(args, &[], &[expected]);
    }
    let output = adaptor(&[], &[]);
    let text = faults(&output).concat();
    assert!(text.contains("requires a subcommand") && output.status.code() == Some(2), "{text}");
}

#[test]
fn help_is_on_standard_output_and_fits_a_terminal() {
    for args in [
        &["--help"][..],
        &["-h"],
        &["help"],
        &["help", "connect"],
        &["connect", "--help"],
        &["user-data", "-h"],
        &["keygen", "--help"],
    ] {
        let output = adaptor(args, &[("COLUMNS", "80")]);
        assert_eq!(output.status.code(), Some(0), "{args:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains("Usage: secure-comms-adaptor") && output.stderr.is_empty(), "{args:?}");
        assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
    }
}

#[test]
fn an_unknown_variable_is_warned_of_once() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    let output =
        adaptor(&store_args("keygen", &store), &[("SECURE_COMMS_KBS_ADRR", "kbs:1"), ("SECURE", "x")]);
    let text = String::from_utf8(output.stderr).unwrap();
    let warning = " WARN the variable SECURE_COMMS_KBS_ADRR is unknown and ignored: did you mean SECURE_COMMS_KBS_ADDR?\n";
    assert!(text.matches("is unknown").count() == 1 && text.contains(warning), "{text}");
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn an_inbound_with_a_host_is_refused_at_once() {
    for host in ["10.0.0.1", "0.0.0.0", "localhost", "[::1]"] {
        let tag = format!("KUBERNETES_PHASE:LOG:{host}:7000");
        let fault = format!(
            "tag '{tag}': host: an inbound has no host, it listens on 127.0.0.1; {host} would be a network namespace \
             (if there is one of this name, give its path: /run/netns/{host})"
        );
        connect_refused(&["--inbounds", &tag], &[], &[&format!("--inbounds: {fault}")]);
        refused(
            &["user-data", "--pod-id", "p", "--pp-inbounds", &tag],
            &[],
            &[&format!("--pp-inbounds: {fault}")],
        );
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
            "--deadline 'soon': expected a time from 1s to 24h, such as 90s, 5m or 1h30m",
            "--rekey-bytes '1': expected a size from 1MiB to 32GiB, such as 64MiB, 1GiB or bytes",
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
    assert!(String::from_utf8_lossy(&first.stderr).contains("worker node's key made in"), "{first:?}");
    let line = String::from_utf8(first.stdout).unwrap();
    assert!(
        line.starts_with("ssh-ed25519 AAAA") && line.ends_with('\n') && line.lines().count() == 1,
        "{line}"
    );
    let said = |output: &Output| {
        let text = String::from_utf8(output.stderr.clone()).unwrap();
        let line = |line: &str| line.split_once(" INFO ").unwrap().1.split(" in ").next().unwrap().to_owned();
        text.lines().map(line).collect::<Vec<_>>()
    };
    assert_eq!(said(&keygen(&["--pod-id", "p0"])), ["worker node's key found", "pod p0: key made"]);
    assert_eq!(said(&keygen(&["--pod-id", "p0"])), ["worker node's key found", "pod p0: key found"]);
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
        "key store: {}: no usable key: restore the file from a backup; without one, delete it: a new key is made, and running VMs are lost: \
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

#[test]
fn a_store_that_may_not_be_written_is_an_error_with_a_fix() {
    let dir = tempfile::tempdir().unwrap();
    // A copy that any user may run: a user that is not root may not write to /var/lib.
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let program = dir.path().join("adaptor");
    // Not by this process: another test's fork would hold the file open for writing, which keeps it from being started.
    let copied =
        Command::new("cp").arg(env!("CARGO_BIN_EXE_secure-comms-adaptor")).arg(&program).status().unwrap();
    assert!(copied.success());
    let mut command = Command::new(program);
    command.env_clear().args(["keygen", "--store", "/var/lib/secure-comms-test"]);
    if nix::unistd::geteuid().is_root() {
        std::os::unix::process::CommandExt::uid(&mut command, 12345);
    }
    let output = command.output().unwrap();
    let text = faults(&output).concat();
    assert!(text.starts_with("key store: making the directory /"), "{text}");
    assert!(text.ends_with(": Permission denied (os error 13): run as root, or give --store"), "{text}");
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn the_log_has_the_form_that_its_reader_needs() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    adaptor(&store_args("keygen", &store), &[]);
    let text = format!("worker node's key found in {}", store.display());
    let run = |stderr: Stdio, more: &[&str], variable: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_secure-comms-adaptor"));
        command.env_clear().env("JOURNAL_STREAM", variable).args(store_args("keygen", &store)).args(more);
        assert!(command.stdout(Stdio::null()).stderr(stderr).status().unwrap().success());
    };
    let read = |mut from: File| {
        let mut bytes = vec![0; 4096];
        let length = from.read(&mut bytes).unwrap();
        String::from_utf8(bytes[..length].to_vec()).unwrap().trim_end().to_owned()
    };
    let pipe = |more: &[&str], journal: bool| {
        let (from, to) = std::io::pipe().unwrap();
        let status = nix::sys::stat::fstat(&to).unwrap();
        let inode = if journal { status.st_ino } else { status.st_ino + 1 };
        run(to.into(), more, &format!("{}:{inode}", status.st_dev));
        read(File::from(std::os::fd::OwnedFd::from(from)))
    };
    assert_eq!(pipe(&[], true), format!("<6>{text}"), "the journal");
    let line = pipe(&[], false);
    assert!(line.starts_with("20") && line.ends_with(&format!("Z  INFO {text}")), "a pipe: {line}");
    for journal in [true, false] {
        let json: serde_json::Value =
            serde_json::from_str(&pipe(&["--log-format", "json"], journal)).unwrap();
        assert_eq!((&json["level"], &json["message"]), (&"info".into(), &text.as_str().into()));
    }
    let terminal = nix::pty::openpty(None, None).unwrap();
    run(terminal.slave.into(), &[], "");
    let line = read(File::from(terminal.master));
    assert_eq!(
        line.split_once("Z ").map(|(time, rest)| (time.len(), rest)),
        Some((8, text.as_str())),
        "{line}"
    );
}

#[test]
fn certificates_are_made_once_unless_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let directory = dir.path().join("caa");
    let directory = directory.to_str().unwrap();
    let made = adaptor(&["caa-certs", directory], &[]);
    assert_eq!(made.status.code(), Some(0), "{made:?}");
    let text = String::from_utf8(made.stdout).unwrap();
    assert!(
        text.contains(&format!("--from-file={directory}/client.key")) && text.contains("CERT_KEY:"),
        "{text}"
    );
    let key = || fs::read(dir.path().join("caa/server.key")).unwrap();
    let before = key();
    let again = adaptor(&["caa-certs", directory], &[]);
    assert_eq!(again.status.code(), Some(1), "{again:?}");
    let error = String::from_utf8(again.stderr).unwrap();
    assert!(error.contains("ca.crt is there already") && error.contains("--overwrite"), "{error}");
    assert_eq!(key(), before);
    let replaced = adaptor(&["caa-certs", "--overwrite", directory], &[]);
    assert_eq!(replaced.status.code(), Some(0), "{replaced:?}");
    assert_ne!(key(), before);
}
