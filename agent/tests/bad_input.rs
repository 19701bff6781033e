//! The real binary on bad input: its message, its exit code, and the state that it leaves behind.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "clippy.toml lets tests fail loudly; clippy does not take the helpers of an integration test for tests"
)]

mod support;

use std::fs::{self, Permissions};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;

use base64ct::{Base64, Encoding};

use support::{FREE_PORTS, Place};

/// Lets user data decide.
const ALL: &str = "-secure-comms-user-data=all";

/// Checks that the agent exits with `code`, prints one line with all of `parts`, and leaves no state behind.
#[track_caller]
fn fails_with(place: &Place, args: &[&str], env: &[(&str, &str)], code: i32, parts: &[&str]) {
    let output = place.run(args, env);
    let text = String::from_utf8(output.stderr).unwrap();
    // Under a journal, lines of the log begin with their priority.
    let faults: Vec<&str> = text.lines().filter(|line| !line.starts_with("<6>")).collect();
    let [fault] = faults[..] else { panic!("{args:?}: expected one line: {text:?}") };
    assert!(fault.starts_with("agent-protocol-forwarder: "), "{fault}");
    for part in parts {
        assert!(fault.contains(part), "{args:?}: {part:?} is not in {fault:?}");
    }
    assert_eq!(output.status.code(), Some(code), "{args:?}: {fault}");
    assert!(output.stdout.is_empty(), "{args:?}");
    assert!(!place.path("state").exists(), "{args:?}: left its state directory behind");
}

#[track_caller]
fn usage(args: &[&str], parts: &[&str]) {
    fails_with(&Place::new(), args, &[], 2, parts);
}

#[track_caller]
fn runtime(place: &Place, args: &[&str], parts: &[&str]) {
    fails_with(place, &[&FREE_PORTS, args].concat(), &[], 1, parts);
}

#[test]
fn version_and_help_are_printed_and_succeed() {
    let place = Place::new();
    for flag in ["-version", "--version", "-V", "version"] {
        let version = place.run(&[flag], &[]);
        assert_eq!(version.status.code(), Some(0));
        let expected = concat!("agent-protocol-forwarder ", env!("CARGO_PKG_VERSION"), "\n");
        assert_eq!(String::from_utf8(version.stdout).unwrap(), expected);
    }
    for flag in ["-h", "-help", "--help", "help"] {
        let help = place.run(&[flag], &[]);
        assert_eq!(help.status.code(), Some(0), "{flag}");
        assert!(String::from_utf8(help.stdout).unwrap().contains("  -secure-comms-inbounds"), "{flag}");
        assert!(help.stderr.is_empty(), "{flag}");
    }
}

#[test]
fn a_wrong_flag_is_named_with_what_was_expected() {
    usage(&["-nope"], &["'-nope'", "no such flag", "correct or remove it"]);
    usage(&["-secure-coms"], &["'-secure-coms'", "no such flag", "did you mean -secure-comms?"]);
    usage(&["stray"], &["'stray'", "not a flag", "remove it"]);
    usage(&["-secure-comms-inbounds"], &["-secure-comms-inbounds", "needs a value"]);
    usage(&["-secure-comms=maybe"], &["-secure-comms=maybe", "expected true or false"]);
    for flag in ["-config", "-kata-agent-socket", "-secure-comms-state-dir"] {
        let fault = format!("forwarder: flag '{flag}': value 'relative': expected an absolute path");
        usage(&[flag, "relative"], &[&fault]);
    }
    usage(&["-secure-comms-listen", "2222"], &["-secure-comms-listen", "'2222'", "[::]:2222"]);
    usage(&["-secure-comms-guest-api", "h:1"], &["-secure-comms-guest-api", "'h:1'", "127.0.0.1:8006"]);
    usage(&["-secure-comms-guest-api", "127.0.0.1:0"], &["-secure-comms-guest-api", "from 1 to 65535"]);
    for bytes in ["5", "-1", "many"] {
        usage(
            &["-secure-comms-rekey-bytes", bytes],
            &["-secure-comms-rekey-bytes", bytes, "at least 1048576"],
        );
    }
}

#[test]
fn two_names_of_the_namespace_flag_must_agree() {
    let args = ["-pod-namespace", "a", "-kata-agent-namespace", "b"];
    usage(&args, &["-pod-namespace 'a'", "-kata-agent-namespace 'b'", "keep -pod-namespace"]);
}

#[test]
fn all_faults_of_all_tags_are_told_at_once() {
    let args = [
        "-secure-comms",
        "-secure-comms-inbounds",
        "NO_PHASE:x:1, BOTH_PHASES:b@d:1, BOTH_PHASES:KBS:99999",
        "-secure-comms-outbounds",
        "KUBERNETES_PHASE:q",
    ];
    let parts = [
        "'NO_PHASE:x:1': phase: expected ATTESTATION_PHASE",
        "'BOTH_PHASES:b@d:1': name: expected 1 to 64",
        "'BOTH_PHASES:KBS:99999': port: expected",
        "-secure-comms-outbounds: tag 'KUBERNETES_PHASE:q'",
        "correct the tags where they are given",
    ];
    usage(&args, &parts);
}

#[test]
fn flags_of_what_feeds_the_agent_say_what_they_expect() {
    usage(
        &["-secure-comms-user-data", "tunnel"],
        &["'-secure-comms-user-data': value 'tunnel'", "none, tunnels or all"],
    );
    usage(&["-secure-comms-pod-id", "a/b"], &["'-secure-comms-pod-id': value 'a/b'", "sandbox id"]);
    for hosts in ["/run/x", "db.example,fd00::1", "db:0"] {
        let flag = "-secure-comms-user-data-hosts";
        usage(&[flag, hosts], &[flag, "HOST or HOST:PORT"]);
    }
    for flag in ["-secure-comms-init-data", "-secure-comms-init-data-digest"] {
        usage(&[flag, "x"], &[flag, "expected an absolute path"]);
    }
}

#[test]
fn broken_init_data_ends_the_start() {
    let place = Place::new();
    let write = |name: &str, text: &str| {
        fs::write(place.path(name), text).unwrap();
        fs::set_permissions(place.path(name), Permissions::from_mode(0o644)).unwrap();
        place.path(name).display().to_string()
    };
    let file = write("secure-comms.toml", "sc-outbound = 'SECRET'");
    runtime(
        &place,
        &["-secure-comms-init-data", &file],
        &["secure-comms.toml: key 'sc-outbound': not known"],
    );
    let file = write("initdata.digest", "keys");
    let flag = ["-secure-comms-init-data-digest", &file];
    runtime(&place, &flag, &["initdata.digest: not a digest of init-data", "64, 96 or 128 hex digits"]);
    fs::set_permissions(&file, Permissions::from_mode(0o666)).unwrap();
    runtime(&place, &flag, &["initdata.digest", "others may access it"]);
}

#[test]
fn without_secure_comms_the_error_names_the_flag() {
    usage(&[], &["Secure Comms is off", "set the flag -secure-comms", "\"sc\": true"]);
}

#[test]
fn an_unknown_log_level_is_a_usage_error() {
    let env = [("SECURE_COMMS_LOG", "bogus")];
    fails_with(
        &Place::new(),
        &FREE_PORTS,
        &env,
        2,
        &["SECURE_COMMS_LOG='bogus'", "error, warn, info or debug"],
    );
}

#[test]
fn a_broken_daemon_config_is_named_with_line_and_column() {
    let place = Place::new();
    for (text, parts) in [
        ("{\n \"sc\": tru}", &["line 2 column"][..]),
        ("{\n\n \"sc\": \"yes\"}", &["key 'sc'", "expected a boolean", "line 3 column"]),
        ("{\"sc-inbounds\": 7}", &["key 'sc-inbounds'", "line 1 column"]),
        ("{\"sc\": true, \"sc\": false}", &["key 'sc': given twice", "line 1 column"]),
        ("[]", &["expected an object", "line 1 column"]),
    ] {
        place.write_config(text);
        runtime(&place, &[ALL], parts);
        runtime(&place, &[ALL], &["apf.json", "correct the VM's user data"]);
    }
}

fn testdata(name: &str) -> String {
    let bytes = fs::read(format!("{}/../keys/testdata/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap();
    Base64::encode_string(&bytes)
}

#[test]
fn bad_keys_in_the_user_data_are_named_and_not_shown() {
    let place = Place::new();
    let good = (testdata("ed25519.openssh"), testdata("ed25519.pub"));
    let garbage = "%%%not-base64%%%";
    let [rsa, encrypted] = ["rsa.openssh", "encrypted.openssh"].map(testdata);
    let (rsa_public, secret) = (testdata("rsa.pub"), Base64::encode_string(b"top-secret-in-no-form"));
    for (private, public, parts) in [
        (None, None, &["'sc-pp-prv' and 'sc-wn-pub' are missing", "give both"][..]),
        (None, Some(&good.1), &["'sc-pp-prv' is missing", "give both"]),
        (Some(&good.0), None, &["'sc-wn-pub' is missing", "give both"]),
        (Some(&rsa), Some(&good.1), &["'sc-pp-prv'", "ssh-rsa", "ssh-keygen -t ed25519"]),
        (Some(&encrypted), Some(&good.1), &["'sc-pp-prv'", "it is encrypted", "ssh-keygen -t ed25519"]),
        (Some(&garbage.to_owned()), Some(&good.1), &["'sc-pp-prv'", "not base64", "base64 -w0"]),
        (Some(&secret), Some(&good.1), &["'sc-pp-prv'", "not PEM"]),
        (Some(&good.0), Some(&rsa_public), &["'sc-wn-pub'", "line 1", "ssh-rsa", "ssh-ed25519"]),
        (Some(&good.0), Some(&garbage.to_owned()), &["'sc-wn-pub'", "not base64"]),
    ] {
        let member = |key: &str, value: Option<&String>| {
            value.map(|value| format!(", \"{key}\": \"{value}\"")).unwrap_or_default()
        };
        let keys = member("sc-pp-prv", private) + &member("sc-wn-pub", public);
        place.write_config(&format!("{{\"sc\": true{keys}}}"));
        runtime(&place, &[ALL], parts);
        let args = [&FREE_PORTS[..], &[ALL]].concat();
        let said = String::from_utf8(place.run(&args, &[]).stderr).unwrap();
        for secret in [private.map_or("-", |key| &key[..key.len().min(24)]), "top-secret", "not-base64%"] {
            assert!(secret == "-" || !said.contains(secret), "{said}");
        }
    }
}

#[test]
fn exposed_or_broken_latched_keys_stop_the_start() {
    let place = Place::new();
    let directory = |name: &str, mode: u32| {
        let path = place.path(name);
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        path
    };
    let write = |path: &std::path::Path, mode: u32| {
        fs::write(path, "not what we wrote\n").unwrap();
        fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    };
    write(&place.path("file"), 0o600);
    directory("open", 0o777);
    write(&directory("broken", 0o700).join("keys"), 0o600);
    write(&directory("exposed", 0o700).join("keys"), 0o644);
    for (name, parts) in [
        ("file", ["it is not a directory", "name a directory"]),
        ("open", ["others may access it (mode 0777)", "run chmod 0700 /dev/shm/"]),
        ("broken", ["not written by this agent", "reboot the VM to start over"]),
        ("exposed", ["others may access it (mode 0644)", "reboot the VM to start over"]),
    ] {
        let path = place.path(name);
        let args = ["-secure-comms-state-dir", path.to_str().unwrap()];
        runtime(&place, &args, &[&[path.to_str().unwrap()][..], &parts].concat());
        let output = place.run(&[&FREE_PORTS[..], &args].concat(), &[]);
        let log = String::from_utf8(output.stderr).unwrap();
        assert!(!log.contains("listens on"), "it fails before it listens: {log}");
    }
    let left: Vec<_> = fs::read_dir(place.path("open")).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_state_directory_outside_of_memory_is_refused_or_warned_of() {
    let place = Place::new();
    let fault = "checking -secure-comms-state-dir /proc/self/state: it is not on a tmpfs or ramfs";
    let args = ["-secure-comms-state-dir", "/proc/self/state", "-secure-comms-state-dir-on-disk=false"];
    let output = place.run(&[&FREE_PORTS[..], &args].concat(), &[]);
    let log = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{log}");
    assert!(log.contains(fault) && log.contains("set -secure-comms-state-dir-on-disk if"), "{log}");
    assert!(!log.contains("listens on"), "it fails before it listens: {log}");

    let warning = "<4>-secure-comms-state-dir /proc/self/state: it is not on a tmpfs";
    let args = [&FREE_PORTS[..], &[ALL, "-secure-comms-state-dir", "/proc/self/state"]].concat();
    let mut agent = place.start(&args, &[]);
    agent.says(warning);
    assert_eq!(agent.terminate().code(), Some(0));
    // Keys from the user data are not latched.
    let keys = (testdata("ed25519.openssh"), testdata("ed25519.pub"));
    place.write_config(&format!(r#"{{"sc": true, "sc-pp-prv": "{}", "sc-wn-pub": "{}"}}"#, keys.0, keys.1));
    let mut agent = place.start(&args, &[]);
    agent.address();
    assert_eq!(agent.terminate().code(), Some(0));
    let mut agent = place.start(&args, &[]);
    agent.says("from the user data");
    agent.terminate();
    let log = agent.rest();
    assert!(!log.contains(warning), "{log}");
}

#[test]
fn a_variable_with_a_typo_is_warned_of() {
    let place = Place::new();
    let mut agent = place.start(&FREE_PORTS, &[("SECURE_COMMS_LGO", "debug")]);
    agent.says(
        "<4>environment variable SECURE_COMMS_LGO: not known to the agent; did you mean SECURE_COMMS_LOG?",
    );
    // Signals are handled once it listens.
    agent.address();
    assert_eq!(agent.terminate().code(), Some(0));
}

#[test]
fn an_address_that_can_not_be_had_is_named_with_its_flag() {
    let (place, taken) = (Place::new(), TcpListener::bind("127.0.0.1:0").unwrap());
    let address = taken.local_addr().unwrap();
    let text = address.to_string();
    runtime(&place, &["-secure-comms-listen", &text], &[&text, "in use", "-secure-comms-listen"]);
    // RFC 5737: an address that no host has.
    let foreign = ["-secure-comms-listen", "192.0.2.1:2222"];
    runtime(&place, &foreign, &["192.0.2.1:2222", "correct -secure-comms-listen"]);
    let tag = format!("BOTH_PHASES:KBS:{}", address.port());
    runtime(&place, &["-secure-comms-inbounds", &tag], &[&tag, "in use", "-secure-comms-inbounds"]);
}

#[test]
fn a_notify_socket_that_is_none_is_named() {
    let env = [("NOTIFY_SOCKET", "garbage")];
    let parts = ["NOTIFY_SOCKET='garbage'", "expected a path", "Type=notify"];
    fails_with(&Place::new(), &FREE_PORTS, &env, 1, &parts);
}
