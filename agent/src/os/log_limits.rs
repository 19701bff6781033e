//! Limits on log lines: a throttle for lines that a stranger can cause, and one line for a failure that repeats.

use std::fmt::Display;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use log::Level;

use super::operator_log::TO_OPERATOR;

/// Throttles log lines of one kind, so that a stranger can't fill the log. Later lines are logged at debug level.
#[derive(Debug)]
pub(crate) struct Throttle {
    per_minute: u32,
    /// Start of the current minute, and the lines in it.
    window: Mutex<(Option<Instant>, u32)>,
}

const MINUTE: Duration = Duration::from_secs(60);

impl Throttle {
    /// Allows `per_minute` lines a minute.
    pub(crate) fn new(per_minute: u32) -> Self {
        Self { per_minute, window: Mutex::new((None, 0)) }
    }

    /// Counts a line; returns `level`, or debug if this minute's limit is reached.
    pub(crate) fn level(&self, level: Level) -> Level {
        let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        if window.0.is_none_or(|began| began.elapsed() >= MINUTE) {
            *window = (Some(Instant::now()), 0);
        }
        window.1 = window.1.saturating_add(1);
        if window.1 > self.per_minute { Level::Debug.max(level) } else { level }
    }
}

/// Texts of one failure that are remembered, so that two texts that alternate are logged once each.
const REMEMBERED: usize = 8;

/// Logs a failure that may repeat when it starts, changes and ends, but not every time.
#[derive(Debug)]
pub(crate) struct Repeated {
    action: String,
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
        Self { action: action.into(), failing: None }
    }

    /// Logs a failure, unless its text is known.
    pub(crate) fn failed(&mut self, error: &dyn Display) {
        if let Some(line) = self.note_failure(error.to_string()) {
            log::warn!("{line}");
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
