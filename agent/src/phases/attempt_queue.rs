//! The queue for attempts: through which attestation peer the next one is made, and when.
//!
//! First come, first served: a peer joins at the end when it connects, and goes to the end when its attempt begins. So a
//! stranger that reconnects all the time never overtakes a peer that waits. After a failure the peer pauses; the others
//! need not.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

use secure_comms_protocol::limits::{KEYS_RETRY_MAX, RETRY_MAX, RETRY_MIN, SAME_ANSWERS};
use tokio::time::Instant;

/// Errors of one peer that are remembered, and thus the number of times that its pauses may start over.
const REMEMBERED: usize = 8;

/// The peers that wait for an attempt, the next one first.
#[derive(Debug, Default)]
pub(super) struct AttemptQueue(Vec<Waiting>);

#[derive(Debug)]
struct Waiting {
    /// Id of the peer's connection.
    id: u64,
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
    /// Adds newcomers at the end, and removes peers that have left.
    pub(super) fn update(&mut self, connected: &[u64]) {
        self.0.retain(|waiting| connected.contains(&waiting.id));
        for &id in connected {
            if self.find(id).is_none() {
                self.0.push(Waiting { id, tried: false, ready: None, pace: Pace::default() });
            }
        }
    }

    /// The first peer that is `eligible` and does not pause.
    pub(super) fn next(&self, now: Instant, eligible: impl Fn(u64) -> bool) -> Next {
        let mut next = Next::None;
        for waiting in self.0.iter().filter(|waiting| eligible(waiting.id)) {
            match (waiting.ready, next) {
                (Some(ready), Next::Later(earliest)) if ready > now => {
                    next = Next::Later(earliest.min(ready))
                }
                (Some(ready), _) if ready > now => next = Next::Later(ready),
                _ => return Next::Now(waiting.id),
            }
        }
        next
    }

    /// Moves a peer to the end, because its attempt begins. Returns whether it is the first attempt through this peer.
    pub(super) fn begin(&mut self, id: u64) -> bool {
        let Some(index) = self.0.iter().position(|waiting| waiting.id == id) else { return false };
        let waiting = self.0.remove(index);
        let first = !waiting.tried;
        self.0.push(Waiting { tried: true, ..waiting });
        first
    }

    /// Starts the pause of a peer whose attempt has failed with this error. Returns the pause, if it is longer than all
    /// before.
    pub(super) fn failed(&mut self, id: u64, error: &str, now: Instant) -> Option<Duration> {
        let waiting = self.0.iter_mut().find(|waiting| waiting.id == id)?;
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
        self.0.iter().find(|waiting| waiting.id == id)
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
