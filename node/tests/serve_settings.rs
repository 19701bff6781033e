//! The settings of `serve`, over the real binary: which source counts, and what is refused.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "clippy.toml lets tests fail loudly; clippy does not take the helpers of an integration test for tests"
)]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::{Value, json};

fn adaptor(args: &[&str], env: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_secure-comms-adaptor"));
    command.args(args).env_clear().envs(env.iter().copied()).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// The settings as JSON.
#[track_caller]
fn shown(args: &[&str], env: &[(&str, &str)]) -> Value {
    let output = adaptor(&[&["config", "show", "-o", "json"], args].concat(), env);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The faults, without the program's name before each.
#[track_caller]
fn faults(args: &[&str], env: &[(&str, &str)]) -> Vec<String> {
    let serve = adaptor(&[&["serve"], args].concat(), env);
    let check = adaptor(&[&["config", "check"], args].concat(), env);
    assert_eq!((serve.status.code(), check.status.code()), (Some(2), Some(2)), "{}", text(&serve.stderr));
    assert_eq!(text(&serve.stderr), text(&check.stderr), "the check finds what the service finds");
    let line = |line: &str| line.strip_prefix("secure-comms-adaptor: ").unwrap().to_owned();
    text(&serve.stderr).lines().map(line).collect()
}

fn file(dir: &Path, content: &str) -> String {
    let path = dir.join("adaptor.toml");
    fs::write(&path, content).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn a_flag_counts_before_a_variable_before_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let config = file(
        dir.path(),
        "# first\ngrace = \"1s\"\nkbs = \"file:1\"\nrequire-pq = true\ncaa = false\ninbounds = [\"BOTH_PHASES:F:0\"]\n\
         allowed-uids = [7, 8]\nforwarder-port = 1001\n",
    );
    let file_at = |line: u32| json!({"kind": "file", "file": config, "line": line});
    let variable = |name: &str| json!({"kind": "variable", "variable": name});
    let flag = |name: &str| json!({"kind": "flag", "flag": name});
    let default = json!({"kind": "default"});
    let given = ["--config", config.as_str()];
    let settings = shown(&given, &[]);
    for (name, value, source) in [
        ("grace", json!("1s"), file_at(2)),
        ("kbs", json!("file:1"), file_at(3)),
        ("kbs-url", json!("http://file:1/"), default.clone()),
        ("require-pq", json!(true), file_at(4)),
        ("caa", json!(false), file_at(5)),
        ("inbounds", json!(["BOTH_PHASES:F:0"]), file_at(6)),
        ("allowed-uids", json!(["7", "8"]), file_at(7)),
        ("forwarder-port", json!(1001), file_at(8)),
        ("listen-port", json!(15151), default.clone()),
        ("certificates", Value::Null, default.clone()),
        ("socket", json!("/run/secure-comms/adaptor.sock"), default),
    ] {
        assert_eq!(settings[name], json!({"value": value, "source": source}), "{name}");
    }
    let env = [
        ("SECURE_COMMS_CONFIG", config.as_str()),
        ("SECURE_COMMS_GRACE", "2s"),
        ("SECURE_COMMS_KBS_ADDR", ""),
        ("SECURE_COMMS_REQUIRE_PQ", "false"),
        ("SECURE_COMMS_INBOUNDS", "BOTH_PHASES:V:0"),
        ("SECURE_COMMS_ALLOWED_UIDS", "9,10"),
        ("FORWARDER_PORT", "1002"),
        ("SECURE_COMMS_RUN_DIR", "/run/x"),
    ];
    let settings = shown(&[], &env);
    for (name, value, source) in [
        ("grace", json!("2s"), variable("SECURE_COMMS_GRACE")),
        ("kbs", json!("file:1"), file_at(3)),
        ("require-pq", json!(false), variable("SECURE_COMMS_REQUIRE_PQ")),
        ("inbounds", json!(["BOTH_PHASES:V:0"]), variable("SECURE_COMMS_INBOUNDS")),
        ("forwarder-port", json!(1002), variable("FORWARDER_PORT")),
        ("socket", json!("/run/x/adaptor.sock"), json!({"kind": "default"})),
    ] {
        assert_eq!(settings[name], json!({"value": value, "source": source}), "{name}");
    }
    let flags = [
        "--grace",
        "3s",
        "--kbs",
        "flag:1",
        "--require-pq",
        "--caa",
        "on",
        "--inbounds",
        "",
        "--socket",
        "/s",
    ];
    let settings = shown(&[&flags[..], &["--log", "debug", "--forwarder-port=1003"]].concat(), &env);
    for (name, value) in [
        ("grace", json!("3s")),
        ("kbs", json!("flag:1")),
        ("require-pq", json!(true)),
        ("caa", json!(true)),
        ("inbounds", json!([""])),
        ("socket", json!("/s")),
        ("log", json!("debug")),
        ("forwarder-port", json!(1003)),
    ] {
        assert_eq!(settings[name], json!({"value": value, "source": flag(&format!("--{name}"))}), "{name}");
    }
}

#[test]
fn what_is_shown_as_toml_is_a_settings_file() {
    let dir = tempfile::tempdir().unwrap();
    let args =
        ["--grace", "5m", "--kata-agent-socket", "/a\"\\", "--kata-agent-socket", "/b", "--require-pq"];
    let output = adaptor(&[&["config", "show"], &args[..]].concat(), &[]);
    let toml = text(&output.stdout);
    assert!(toml.contains("grace = \"5m\" # flag\n") && toml.contains("caa = true # default\n"), "{toml}");
    assert!(toml.contains("# init-data: not set\n"), "{toml}");
    let again = shown(&["--config", &file(dir.path(), &toml)], &[]);
    let first = shown(&args, &[]);
    for (name, setting) in first.as_object().unwrap() {
        assert_eq!(setting["value"], again[name]["value"], "{name}");
    }
    let line = toml.lines().position(|line| line.starts_with("grace")).unwrap() + 1;
    assert_eq!(again["grace"]["source"]["line"], json!(line));
}

#[test]
fn all_faults_of_all_sources_come_together() {
    let dir = tempfile::tempdir().unwrap();
    let config = file(dir.path(), "kbs-ulr = \"x\"\ngrace = 5\n");
    let found = faults(
        &["--config", &config, "--deadline", "soon", "--listen-port", "15150"],
        &[
            ("SECURE_COMMS_METRICS_LISTEN", "localhost"),
            ("SECURE_COMMS_ALLOWED_UIDS", "root"),
            ("SECURE_COMMS", "false"),
        ],
    );
    assert_eq!(
        found,
        [
            format!("{config}:1: unknown key 'kbs-ulr': did you mean kbs-url?"),
            format!("{config}:2: grace: expected a string, as \"x\""),
            "SECURE_COMMS 'false': Secure Comms is off: set it to true, or do not start this program"
                .to_owned(),
            "--deadline 'soon': expected a time from 1s to 24h, such as 90s, 5m or 1h30m".to_owned(),
            "SECURE_COMMS_ALLOWED_UIDS 'root': expected the number of a user, as id -u prints it".to_owned(),
            "SECURE_COMMS_METRICS_LISTEN 'localhost': expected IP:PORT, [IPv6]:PORT or off".to_owned(),
            "--listen-port: is also --forwarder-port: the service's own port must be another one".to_owned(),
        ]
    );
    let config = file(
        dir.path(),
        "no-trustee = true\nkbs-url = \"https://k\"\nkbs-filter = \"maybe\"\nforwarder-port = 0\n",
    );
    let found = faults(&["--config", &config], &[("SECURE_COMMS_KBS_ADDR", "k:1")]);
    assert_eq!(
        found,
        [
            format!("{config}:3: kbs-filter 'maybe': expected on or off"),
            format!(
                "{config}:2: kbs-url: contradicts --no-trustee (or SECURE_COMMS_NO_TRUSTEE=true): remove one of them"
            ),
            format!("{config}:4: forwarder-port '0': expected a port, from 1 to 65535"),
        ]
    );
    let missing = faults(&["--config", "/nowhere.toml"], &[]);
    assert_eq!(missing, ["/nowhere.toml: No such file or directory (os error 2)"]);
}

#[test]
fn an_inbound_that_serves_one_pod_is_refused() {
    let found = faults(&["--inbounds", "KUBERNETES_PHASE:A:7000,KUBERNETES_PHASE:B:/run/b.sock"], &[]);
    assert_eq!(
        found,
        [
            "--inbounds: tag 'KUBERNETES_PHASE:A:7000': a fixed port serves one pod only: use port 0, or a unix path with {pod} \
             in it",
            "--inbounds: tag 'KUBERNETES_PHASE:B:/run/b.sock': a fixed path serves one pod only: put {pod}, the pod's id, into \
             it",
        ]
    );
    shown(&["--inbounds", "KUBERNETES_PHASE:A:0,KUBERNETES_PHASE:B:/run/{pod}/b.sock"], &[]);
}

#[test]
fn a_key_file_that_others_may_read_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let key = dir.path().join("key.pem");
    fs::write(&key, "x").unwrap();
    let key = key.to_str().unwrap();
    let args = ["--kbs-admin-key", key, "--kbs-url", "https://k"];
    for mode in [0o644, 0o604, 0o660] {
        fs::set_permissions(key, fs::Permissions::from_mode(mode)).unwrap();
        let found = faults(&args, &[]).concat();
        assert!(
            found.starts_with(&format!("--kbs-admin-key: {key}: others may access it (mode {mode:04o}): ")),
            "{found}"
        );
    }
    for mode in [0o600, 0o400, 0o440] {
        fs::set_permissions(key, fs::Permissions::from_mode(mode)).unwrap();
        shown(&args, &[]);
    }
}

#[test]
fn init_data_has_one_source_and_rules_are_looked_through() {
    let dir = tempfile::tempdir().unwrap();
    let rules = dir.path().join("rules.toml");
    fs::write(&rules, "[[rule]]\nnamespace = \"*\"\npod = \"*\"\nfile = \"none.toml\"\n").unwrap();
    let rules = rules.to_str().unwrap();
    let digest = "ab".repeat(32);
    let found = faults(&["--init-data-rules", rules], &[]).concat();
    assert!(
        found.starts_with(&format!("--init-data-rules: {rules}: rule 1: ")) && found.contains("none.toml"),
        "{found}"
    );
    let config =
        file(dir.path(), &format!("init-data-digest = \"{digest}\"\ninit-data-rules = \"{rules}\"\n"));
    let found = faults(&["--config", &config], &[]).concat();
    assert!(
        found.starts_with(&format!("{config}:2: init-data-rules: contradicts another source of init-data")),
        "{found}"
    );
    // The variable counts before the file.
    shown(&["--config", &config], &[("SECURE_COMMS_INIT_DATA_DIGEST", &digest)]);
}

#[test]
fn files_of_the_kbs_are_checked_as_the_service_reads_them() {
    let dir = tempfile::tempdir().unwrap();
    let bad = dir.path().join("bad.pem");
    fs::write(&bad, "no PEM").unwrap();
    fs::set_permissions(&bad, fs::Permissions::from_mode(0o600)).unwrap();
    for (flag, word) in [("--kbs-ca", "no certificate in it"), ("--kbs-admin-key", "KBS admin key")] {
        let args = [flag, bad.to_str().unwrap(), "--kbs-url", "https://k"];
        let output = adaptor(&[&["config", "check"], &args[..]].concat(), &[]);
        let said = text(&output.stderr);
        assert_eq!((output.status.code(), text(&output.stdout).as_str()), (Some(1), ""), "{said}");
        assert!(said.contains(word) && said.contains(flag), "{said}");
    }
}

#[test]
fn settings_without_a_fault_are_said_to_have_none() {
    let output = adaptor(&["config", "check"], &[]);
    assert_eq!(
        (output.status.code(), text(&output.stdout).as_str()),
        (Some(0), "the settings have no fault\n")
    );
    assert!(
        text(&output.stderr).contains("bound to no VM"),
        "the warnings are there: {}",
        text(&output.stderr)
    );
}

#[test]
fn a_pipe_is_no_settings_file_and_holds_nothing_up() {
    let dir = tempfile::tempdir().unwrap();
    let pipe = dir.path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRUSR).unwrap();
    let pipe = pipe.to_str().unwrap();
    let rules = dir.path().join("rules.toml");
    fs::write(&rules, "[[rule]]\nnamespace = \"*\"\npod = \"*\"\nfile = \"pipe\"\n").unwrap();
    for args in
        [["--config", pipe], ["--init-data-rules", pipe], ["--init-data-rules", rules.to_str().unwrap()]]
    {
        let found = faults(&args, &[]).concat();
        assert!(found.contains("not a regular file"), "{found}");
    }
}

#[test]
fn each_fault_of_the_way_in_of_caa_is_reported() {
    let args = ["--listen-port", "0", "--grace", "x", "--pods-directory", "pods"];
    assert_eq!(
        faults(&args, &[]),
        [
            "--listen-port '0': expected a port, from 1 to 65535",
            "--pods-directory 'pods': expected an absolute path",
            "--grace 'x': expected a time from 0s to 24h, such as 90s, 5m or 1h30m",
        ]
    );
}

#[test]
fn certificates_are_checked_as_the_service_reads_them() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("caa");
    let output = adaptor(&["config", "check", "--certificates", missing.to_str().unwrap()], &[]);
    let said = text(&output.stderr);
    assert_eq!((output.status.code(), text(&output.stdout).as_str()), (Some(1), ""), "{said}");
    assert!(said.contains("No such file") && said.contains("caa"), "{said}");
}
