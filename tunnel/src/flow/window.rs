//! What the peer may have on its way to us on one stream, and how that follows the stream's use.

use std::time::Duration;

use secure_comms_protocol::limits::{CreditLimits, WINDOW_UNUSED};
use tokio::time::Instant;

/// A round trip from here on is a long one: more than what waits in a machine, less than what lies between two cities.
const LONG: Duration = Duration::from_millis(2);

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
    /// large enough is not used up before its first part is granted anew. (With the round trip itself it would never grow.)
    /// On a long line it may take three: a packet that is lost takes a round trip or two more, with all that is behind it,
    /// and what waits there is little beside the way. On a short one that would let small messages wait behind large ones.
    /// There windows would be so small, though, that a sender that loses its processor for a moment leaves the line idle:
    /// up to `stream_soft_max` use is enough.
    pub(super) fn batch(&mut self, limits: &CreditLimits, pool: u32, round_trip: Option<Duration>) -> u32 {
        self.used += self.pending;
        let elapsed = self.since.elapsed();
        let used_up = self.used >= self.size;
        let soon = round_trip.is_some_and(|round_trip| {
            let halves = if round_trip < LONG { 3 } else { 6 };
            elapsed * 2 <= round_trip * halves
        });
        let mut grant = self.pending;
        if self.size < limits.stream_soft_max {
            grant += self.grow(limits.stream_soft_max, pool);
        } else if used_up && soon {
            grant += self.grow(limits.stream_max, pool);
        } else if used_up && elapsed > WINDOW_UNUSED {
            // The peer sees it only as credit that does not come back.
            let back = (self.size.saturating_sub(limits.stream_soft_max) / 2).min(self.pending);
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

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    const LIMITS: CreditLimits = CreditLimits {
        initial: 32 << 10,
        stream_soft_max: 64 << 10,
        stream_max: 1 << 20,
        growth_pool: 2 << 20,
        streams: 4,
    };
    const ROUND_TRIP: Duration = Duration::from_millis(80);

    /// A sender that always has more: what it was granted arrives a round trip later, at the earliest.
    async fn use_up(window: &mut Window, pool: u32, took: Duration) -> u32 {
        let mut granted = 0;
        for _ in 0..2 {
            advance(took / 2).await;
            assert!(window.consumed(window.size.div_ceil(2)));
            granted += window.batch(&LIMITS, pool, Some(ROUND_TRIP));
        }
        granted
    }

    #[tokio::test(start_paused = true)]
    async fn a_window_that_holds_its_stream_up_grows_to_the_most_and_one_that_does_not_stays() {
        let mut window = Window::new(LIMITS.initial);
        // Whatever the line: up to the usual, and no further, for nothing is used up within a round trip.
        for _ in 0..10 {
            use_up(&mut window, LIMITS.growth_pool, ROUND_TRIP * 4).await;
        }
        assert_eq!(window.size, LIMITS.stream_soft_max);
        for _ in 0..10 {
            use_up(&mut window, LIMITS.growth_pool, ROUND_TRIP * 2).await;
        }
        assert_eq!(window.size, LIMITS.stream_max);
        // On a short line it must be sooner.
        let short = Duration::from_millis(1);
        let mut window = Window::new(LIMITS.stream_soft_max);
        for _ in 0..4 {
            advance(short).await;
            assert!(window.consumed(window.size));
            window.batch(&LIMITS, LIMITS.growth_pool, Some(short / 2));
        }
        assert_eq!(window.size, LIMITS.stream_soft_max);
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_known_round_trip_a_window_keeps_the_usual_size() {
        let mut window = Window::new(LIMITS.initial);
        for _ in 0..10 {
            assert!(window.consumed(window.size));
            window.batch(&LIMITS, LIMITS.growth_pool, None);
        }
        assert_eq!(window.size, LIMITS.stream_soft_max);
    }

    #[tokio::test(start_paused = true)]
    async fn a_window_that_is_hardly_used_gives_back_what_is_beyond_the_usual() {
        let mut window = Window::new(LIMITS.initial);
        for _ in 0..12 {
            use_up(&mut window, LIMITS.growth_pool, ROUND_TRIP).await;
        }
        let (size, mut granted) = (window.size, 0);
        for _ in 0..20 {
            granted += use_up(&mut window, LIMITS.growth_pool, WINDOW_UNUSED * 2).await;
        }
        assert!(window.size < LIMITS.stream_soft_max + 8, "{}", window.size);
        assert!(granted > 0 && size > window.size);
    }

    #[tokio::test(start_paused = true)]
    async fn growth_ends_with_the_pool() {
        let mut window = Window::new(LIMITS.initial);
        let granted = use_up(&mut window, 1000, ROUND_TRIP).await;
        // Each batch asks anew: the connection keeps count of its pool.
        assert_eq!(window.grown(&LIMITS), 2000);
        // Two halves, the second of a window that was larger by what the first brought.
        assert_eq!(granted, LIMITS.initial + 500 + 2000);
    }
}
