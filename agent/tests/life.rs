//! The real binary under systemd: its signals, and its notifications.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "clippy.toml lets tests fail loudly; clippy does not take the helpers of an integration test for tests"
)]

mod support;

use base64ct::{Base64, Encoding};
use support::{FREE_PORTS, Place, Systemd};

#[test]
fn systemd_is_notified_of_ready_status_and_stopping() {
    let place = Place::new();
    let (systemd, notify) = (Systemd::new(&place), place.path("notify"));
    let mut agent = place.start(&FREE_PORTS, &[("NOTIFY_SOCKET", notify.to_str().unwrap())]);
    let ready = systemd.hears("READY=1");
    assert!(ready.contains("STATUS=Attestation phase: waiting for a worker node"), "{ready}");
    // READY=1 is sent once the listener is bound.
    std::net::TcpStream::connect(agent.address()).unwrap();
    assert_eq!(agent.terminate().code(), Some(0));
    assert!(systemd.hears("STOPPING=1").contains("STATUS=stopping"));
    assert!(!place.path("state").exists(), "nothing was latched");
}

#[test]
fn keys_in_the_user_data_start_the_kubernetes_phase() {
    let place = Place::new();
    let key = |name: &str| {
        let path = format!("{}/../keys/testdata/{name}", env!("CARGO_MANIFEST_DIR"));
        Base64::encode_string(&std::fs::read(path).unwrap())
    };
    place.write_config(&format!(
        r#"{{"sc": true, "sc-pp-prv": "{}", "sc-wn-pub": "{}"}}"#,
        key("ed25519.openssh"),
        key("ed25519.pub")
    ));
    let (systemd, notify) = (Systemd::new(&place), place.path("notify"));
    let args = [&FREE_PORTS[..], &["-secure-comms-user-data=all"]].concat();
    let mut agent = place.start(&args, &[("NOTIFY_SOCKET", notify.to_str().unwrap())]);
    let ready = systemd.hears("READY=1");
    assert!(ready.contains("STATUS=Kubernetes phase: waiting for the worker node"), "{ready}");
    assert_eq!(agent.terminate().code(), Some(0));
}

#[test]
fn the_watchdog_is_fed() {
    let place = Place::new();
    let (systemd, notify) = (Systemd::new(&place), place.path("notify"));
    let env = [("NOTIFY_SOCKET", notify.to_str().unwrap()), ("WATCHDOG_USEC", "20000")];
    let mut agent = place.start(&FREE_PORTS, &env);
    systemd.hears("READY=1");
    for _ in 0..3 {
        systemd.hears("WATCHDOG=1");
    }
    assert_eq!(agent.terminate().code(), Some(0));
}

#[test]
fn a_start_that_waits_for_a_namespace_can_be_stopped() {
    let place = Place::new();
    let (systemd, notify) = (Systemd::new(&place), place.path("notify"));
    let absent = place.path("netns");
    let tags = format!("BOTH_PHASES:KBS:0,BOTH_PHASES:X:{}:0", absent.to_str().unwrap());
    let args = ["-secure-comms", "-secure-comms-inbounds", &tags];
    let mut agent = place.start(&args, &[("NOTIFY_SOCKET", notify.to_str().unwrap())]);
    agent.says("inbound KBS listens on");
    assert_eq!(agent.terminate().code(), Some(0));
    let first = systemd.hears("STOPPING=1");
    assert!(first.contains("STATUS=stopping before the start was complete"), "{first}");
}

#[test]
fn a_late_daemon_config_is_waited_for() {
    let place = Place::new();
    std::fs::remove_file(place.path("apf.json")).unwrap();
    let (systemd, notify) = (Systemd::new(&place), place.path("notify"));
    // The flags alone do not enable Secure Comms.
    let args = ["-secure-comms-inbounds", "BOTH_PHASES:KBS:0"];
    let mut agent = place.start(&args, &[("NOTIFY_SOCKET", notify.to_str().unwrap())]);
    let config = place.path("apf.json");
    systemd.hears(&format!("STATUS=waiting for the daemon config {}: it is not there yet", config.display()));
    systemd.hears("EXTEND_TIMEOUT_USEC=60000000");
    place.write_config("{\n \"sc-inb");
    agent.says("not complete yet: EOF while parsing a string at line 2 column 8");
    let whole = place.path("whole");
    std::fs::write(&whole, r#"{"sc-outbounds": "", "pod-name": "late"}"#).unwrap();
    std::fs::rename(whole, config).unwrap();
    agent.says("found after");
    assert!(agent.rest().contains("Secure Comms is off"));

    let mut agent = place.start(&FREE_PORTS, &[("NOTIFY_SOCKET", notify.to_str().unwrap())]);
    agent.says("pod late");
    systemd.hears("READY=1");
    assert_eq!(agent.terminate().code(), Some(0));
}

#[test]
fn without_inotify_the_daemon_config_is_still_found() {
    let place = Place::new();
    let mut agent = place.start_without_inotify(&FREE_PORTS);
    agent.says("is looked for every second: inotify: ");
    agent.address();
    assert_eq!(agent.terminate().code(), Some(0));

    std::fs::remove_file(place.path("apf.json")).unwrap();
    let mut agent = place.start_without_inotify(&FREE_PORTS);
    agent.says("it is not there yet");
    place.write_config("{}");
    agent.says("found after");
    agent.address();
    assert_eq!(agent.terminate().code(), Some(0));
}

#[test]
fn on_a_terminal_the_wait_says_how_to_end_it() {
    let place = Place::new();
    std::fs::remove_file(place.path("apf.json")).unwrap();
    let mut agent = place.start_on_terminal(&FREE_PORTS);
    let wait = format!("waiting for the daemon config {}", place.path("apf.json").display());
    assert_eq!(agent.says(&wait), " (Ctrl-C ends this): it is not there yet");
    place.write_config("{}");
    agent.says("found after");
}

#[test]
fn a_start_that_waits_for_its_daemon_config_can_be_stopped() {
    let place = Place::new();
    std::fs::remove_file(place.path("apf.json")).unwrap();
    let (systemd, notify) = (Systemd::new(&place), place.path("notify"));
    let mut agent = place.start(&FREE_PORTS, &[("NOTIFY_SOCKET", notify.to_str().unwrap())]);
    agent.says("it is not there yet");
    assert_eq!(agent.terminate().code(), Some(0));
    systemd.hears("STOPPING=1");
}
