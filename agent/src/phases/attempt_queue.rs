//! The queue for attempts: through which attestation peer the next one is made, and when.
//!
//! Sources take turns, in the order in which they are due (access/sources.rs): one that came later, had an attempt or has a
//! penalty comes behind the others. Of the connections of one source the first that came is served first, and goes to the
//! end when its attempt begins. So a stranger that reconnects all the time never overtakes a peer that waits. After a failure
//! the peer pauses; the others need not.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use secure_comms_protocol::limits::{KEYS_RETRY_MAX, RETRY_MAX, RETRY_MIN, SAME_ANSWERS};
use tokio::time::Instant;

use crate::access::sources::{Source, Sources};

/// Errors of one peer that are remembered, and thus the number of times that its pauses may start over.
const REMEMBERED: usize = 8;

/// The peers that wait for an attempt, in the order in which they came.
#[derive(Debug)]
pub(super) struct AttemptQueue {
    waiting: Vec<Waiting>,
    sources: Arc<Sources>,
}

#[derive(Debug)]
struct Waiting {
    /// Id of the peer's connection.
    id: u64,
    source: Source,
    /// When it came or had its last attempt: when it is due if its source is not remembered.
    since: Instant,
    /// Whether an attempt was made through the peer.
    tried: bool,
    /// End of the pause after its last failure; none before the first.
    ready: Option<Instant>,
    pace: Pace,
}

/// The peer of the next attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// The peer with this connection id, now.
    Now(u64),
    /// Every peer pauses, at least until then.
    Later(Instant),
    /// No peer can serve an attempt.
    None,
}

impl AttemptQueue {
    /// An empty queue, with what is known of the sources.
    pub(super) fn new(sources: Arc<Sources>) -> Self {
        Self { waiting: Vec::new(), sources }
    }

    /// Adds newcomers at the end, and removes peers that have left.
    pub(super) fn update(&mut self, connected: &[(u64, Source)], now: Instant) {
        self.waiting.retain(|waiting| connected.iter().any(|(id, _)| *id == waiting.id));
        for &(id, source) in connected {
            if self.find(id).is_none() {
                let (since, pace) = (now, Pace::default());
                self.waiting.push(Waiting { id, source, since, tried: false, ready: None, pace });
            }
        }
    }

    /// The peer that is `eligible` and does not pause, of the source that is due first.
    pub(super) fn next(&self, now: Instant, eligible: impl Fn(u64) -> bool) -> Next {
        let (pausing, ready): (Vec<_>, Vec<_>) = self
            .waiting
            .iter()
            .filter(|waiting| eligible(waiting.id))
            .partition(|waiting| waiting.pauses(now));
        // Of equals the first.
        match ready.into_iter().min_by_key(|waiting| self.sources.due(waiting.source, waiting.since)) {
            Some(first) => Next::Now(first.id),
            None => pausing.iter().filter_map(|waiting| waiting.ready).min().map_or(Next::None, Next::Later),
        }
    }

    /// Whether a peer of another source than that of `current` is `eligible` and could begin at once, without a penalty.
    pub(super) fn is_contested(&self, current: Source, now: Instant, eligible: impl Fn(u64) -> bool) -> bool {
        self.waiting.iter().any(|waiting| {
            waiting.source != current
                && !waiting.pauses(now)
                && self.sources.due(waiting.source, waiting.since) <= now
                && eligible(waiting.id)
        })
    }

    /// Moves a peer to the end, because its attempt begins; its source, too. Returns whether it is the first attempt through
    /// this peer.
    pub(super) fn begin(&mut self, id: u64, now: Instant) -> bool {
        let Some(index) = self.waiting.iter().position(|waiting| waiting.id == id) else { return false };
        let waiting = self.waiting.remove(index);
        self.sources.attempt_begins(waiting.source, now);
        let first = !waiting.tried;
        self.waiting.push(Waiting { tried: true, since: now, ..waiting });
        first
    }

    /// Starts the pause of a peer whose attempt has failed with this error. Returns the pause, if it is longer than all
    /// before.
    pub(super) fn failed(&mut self, id: u64, error: &str, now: Instant) -> Option<Duration> {
        let waiting = self.waiting.iter_mut().find(|waiting| waiting.id == id)?;
        let before = waiting.pace.step();
        waiting.pace.failed(error);
        let step = waiting.pace.step();
        // Jitter, so that the VMs of a KBS that restarts do not ask it all at the same time.
        waiting.ready = Some(now + step.mul_f64(rand::random_range(0.5..=1.0)));
        Some(step).filter(|step| *step > before)
    }

    /// Whether no attempt was made through this peer.
    pub(super) fn is_newcomer(&self, id: u64) -> bool {
        self.find(id).is_none_or(|waiting| !waiting.tried)
    }

    fn find(&self, id: u64) -> Option<&Waiting> {
        self.waiting.iter().find(|waiting| waiting.id == id)
    }
}

impl Waiting {
    fn pauses(&self, now: Instant) -> bool {
        self.ready.is_some_and(|ready| ready > now)
    }
}

/// How long a peer pauses after a failure: from [`RETRY_MIN`] up to [`RETRY_MAX`] at first. After [`SAME_ANSWERS`] errors that
/// are known already, on to [`KEYS_RETRY_MAX`]. A new error starts over.
#[derive(Debug, Default)]
struct Pace {
    known: Vec<u64>,
    repeats: u32,
}

impl Pace {
    fn failed(&mut self, error: &str) {
        let kind = kind(error);
        // A peer that brings ever new errors must not have an attempt all the time.
        if self.known.contains(&kind) || self.known.len() == REMEMBERED {
            self.repeats = self.repeats.saturating_add(1);
        } else {
            self.known.push(kind);
            self.repeats = 0;
        }
    }

    fn step(&self) -> Duration {
        let doubled = |from: Duration, times: u32| from.saturating_mul(2_u32.saturating_pow(times));
        match self.repeats.checked_sub(SAME_ANSWERS) {
            None => doubled(RETRY_MIN, self.repeats).min(RETRY_MAX),
            Some(more) => doubled(RETRY_MAX, more.saturating_add(1)).min(KEYS_RETRY_MAX),
        }
    }
}

/// What two errors with the same cause have in common: their words. Words with digits are left out, for they are mostly
/// times and ids of requests; a status is not.
fn kind(error: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    let mut previous = "";
    for word in error.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()) {
        if previous == "status" || !word.contains(|c: char| c.is_ascii_digit()) {
            word.hash(&mut hasher);
        }
        previous = word;
    }
    hasher.finish()
}

#[cfg(test)]
#[path = "attempt_queue_tests.rs"]
mod tests;
