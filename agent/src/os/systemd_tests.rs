use super::*;

fn received(systemd: &UnixDatagram) -> String {
    let mut buffer = [0; 256];
    systemd.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let length = systemd.recv(&mut buffer).unwrap();
    String::from_utf8(buffer[..length].to_vec()).unwrap()
}

fn tells_everything(name: OsString, systemd: &UnixDatagram) {
    let notifier = Notifier::open(Some(name)).unwrap();
    notifier.ready("Attestation: waiting\nREADY=0");
    assert_eq!(received(systemd), "READY=1\nSTATUS=Attestation: waiting READY=0", "no forged assignment");
    notifier.status("Kubernetes");
    assert_eq!(received(systemd), "STATUS=Kubernetes");
    notifier.watchdog();
    assert_eq!(received(systemd), "WATCHDOG=1");
    notifier.extend_start(Duration::from_secs(60));
    assert_eq!(received(systemd), "EXTEND_TIMEOUT_USEC=60000000");
    notifier.stopping("draining");
    assert_eq!(received(systemd), "STOPPING=1\nSTATUS=draining");
}

#[test]
fn systemd_is_told_over_a_path_and_over_an_abstract_name() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("notify");
    tells_everything(path.clone().into(), &UnixDatagram::bind(&path).unwrap());
    let name = format!("secure-comms-test-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(&name).unwrap();
    tells_everything(format!("@{name}").into(), &UnixDatagram::bind_addr(&address).unwrap());
}

#[tokio::test(start_paused = true)]
async fn a_systemd_that_reads_nothing_is_not_waited_for() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("notify");
    let systemd = UnixDatagram::bind(&path).unwrap();
    let notifier = Notifier::open(Some(path.into())).unwrap();
    let began = std::time::Instant::now();
    for n in 0..100_000 {
        notifier.status(&format!("{n}"));
        assert!(began.elapsed() < Duration::from_secs(30), "it waits");
    }
    notifier.ready("up");
    notifier.watchdog();
    notifier.status("up and more");
    // Once it reads again, it hears what it missed: no more than the newest status, and never less than READY=1.
    while !received(&systemd).contains("READY=1") {
        let late = tokio::time::timeout(2 * RETRY, notifier.send_late());
        assert!(late.await.is_err(), "it never returns");
    }
    notifier.status("again");
    assert_eq!(received(&systemd), "STATUS=again", "nothing is sent twice");
}

#[test]
fn without_systemd_nothing_happens() {
    for name in [None, Some(OsString::new())] {
        let notifier = Notifier::open(name).unwrap();
        notifier.ready("");
        notifier.watchdog();
    }
    // A lost systemd is not an error.
    Notifier::open(Some("/nonexistent/notify".into())).unwrap().status("x");
}

#[test]
fn a_socket_that_is_not_a_unix_socket_is_an_error() {
    for name in ["vsock:2:1", "relative"] {
        let text = Notifier::open(Some(name.into())).unwrap_err().to_string();
        assert!(text.contains(name) && text.contains("expected a path or an abstract name"), "{text}");
    }
    assert!(Notifier::open(Some(format!("/{}", "x".repeat(200)).into())).is_err());
}

#[test]
fn the_watchdog_is_fed_at_half_its_time_and_only_if_it_is_ours() {
    assert_eq!(watchdog(Some("30000000"), None, 7), Some(Duration::from_secs(15)));
    assert_eq!(watchdog(Some("30000000"), Some("7"), 7), Some(Duration::from_secs(15)));
    for (usec, pid) in
        [(Some("30000000"), Some("8")), (None, Some("7")), (Some("x"), None), (Some("0"), None)]
    {
        assert_eq!(watchdog(usec, pid, 7), None, "{usec:?} {pid:?}");
    }
}
