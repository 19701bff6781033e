use log::Level;

use super::*;

#[test]
fn levels_are_parsed_and_unknown_ones_are_usage_errors() {
    for (text, expected) in [
        (None, LevelFilter::Info),
        (Some(""), LevelFilter::Info),
        (Some("debug"), LevelFilter::Debug),
        (Some("INFO"), LevelFilter::Info),
        (Some("Warn"), LevelFilter::Warn),
        (Some("warn"), LevelFilter::Warn),
        (Some("error"), LevelFilter::Error),
    ] {
        assert_eq!(level(text).unwrap(), expected);
    }
    let text = level(Some("lo\nud")).unwrap_err().to_string();
    assert!(
        text.contains("SECURE_COMMS_LOG='lo\\nud'") && text.contains("error, warn, info or debug"),
        "{text}"
    );
}

fn logger(level: LevelFilter) -> Logger {
    Logger { queue: Mutex::new(LogQueue::new(Sink::Plain(Channel::stderr().unwrap()))), level }
}

#[test]
fn russh_logs_from_warnings_on_and_we_from_our_level_on() {
    let debug = logger(LevelFilter::Debug);
    let enabled = |target, level| debug.enabled(&Metadata::builder().target(target).level(level).build());
    assert!(enabled("agent_protocol_forwarder::run", Level::Debug) && enabled("russh::server", Level::Warn));
    assert!(!enabled("russh::server", Level::Info) && !enabled("agent_protocol_forwarder", Level::Trace));
    let quiet = logger(LevelFilter::Error);
    assert!(!quiet.enabled(&Metadata::builder().target("russh").level(Level::Warn).build()));
}
