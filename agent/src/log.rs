//! Where the log goes: to syslog, or under systemd, on a terminal and without a syslog to stderr.
//!
//! One line per event, control characters escaped: what peers send must not be able to forge lines.

use std::env;
use std::fmt::Display;
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use log::{Level, LevelFilter, Log, Metadata, Record};
use secure_comms_keys::text::one_line;
use syslog::{Facility, Formatter3164, LoggerBackend};

/// The environment variable that sets the level.
pub const LEVEL_VARIABLE: &str = "SECURE_COMMS_LOG";
const PROCESS: &str = "agent-protocol-forwarder";
/// The longest text of a line, in bytes; syslog daemons take 2 KiB or more.
const LINE_MAX: usize = 1900;

/// Why there is no log.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum LogError {
    /// A usage error.
    #[error("reading {LEVEL_VARIABLE}='{0}': no such level; set it to error, warn, info or debug")]
    Level(String),
    /// Called twice.
    #[error("starting the log: it is started already; start it once")]
    Twice,
}

/// Starts the log, as the environment says.
///
/// # Errors
/// A usage error in the environment.
pub fn init() -> Result<(), LogError> {
    let level =
        level(env::var_os(LEVEL_VARIABLE).map(|text| text.to_string_lossy().into_owned()).as_deref())?;
    let logger = Logger { sink: Sink::choose(), level };
    log::set_boxed_logger(Box::new(logger)).map_err(|_| LogError::Twice)?;
    log::set_max_level(level);
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
    /// stderr for people.
    Plain,
    /// syslog(3); none while it can't be reached.
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
                // A panic elsewhere is no reason to lose the log.
                let mut connection = connection.lock().unwrap_or_else(PoisonError::into_inner);
                if !to_syslog(&mut connection, level, text) {
                    to_stderr(plain_prefix(level), text);
                }
            }
        }
    }
}

fn to_stderr(prefix: &str, text: &str) {
    // One write, so that lines of several processes don't mix; a closed stderr is nothing we could report.
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

/// Sends one line, with one new connection if the old one is gone: syslog daemons restart.
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
    // The second round may have only connected.
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

/// A syslog daemon that hangs must not hang the only thread.
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
        // russh tells the story of every packet; below a warning it is not our operators' story.
        let cap = if metadata.target().starts_with("russh") { LevelFilter::Warn } else { LevelFilter::Debug };
        metadata.level() <= self.level.min(cap)
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            self.sink.write(record.level(), &one_line(&record.args().to_string(), LINE_MAX));
        }
    }

    fn flush(&self) {}
}

/// Lets so many lines a minute through, so that strangers tell us why they failed and can't fill the log.
#[derive(Debug)]
pub struct Throttle {
    a_minute: u32,
    window: Mutex<(Option<Instant>, u32)>,
}

impl Throttle {
    /// So many.
    pub fn new(a_minute: u32) -> Self {
        Self { a_minute, window: Mutex::new((None, 0)) }
    }

    /// The level of a line that would be worth `level`: debug, once there are too many of its kind.
    pub fn level(&self, level: Level) -> Level {
        let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        if window.0.is_none_or(|began| began.elapsed() >= MINUTE) {
            *window = (Some(Instant::now()), 0);
        }
        window.1 = window.1.saturating_add(1);
        if window.1 > self.a_minute { Level::Debug.max(level) } else { level }
    }
}

const MINUTE: Duration = Duration::from_secs(60);

/// How many different texts of one failure are remembered, so that two that take turns are not both news.
const REMEMBERED: usize = 8;

/// A failure that may repeat: logged when it starts, changes and ends, not every time.
#[derive(Debug)]
pub struct Repeated {
    what: String,
    failing: Option<Failing>,
}

#[derive(Debug)]
struct Failing {
    since: Instant,
    count: u64,
    seen: Vec<String>,
}

impl Repeated {
    /// Of `what`, say "fetching the keys".
    pub fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), failing: None }
    }

    /// It failed (again).
    pub fn failed(&mut self, error: &dyn Display) {
        if let Some(line) = self.note_failure(error.to_string()) {
            log::warn!("{line}");
        }
    }

    /// It works; a line if it did not before.
    pub fn succeeded(&mut self) {
        if let Some(line) = self.note_success() {
            log::info!("{line}");
        }
    }

    /// How often it has failed since it last worked.
    pub fn count(&self) -> u64 {
        self.failing.as_ref().map_or(0, |failing| failing.count)
    }

    fn note_failure(&mut self, error: String) -> Option<String> {
        let now = || Failing { since: Instant::now(), count: 0, seen: Vec::new() };
        let failing = self.failing.get_or_insert_with(now);
        failing.count += 1;
        if failing.seen.contains(&error) {
            return None;
        }
        if failing.seen.len() == REMEMBERED {
            failing.seen.remove(0);
        }
        let line = match failing.count {
            1 => format!("{}: {error}", self.what),
            count => format!("{}: failure {count}, now: {error}", self.what),
        };
        failing.seen.push(error);
        Some(line)
    }

    fn note_success(&mut self) -> Option<String> {
        let failing = self.failing.take()?;
        let after: Duration = failing.since.elapsed();
        let times =
            if failing.count == 1 { "1 failure".into() } else { format!("{} failures", failing.count) };
        Some(format!("{}: works after {times} in {:.1} s", self.what, after.as_secs_f64()))
    }
}

#[cfg(test)]
#[path = "log_tests.rs"]
mod tests;
