//! The window of a stream: the bytes that the peer may have in flight to us, and how they follow the stream's use.

use std::time::Duration;

use secure_comms_protocol::limits::{CreditLimits, WINDOW_UNUSED};
use tokio::time::Instant;

/// From here on a round trip counts as long: longer than a delay inside one machine, shorter than one between cities.
const LONG: Duration = Duration::from_millis(2);

/// The window of a stream.
#[derive(Debug)]
pub(super) struct Window {
    size: u32,
    /// Credit consumed and not yet given back, in bytes.
    pending: u32,
    /// Start of the current measurement.
    since: Instant,
    /// Bytes used since then.
    used: u32,
}

impl Window {
    pub(super) fn new(size: u32) -> Self {
        Self { size, pending: 0, since: Instant::now(), used: 0 }
    }

    /// Bytes by which the window has grown.
    pub(super) fn grown(&self, limits: &CreditLimits) -> u32 {
        self.size - limits.initial
    }

    /// Counts consumed credit; returns whether a batch is full.
    pub(super) fn consumed(&mut self, cost: u32) -> bool {
        self.pending += cost;
        self.pending >= self.size / 2
    }

    /// Credit to give back now, in bytes: the consumed credit plus the growth of the window, less its shrinkage.
    ///
    /// A window limits its stream if it is used up within one and a half of the shortest round trip. A window that is
    /// large enough is not used up before its first part is granted again. (With one round trip as the limit, a window
    /// would never grow.) A long round trip allows three, because a lost packet delays everything behind it by one or
    /// two round trips, and the bytes that queue there add little delay. With a short round trip, that would let small
    /// messages wait behind large ones. Windows would then be so small that a sender that loses its processor for a
    /// moment leaves the line idle; so any use grows a window up to `stream_soft_max`.
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
            // The peer notices only that less credit comes back.
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

    /// The most by which the next batch can grow the window, in bytes.
    pub(super) fn growth_max(&self, limits: &CreditLimits) -> u32 {
        self.size.min(limits.stream_max.saturating_sub(self.size))
    }

    /// Credit to give back now, in bytes, of a window that gives back half of its growth: others need the memory.
    pub(super) fn shrink(&mut self, limits: &CreditLimits) -> u32 {
        // The peer notices only that less credit comes back. The odd byte goes, too.
        let back = self.grown(limits).div_ceil(2).min(self.pending);
        let grant = self.pending - back;
        self.size -= back;
        self.pending = 0;
        (self.since, self.used) = (Instant::now(), 0);
        grant
    }

    /// Doubles the window, up to `most` and within the pool; returns the growth in bytes.
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
        opener_streams: 4,
        reserved: 0,
    };
    const ROUND_TRIP: Duration = Duration::from_millis(80);

    /// Simulates a sender that always has bytes to send; credit reaches it one round trip later at the earliest.
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
    async fn a_window_that_limits_its_stream_grows_to_the_maximum() {
        let mut window = Window::new(LIMITS.initial);
        // Any line: up to the soft maximum and no further, because the window outlasts the round trip.
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
    async fn without_a_round_trip_a_window_keeps_the_soft_maximum() {
        let mut window = Window::new(LIMITS.initial);
        for _ in 0..10 {
            assert!(window.consumed(window.size));
            window.batch(&LIMITS, LIMITS.growth_pool, None);
        }
        assert_eq!(window.size, LIMITS.stream_soft_max);
    }

    #[tokio::test(start_paused = true)]
    async fn a_window_with_little_use_shrinks_to_the_soft_maximum() {
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
        // The connection counts the pool, so here each batch may take 1000.
        assert_eq!(window.grown(&LIMITS), 2000);
        // Two halves; the second is larger because the first batch grew the window.
        assert_eq!(granted, LIMITS.initial + 500 + 2000);
    }
}
