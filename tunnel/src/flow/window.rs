//! What the peer may have on its way to us on one stream, and how that follows the stream's use.

use std::time::Duration;

use secure_comms_protocol::limits::{CreditLimits, WINDOW_UNUSED};
use tokio::time::Instant;

/// The window of a stream.
#[derive(Debug)]
pub(super) struct Window {
    size: u32,
    /// Consumed, and not yet given back.
    pending: u32,
    /// Since when, and how much of the window has been used since.
    since: Instant,
    used: u32,
}

impl Window {
    pub(super) fn new(size: u32) -> Self {
        Self { size, pending: 0, since: Instant::now(), used: 0 }
    }

    /// What it has grown by.
    pub(super) fn grown(&self, limits: &CreditLimits) -> u32 {
        self.size - limits.initial
    }

    /// So much has been consumed; whether it is time to give some back.
    pub(super) fn consumed(&mut self, cost: u32) -> bool {
        self.pending += cost;
        self.pending >= self.size / 2
    }

    /// What is given back now: what has been consumed, and what the window grows by; less if it shrinks.
    ///
    /// A window that is used up within one and a half of the shortest round trip is what holds its stream up: one that is
    /// large enough is not used up before its first part is granted anew. (With twice the round trip it would grow for
    /// ever, with the round trip itself never.) On a short line that would keep windows so small that a sender that loses
    /// its processor for a moment leaves the line idle, so up to `stream_usual` use is enough.
    pub(super) fn batch(&mut self, limits: &CreditLimits, pool: u32, round_trip: Option<Duration>) -> u32 {
        self.used += self.pending;
        let elapsed = self.since.elapsed();
        let used_up = self.used >= self.size;
        let soon = round_trip.is_some_and(|round_trip| elapsed * 2 <= round_trip * 3);
        let mut grant = self.pending;
        if self.size < limits.stream_usual {
            grant += self.grow(limits.stream_usual, pool);
        } else if used_up && soon {
            grant += self.grow(limits.stream_max, pool);
        } else if used_up && elapsed > WINDOW_UNUSED {
            // The peer sees it only as credit that does not come back.
            let back = (self.size.saturating_sub(limits.stream_usual) / 2).min(self.pending);
            self.size -= back;
            grant -= back;
        }
        if used_up {
            self.since = Instant::now();
            self.used = 0;
        }
        self.pending = 0;
        grant
    }

    /// Doubles, up to `most`, out of the pool; by how much.
    fn grow(&mut self, most: u32, pool: u32) -> u32 {
        let growth = self.size.min(most.saturating_sub(self.size)).min(pool);
        self.size += growth;
        growth
    }
}
