//! What the operator should hear of: the last warnings, errors and chosen events of this process.
//!
//! In a confidential VM nobody can read the log. The logger copies these lines here, from where proven peers get them: the
//! adaptor as control messages, a person by the status subsystem. Nothing here logs, or a line would cause the next.

use std::collections::VecDeque;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use log::{Level, Metadata};
use secure_comms_keys::text::one_line;
use secure_comms_protocol::limits::{LOG_KEPT, LOG_TEXT_MAX};
use tokio::sync::watch;

/// Target of log lines that the operator should hear of although they are no warnings, such as a recovery.
pub(crate) const TO_OPERATOR: &str = "operator";

/// A line of the log.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    /// Counts the lines of this process, from 1.
    pub(crate) number: u64,
    /// When it was logged.
    pub(crate) at: Instant,
    /// Its level.
    pub(crate) level: Level,
    /// One line, at most about [`LOG_TEXT_MAX`] bytes.
    pub(crate) text: String,
}

/// The last [`LOG_KEPT`] lines.
#[derive(Debug)]
pub(crate) struct OperatorLog {
    lines: Mutex<VecDeque<Entry>>,
    /// Number of the newest line; 0 before the first.
    newest: watch::Sender<u64>,
}

static LOG: LazyLock<OperatorLog> = LazyLock::new(OperatorLog::new);

/// The log of this process.
pub(crate) fn operator_log() -> &'static OperatorLog {
    &LOG
}

/// Whether a line is for the operator. russh's warnings are not: they tell of peers, and sending may cause them.
pub(super) fn is_for_operator(metadata: &Metadata<'_>) -> bool {
    metadata.target() == TO_OPERATOR
        || metadata.level() <= Level::Warn && !metadata.target().starts_with("russh")
}

impl OperatorLog {
    fn new() -> Self {
        Self { lines: Mutex::default(), newest: watch::Sender::new(0) }
    }

    fn lines(&self) -> MutexGuard<'_, VecDeque<Entry>> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a line, and drops the oldest one beyond [`LOG_KEPT`]. Never blocks for long.
    pub(super) fn add(&self, level: Level, text: &str) {
        let mut lines = self.lines();
        if lines.len() >= LOG_KEPT {
            lines.pop_front();
        }
        let number = *self.newest.borrow() + 1;
        let text = one_line(text, LOG_TEXT_MAX);
        lines.push_back(Entry { number, at: Instant::now(), level, text });
        // Under the lock, so that numbers are unique.
        self.newest.send_replace(number);
    }

    /// At most `max` lines that follow the line `number`, oldest first. Those in between that are not kept are left out.
    pub(crate) fn after(&self, number: u64, max: usize) -> Vec<Entry> {
        self.lines().iter().filter(|line| line.number > number).take(max).cloned().collect()
    }

    /// Follows the number of the newest line.
    pub(crate) fn subscribe(&self) -> watch::Receiver<u64> {
        self.newest.subscribe()
    }
}

/// Name of a level, as the operator reads it.
pub(crate) fn level_name(level: Level) -> &'static str {
    match level {
        Level::Error => "error",
        Level::Warn => "warning",
        Level::Info | Level::Debug | Level::Trace => "info",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_are_kept_in_order_and_short() {
        let log = OperatorLog::new();
        for index in 1..=LOG_KEPT + 7 {
            log.add(Level::Warn, &format!("line {index}\n{}", "x".repeat(10_000)));
        }
        let kept = log.after(0, usize::MAX);
        assert_eq!(kept.len(), LOG_KEPT);
        assert!(kept.iter().map(|line| line.number).eq(8..=LOG_KEPT as u64 + 7));
        assert!(kept[0].text.starts_with("line 8\\n") && kept[0].text.len() < LOG_TEXT_MAX + 60);
        let next: Vec<u64> = log.after(20, 3).iter().map(|line| line.number).collect();
        assert_eq!(next, [21, 22, 23]);
        assert!(log.after(LOG_KEPT as u64 + 7, 3).is_empty());
        assert_eq!(*log.subscribe().borrow(), LOG_KEPT as u64 + 7);
    }

    #[test]
    fn warnings_and_chosen_events_are_for_the_operator() {
        let metadata = |level, target| Metadata::builder().level(level).target(target).build();
        for (level, target, expected) in [
            (Level::Error, "agent_protocol_forwarder::run", true),
            (Level::Warn, "secure_comms_tunnel::relay", true),
            (Level::Info, "agent_protocol_forwarder::run", false),
            (Level::Info, TO_OPERATOR, true),
            (Level::Warn, "russh::server", false),
        ] {
            assert_eq!(is_for_operator(&metadata(level, target)), expected, "{level} {target}");
        }
    }
}
