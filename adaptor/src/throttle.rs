//! Limits how often log lines and events may repeat that an unproven peer can cause at will.

use std::time::Duration;

use tokio::time::Instant;

/// The length of a window.
const WINDOW: Duration = Duration::from_secs(60);

/// Allows a number of events in each minute, and counts the others.
#[derive(Debug)]
pub(crate) struct Throttle {
    per_minute: u32,
    /// When the current minute began.
    began: Option<Instant>,
    allowed: u32,
    suppressed: u64,
}

impl Throttle {
    pub(crate) const fn new(per_minute: u32) -> Self {
        Self { per_minute, began: None, allowed: 0, suppressed: 0 }
    }

    /// Whether an event may be emitted now, and if so how many were not since the last one.
    pub(crate) fn allow(&mut self) -> Option<u64> {
        let now = Instant::now();
        if self.began.is_none_or(|began| now.duration_since(began) >= WINDOW) {
            (self.began, self.allowed) = (Some(now), 0);
        }
        if self.allowed >= self.per_minute {
            self.suppressed += 1;
            return None;
        }
        self.allowed += 1;
        Some(std::mem::take(&mut self.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_minute_has_its_number_of_events_and_the_next_one_counts_the_rest() {
        let mut throttle = Throttle::new(3);
        let allowed: Vec<_> = (0..10).filter_map(|_| throttle.allow()).collect();
        assert_eq!(allowed, [0, 0, 0]);
        tokio::time::sleep(WINDOW).await;
        assert_eq!((throttle.allow(), throttle.allow()), (Some(7), Some(0)));
    }
}
