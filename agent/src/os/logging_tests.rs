use std::os::unix::net::UnixDatagram;

use super::*;

#[test]
fn levels_are_parsed_and_unknown_ones_are_usage_errors() {
    for (text, expected) in [
        (None, LevelFilter::Info),
        (Some(""), LevelFilter::Info),
        (Some("debug"), LevelFilter::Debug),
        (Some("warn"), LevelFilter::Warn),
        (Some("error"), LevelFilter::Error),
    ] {
        assert_eq!(level(text), Ok(expected));
    }
    let text = level(Some("lo\nud")).unwrap_err().to_string();
    assert!(
        text.contains("SECURE_COMMS_LOG='lo\\nud'") && text.contains("error, warn, info or debug"),
        "{text}"
    );
}

#[test]
fn russh_logs_from_warnings_on_and_we_from_our_level_on() {
    let logger = Logger { sink: Sink::Plain, level: LevelFilter::Debug };
    let enabled = |target, level| logger.enabled(&Metadata::builder().target(target).level(level).build());
    assert!(enabled("agent_protocol_forwarder::run", Level::Debug) && enabled("russh::server", Level::Warn));
    assert!(!enabled("russh::server", Level::Info) && !enabled("agent_protocol_forwarder", Level::Trace));
    let quiet = Logger { sink: Sink::Plain, level: LevelFilter::Error };
    assert!(!quiet.enabled(&Metadata::builder().target("russh").level(Level::Warn).build()));
}

#[test]
fn a_full_or_lost_syslog_daemon_does_not_block() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("log");
    let daemon = UnixDatagram::bind(&path).unwrap();
    let formatter =
        Formatter3164 { facility: Facility::LOG_DAEMON, hostname: None, process: PROCESS.into(), pid: 7 };
    let mut syslog = syslog::unix_custom(formatter, &path).unwrap();
    set_nonblocking(&syslog).unwrap();
    assert!(send(&mut syslog, Level::Warn, "hello"));
    let mut buffer = [0; 256];
    let length = daemon.recv(&mut buffer).unwrap();
    let line = std::str::from_utf8(&buffer[..length]).unwrap();
    assert!(line.starts_with("<28>") && line.ends_with(" agent-protocol-forwarder[7]: hello"), "{line:?}");
    let sent = (0..100_000).take_while(|_| send(&mut syslog, Level::Info, "flood")).count();
    assert!(sent < 100_000, "a full queue is an error, not a wait");
    drop(daemon);
    assert!(!send(&mut syslog, Level::Info, "nobody listens"));
}
