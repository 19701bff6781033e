//! The log's destination: stderr under systemd, on a terminal and without syslog; else syslog.
//!
//! One line per event, with control characters escaped, so that texts of peers can't forge lines. Writing never waits: see
//! `log_output` and `log_queue`.

use std::env;
use std::io::{self, IsTerminal};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use log::{Level, LevelFilter, Log, Metadata, Record};
use secure_comms_keys::text::one_line;
use tokio::sync::Notify;

use super::log_limits::LIBRARIES;
use super::log_output::{Channel, Sink, Syslog, would_block};
use super::log_queue::LogQueue;
use super::operator_log::{is_for_operator, operator_log};

/// The environment variable that sets the level.
pub const LEVEL_VARIABLE: &str = "SECURE_COMMS_LOG";
/// The longest text of a line, in bytes. Syslog daemons accept 2 KiB or more, and a pipe takes a line of 4 KiB whole.
const LINE_MAX: usize = 1900;
/// What the targets of [`LIBRARIES`] begin with.
const LIBRARY_TARGETS: [&str; 3] = ["russh", "secure_comms_tunnel", "secure_comms_ssh"];
/// The socket of the syslog daemon.
const SYSLOG: &str = "/dev/log";
/// Interval at which lines that wait are tried again.
const RETRY: Duration = Duration::from_millis(200);
/// Time that the end of the process leaves for lines that wait.
const LAST_LINES: Duration = Duration::from_secs(1);

/// Notified when lines wait.
static WAITING: Notify = Notify::const_new();

/// Why the log can't be started.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The level in the environment is unknown.
    #[error("reading {LEVEL_VARIABLE}='{0}': no such level; set it to error, warn, info or debug")]
    Level(String),
    /// stderr can't be used.
    #[error("starting the log: {0}; check the process's standard error")]
    Stderr(#[from] io::Error),
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
    let logger = Logger { queue: Mutex::new(LogQueue::new(choose_sink()?)), level };
    log::set_boxed_logger(Box::new(logger)).map_err(|_| LogError::Twice)?;
    // Whatever the level, the operator's lines are made.
    log::set_max_level(level.max(LevelFilter::Info));
    Ok(())
}

fn level(text: Option<&str>) -> Result<LevelFilter, LogError> {
    let text = text.unwrap_or_default();
    match text.to_ascii_lowercase().as_str() {
        "" | "info" => Ok(LevelFilter::Info),
        "debug" => Ok(LevelFilter::Debug),
        "warn" => Ok(LevelFilter::Warn),
        "error" => Ok(LevelFilter::Error),
        _ => Err(LogError::Level(one_line(text, LINE_MAX))),
    }
}

fn choose_sink() -> io::Result<Sink> {
    let stderr = Channel::stderr()?;
    Ok(if env::var_os("JOURNAL_STREAM").is_some_and(|stream| !stream.is_empty()) {
        Sink::Journal(stderr)
    } else if io::stderr().is_terminal() || !Path::new(SYSLOG).exists() {
        Sink::Plain(stderr)
    } else {
        Sink::Syslog(Syslog::new(SYSLOG), stderr)
    })
}

/// Writes lines that wait, once the output takes them. Never returns.
pub async fn write_waiting() {
    loop {
        WAITING.notified().await;
        tokio::time::sleep(RETRY).await;
        log::logger().flush();
    }
}

/// Prints the last text of a process that fails to stderr, behind the lines that wait. Waits for a reader at most
/// `LAST_LINES`: a process that ends must not hang because its output is not read.
pub fn print_last(text: &str) {
    log::logger().flush();
    // Without a descriptor there is nothing to print to; the exit code reports the failure too.
    let Ok(mut stderr) = Channel::stderr() else { return };
    let text = format!("{text}\n").into_bytes();
    for _ in 0..LAST_LINES.as_millis() / RETRY.as_millis() {
        if !stderr.write(text.clone()).is_err_and(|error| would_block(&error)) {
            return;
        }
        thread::sleep(RETRY);
        log::logger().flush();
    }
}

struct Logger {
    queue: Mutex<LogQueue>,
    level: LevelFilter,
}

impl Logger {
    fn queue(&self) -> MutexGuard<'_, LogQueue> {
        // A panic in another thread must not stop the log.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The level of a record: debug for lines of libraries beyond their limit.
    fn level_of(&self, record: &Record<'_>) -> Level {
        let is_library = LIBRARY_TARGETS.iter().any(|library| record.target().starts_with(library));
        let counts = is_library && self.enabled(record.metadata());
        if counts { LIBRARIES.level(record.level()) } else { record.level() }
    }
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // Below warnings, russh logs every packet.
        let cap = if metadata.target().starts_with("russh") { LevelFilter::Warn } else { LevelFilter::Debug };
        metadata.level() <= self.level.min(cap)
    }

    fn log(&self, record: &Record<'_>) {
        let level = self.level_of(record);
        let enabled = level <= self.level && self.enabled(record.metadata());
        let for_operator = level == record.level() && is_for_operator(record.metadata());
        if !enabled && !for_operator {
            return;
        }
        let text = one_line(&record.args().to_string(), LINE_MAX);
        if for_operator {
            operator_log().add(level, &text);
        }
        if enabled && !self.queue().push(level, text) {
            WAITING.notify_one();
        }
    }

    fn flush(&self) {
        if !self.queue().drain() {
            WAITING.notify_one();
        }
    }
}

#[cfg(test)]
#[path = "logging_tests.rs"]
mod tests;
