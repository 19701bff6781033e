//! The point in time at which an operation fails.

use std::time::Duration;

use tokio::time::Instant;

/// Stands for "never" where a duration is too long to be added to the clock.
const FAR: Duration = Duration::from_secs(30 * 365 * 24 * 3600);

/// A point in time, and the time that there was for the whole. Several operations that share one deadline, as `prepare`
/// and `start` of a new pod, together take no longer than it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadline {
    at: Instant,
    total: Duration,
}

impl Deadline {
    /// The deadline that passes `total` from now. Needs no tokio runtime.
    pub fn after(total: Duration) -> Self {
        let now = Instant::now();
        Self { at: now.checked_add(total).unwrap_or(now + FAR), total }
    }

    /// The time that is left; zero once the deadline has passed.
    pub fn left(&self) -> Duration {
        self.at.saturating_duration_since(Instant::now())
    }

    /// The time that there was for the whole.
    pub(crate) fn total(&self) -> Duration {
        self.total
    }

    /// The time that there was for the whole, in seconds.
    pub(crate) fn total_seconds(&self) -> u64 {
        self.total.as_secs()
    }

    pub(crate) fn at(&self) -> Instant {
        self.at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_left_never_overflows() {
        assert_eq!(Deadline::after(Duration::ZERO).left(), Duration::ZERO);
        assert!(Deadline::after(Duration::MAX).left() > FAR / 2);
        let deadline = Deadline::after(Duration::from_secs(9));
        assert!(deadline.left() <= Duration::from_secs(9));
        assert_eq!(deadline.total_seconds(), 9);
    }
}
