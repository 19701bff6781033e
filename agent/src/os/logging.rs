//! The log's destination: stderr under systemd, on a terminal and without syslog; else syslog.
//!
//! One line per event, with control characters escaped, so that texts of peers can't forge lines.

use std::env;
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use super::operator_log::{is_for_operator, operator_log};
use log::{Level, LevelFilter, Log, Metadata, Record};
use secure_comms_keys::text::one_line;
use syslog::{Facility, Formatter3164, LoggerBackend};

/// The environment variable that sets the level.
pub const LEVEL_VARIABLE: &str = "SECURE_COMMS_LOG";
const PROCESS: &str = "agent-protocol-forwarder";
/// The longest text of a line, in bytes. Syslog daemons accept 2 KiB or more.
const LINE_MAX: usize = 1900;

/// Why the log can't be started.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum LogError {
    /// The level in the environment is unknown.
    #[error("reading {LEVEL_VARIABLE}='{0}': no such level; set it to error, warn, info or debug")]
    Level(String),
    /// The log was started before.
    #[error("starting the log: it is started already; start it once")]
    Twice,
}

/// Starts the log, at the level in the environment.
///
/// # Errors
/// A usage error in the environment.
pub fn init() -> Result<(), LogError> {
    let level =
        level(env::var_os(LEVEL_VARIABLE).map(|text| text.to_string_lossy().into_owned()).as_deref())?;
    let logger = Logger { sink: Sink::choose(), level };
    log::set_boxed_logger(Box::new(logger)).map_err(|_| LogError::Twice)?;
    // Whatever the level, the operator's lines are made.
    log::set_max_level(level.max(LevelFilter::Info));
    Ok(())
}

fn level(text: Option<&str>) -> Result<LevelFilter, LogError> {
    match text.unwrap_or_default() {
        "" | "info" => Ok(LevelFilter::Info),
        "debug" => Ok(LevelFilter::Debug),
        "warn" => Ok(LevelFilter::Warn),
        "error" => Ok(LevelFilter::Error),
        other => Err(LogError::Level(one_line(other, LINE_MAX))),
    }
}

type Syslog = syslog::Logger<LoggerBackend, Formatter3164>;

enum Sink {
    /// sd-daemon(3): stderr, each line with its priority.
    Journal,
    /// stderr, each line with its level.
    Plain,
    /// syslog(3); the connection is none while syslog can't be reached.
    Syslog(Mutex<Option<Syslog>>),
}

impl Sink {
    fn choose() -> Self {
        if env::var_os("JOURNAL_STREAM").is_some_and(|stream| !stream.is_empty()) {
            Self::Journal
        } else if std::io::stderr().is_terminal() || !Path::new("/dev/log").exists() {
            Self::Plain
        } else {
            Self::Syslog(Mutex::new(None))
        }
    }

    fn write(&self, level: Level, text: &str) {
        match self {
            Self::Journal => to_stderr(journal_priority(level), text),
            Self::Plain => to_stderr(plain_prefix(level), text),
            Self::Syslog(connection) => {
                // A panic in another thread must not stop the log.
                let mut connection = connection.lock().unwrap_or_else(PoisonError::into_inner);
                if !to_syslog(&mut connection, level, text) {
                    to_stderr(plain_prefix(level), text);
                }
            }
        }
    }
}

fn to_stderr(prefix: &str, text: &str) {
    // One write, so that lines of several processes don't mix. A closed stderr can't be reported.
    let _ = std::io::stderr().lock().write_all(format!("{prefix}{text}\n").as_bytes());
}

fn journal_priority(level: Level) -> &'static str {
    match level {
        Level::Error => "<3>",
        Level::Warn => "<4>",
        Level::Info => "<6>",
        Level::Debug | Level::Trace => "<7>",
    }
}

fn plain_prefix(level: Level) -> &'static str {
    match level {
        Level::Error => "error: ",
        Level::Warn => "warning: ",
        Level::Info => "info: ",
        Level::Debug | Level::Trace => "debug: ",
    }
}

/// Sends one line, and reconnects once if the connection is gone: syslog daemons restart.
fn to_syslog(connection: &mut Option<Syslog>, level: Level, text: &str) -> bool {
    for _ in 0..2 {
        let Some(syslog) = connection.as_mut() else {
            *connection = connect();
            continue;
        };
        if send(syslog, level, text) {
            return true;
        }
        *connection = None;
    }
    // The second iteration may have only connected.
    connection.as_mut().is_some_and(|syslog| send(syslog, level, text))
}

fn connect() -> Option<Syslog> {
    let formatter = Formatter3164 {
        facility: Facility::LOG_DAEMON,
        hostname: None,
        process: PROCESS.to_owned(),
        pid: std::process::id(),
    };
    syslog::unix(formatter).ok().filter(|syslog| set_nonblocking(syslog).is_ok())
}

/// Makes sends fail instead of blocking the only thread when the syslog daemon hangs.
fn set_nonblocking(syslog: &Syslog) -> std::io::Result<()> {
    match &syslog.backend {
        LoggerBackend::Unix(socket) => socket.set_nonblocking(true),
        LoggerBackend::UnixStream(socket) => socket.get_ref().set_nonblocking(true),
        LoggerBackend::Udp(..) | LoggerBackend::Tcp(_) => Ok(()),
    }
}

fn send(syslog: &mut Syslog, level: Level, text: &str) -> bool {
    match level {
        Level::Error => syslog.err(text),
        Level::Warn => syslog.warning(text),
        Level::Info => syslog.info(text),
        Level::Debug | Level::Trace => syslog.debug(text),
    }
    .is_ok()
}

struct Logger {
    sink: Sink,
    level: LevelFilter,
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // Below warnings, russh logs every packet.
        let cap = if metadata.target().starts_with("russh") { LevelFilter::Warn } else { LevelFilter::Debug };
        metadata.level() <= self.level.min(cap)
    }

    fn log(&self, record: &Record<'_>) {
        let (enabled, for_operator) = (self.enabled(record.metadata()), is_for_operator(record.metadata()));
        if !enabled && !for_operator {
            return;
        }
        let text = one_line(&record.args().to_string(), LINE_MAX);
        if for_operator {
            operator_log().add(record.level(), &text);
        }
        if enabled {
            self.sink.write(record.level(), &text);
        }
    }

    fn flush(&self) {}
}

#[cfg(test)]
#[path = "logging_tests.rs"]
mod tests;
