//! Limits on log lines: throttles for everything that a stranger can make the agent log, and one line for a failure that
//! repeats.

use std::fmt::Display;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use log::Level;
use tokio::sync::Notify;
use tokio::time::sleep;

use super::operator_log::TO_OPERATOR;

/// Lines about connections that have not authenticated.
pub(crate) static UNAUTHENTICATED: Throttle = Throttle::new("connections without authentication", 20);
/// Lines about connections that were evicted.
pub(crate) static EVICTED: Throttle = Throttle::new("evicted connections", 20);
/// Lines about authenticated peers that are unproven, those of the Attestation phase. An honest one causes some six.
pub(crate) static UNPROVEN: Throttle = Throttle::new("peers of the Attestation phase", 60);
/// Lines about connections of the session that were lost or replaced: the network can cause any number.
pub(crate) static SESSIONS: Throttle = Throttle::new("connections of the session", 20);
/// Lines about cloud volumes that are asked for: the worker node can cause any number.
pub(crate) static VOLUMES: Throttle = Throttle::new("cloud volumes", 60);
/// Lines of the libraries that serve streams and connections: peers cause most of them.
pub(crate) static LIBRARIES: Throttle = Throttle::new("streams and SSH", 60);

/// Notified when a throttle leaves a line out.
static LEFT_OUT: Notify = Notify::const_new();

/// Throttles log lines of one kind, so that a stranger can't fill the log. Lines beyond the limit are logged at debug level,
/// and counted.
#[derive(Debug)]
pub(crate) struct Throttle {
    about: &'static str,
    per_minute: u32,
    minute: Mutex<Lines>,
}

#[derive(Debug)]
struct Lines {
    /// Start of the current minute; none before the first line.
    began: Option<Instant>,
    count: u32,
    left_out: u32,
    /// The most severe level of a line that was left out.
    worst: Level,
}

impl Lines {
    const fn new(began: Option<Instant>) -> Self {
        Self { began, count: 0, left_out: 0, worst: Level::Debug }
    }
}

const MINUTE: Duration = Duration::from_secs(60);

impl Throttle {
    /// Allows `per_minute` lines a minute.
    pub(crate) const fn new(about: &'static str, per_minute: u32) -> Self {
        Self { about, per_minute, minute: Mutex::new(Lines::new(None)) }
    }

    fn minute(&self) -> MutexGuard<'_, Lines> {
        self.minute.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a line; returns `level`, or debug if this minute's limit is reached. Before the first line of a minute, logs
    /// how many the last one has left out.
    pub(crate) fn level(&self, level: Level) -> Level {
        self.report();
        let mut minute = self.minute();
        minute.began.get_or_insert_with(Instant::now);
        minute.count = minute.count.saturating_add(1);
        if minute.count <= self.per_minute || level >= Level::Debug {
            return level;
        }
        minute.left_out = minute.left_out.saturating_add(1);
        minute.worst = minute.worst.min(level);
        LEFT_OUT.notify_one();
        Level::Debug
    }

    /// Ends a minute that is over, and logs how many lines it has left out. Returns whether a minute with such lines goes on.
    fn report(&self) -> bool {
        match self.end_minute() {
            Ok((left_out, worst)) if left_out > 0 => {
                log::log!(
                    worst,
                    "{left_out} more lines about {} within a minute: logged at level debug",
                    self.about
                );
                false
            }
            Ok(_) => false,
            Err(left_out) => left_out > 0,
        }
    }

    /// Ends the current minute if it is over. Returns the lines that were left out and their worst level; or an error with
    /// their number so far.
    fn end_minute(&self) -> Result<(u32, Level), u32> {
        let mut minute = self.minute();
        if minute.began.is_some_and(|began| began.elapsed() < MINUTE) {
            return Err(minute.left_out);
        }
        let Lines { left_out, worst, .. } = std::mem::replace(&mut *minute, Lines::new(None));
        Ok((left_out, worst))
    }
}

/// Logs how many lines were left out, at the end of each minute with such lines. Never returns.
pub(crate) async fn report_left_out() {
    loop {
        LEFT_OUT.notified().await;
        sleep(MINUTE).await;
        // All of them, without an early end: each may have ended its minute.
        let goes_on =
            [&UNAUTHENTICATED, &EVICTED, &UNPROVEN, &SESSIONS, &VOLUMES, &LIBRARIES].map(Throttle::report);
        if goes_on.contains(&true) {
            LEFT_OUT.notify_one();
        }
    }
}

/// Texts of one failure that are remembered, so that two texts that alternate are logged once each.
const REMEMBERED: usize = 8;

/// Logs a failure that may repeat when it starts, changes and ends, but not every time.
#[derive(Debug)]
pub(crate) struct Repeated {
    action: String,
    throttle: Option<&'static Throttle>,
    failing: Option<Failing>,
}

#[derive(Debug)]
struct Failing {
    since: Instant,
    count: u64,
    seen: Vec<String>,
}

impl Repeated {
    /// For the failures of `action`, such as "fetching the keys".
    pub(crate) fn new(action: impl Into<String>) -> Self {
        Self { action: action.into(), throttle: None, failing: None }
    }

    /// Counts its failures on a throttle: their texts come from strangers.
    pub(crate) fn throttled(self, throttle: &'static Throttle) -> Self {
        Self { throttle: Some(throttle), ..self }
    }

    /// Logs a failure, unless its text is known.
    pub(crate) fn failed(&mut self, error: &dyn Display) {
        if let Some(line) = self.note_failure(error.to_string()) {
            let level = self.throttle.map_or(Level::Warn, |throttle| throttle.level(Level::Warn));
            log::log!(level, "{line}");
        }
    }

    /// Logs the recovery, if the action failed before.
    pub(crate) fn succeeded(&mut self) {
        if let Some(line) = self.note_success() {
            log::info!(target: TO_OPERATOR, "{line}");
        }
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
            1 => format!("{}: {error}", self.action),
            count => format!("{}: failure {count}, now: {error}", self.action),
        };
        failing.seen.push(error);
        Some(line)
    }

    fn note_success(&mut self) -> Option<String> {
        let failing = self.failing.take()?;
        let duration = failing.since.elapsed().as_secs_f64();
        let failures =
            if failing.count == 1 { "1 failure".into() } else { format!("{} failures", failing.count) };
        Some(format!("{}: recovered after {failures} ({duration:.1} s)", self.action))
    }
}

#[cfg(test)]
#[path = "log_limits_tests.rs"]
mod tests;
