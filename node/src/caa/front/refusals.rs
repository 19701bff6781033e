//! Refused connections: counted, and logged with a limit.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use secure_comms_keys::text::one_line;

use super::refusal::Refusal;
use crate::metrics::Metrics;

/// Of each kind one line is logged in this time; the others are counted.
pub(super) const WINDOW: Duration = Duration::from_secs(10);

/// The longest detail of a log line, in bytes.
const MAX_DETAIL: usize = 200;

/// Counts and logs refusals. A clone is the same.
#[derive(Clone, Debug)]
pub(super) struct Refusals {
    metrics: Metrics,
    windows: Arc<Mutex<BTreeMap<Kind, Window>>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    NotAccepted,
    Refused(Refusal),
}

#[derive(Debug)]
struct Window {
    began: Instant,
    left_out: u64,
}

impl Refusals {
    pub(super) fn new(metrics: Metrics) -> Self {
        Self { metrics, windows: Arc::default() }
    }

    /// A connection was refused. `detail` may have come from a stranger.
    pub(super) fn refused(&self, refusal: Refusal, vm: Option<SocketAddr>, detail: &str) {
        self.metrics.dial_refused(refusal.word());
        if !self.may_log(Kind::Refused(refusal)) {
            return;
        }
        let vm = vm.map(|vm| format!(" to {vm}")).unwrap_or_default();
        let detail =
            if detail.is_empty() { String::new() } else { format!(" ({})", one_line(detail, MAX_DETAIL)) };
        tracing::warn!("caa front: a connection{vm} was refused: {refusal}{detail}");
    }

    /// A connection was not accepted because of the system.
    pub(super) fn not_accepted(&self, error: &io::Error) {
        if self.may_log(Kind::NotAccepted) {
            tracing::warn!("caa front: cannot accept connections for now: {error}");
        }
    }

    /// Logs how many lines were left out, once their time is over.
    pub(super) fn report(&self) {
        let mut windows = self.lock();
        let now = Instant::now();
        windows.retain(|kind, window| {
            if now.duration_since(window.began) < WINDOW {
                return true;
            }
            if window.left_out > 0 {
                let (count, seconds) = (window.left_out, now.duration_since(window.began).as_secs());
                match kind {
                    Kind::Refused(refusal) => tracing::warn!(
                        "caa front: {count} more connections were refused in the last {seconds} s: {refusal}"
                    ),
                    Kind::NotAccepted => {
                        tracing::warn!(
                            "caa front: cannot accept connections, {count} more times in the last {seconds} s"
                        );
                    }
                }
            }
            false
        });
    }

    fn may_log(&self, kind: Kind) -> bool {
        let mut windows = self.lock();
        match windows.get_mut(&kind) {
            Some(window) => {
                window.left_out += 1;
                false
            }
            None => {
                windows.insert(kind, Window { began: Instant::now(), left_out: 0 });
                true
            }
        }
    }

    /// Never poisoned: nothing panics under the lock.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Kind, Window>> {
        self.windows.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_of_a_kind_is_logged_at_a_time() {
        let refusals = Refusals::new(Metrics::default());
        let (scan, other) = (Kind::Refused(Refusal::ClosedEarly), Kind::Refused(Refusal::NotTls));
        assert!(refusals.may_log(scan));
        assert!(!refusals.may_log(scan) && refusals.may_log(other));
        assert_eq!(refusals.lock().get(&scan).unwrap().left_out, 1);
        refusals.report();
        assert!(!refusals.may_log(scan), "its time is not over");
        refusals.lock().get_mut(&scan).unwrap().began = Instant::now().checked_sub(WINDOW).unwrap();
        refusals.report();
        assert!(refusals.may_log(scan) && !refusals.may_log(other));
    }
}
