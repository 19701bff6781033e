//! The pauses between retries.

use std::time::Duration;

/// A pause that doubles with each failure in a row.
#[derive(Clone, Copy, Debug)]
pub(super) struct Backoff {
    first: Duration,
    last: Duration,
    failures: u32,
}

impl Backoff {
    const fn new(first: Duration, last: Duration) -> Self {
        Self { first, last, failures: 0 }
    }

    /// Counts a failure. The pause before the next try.
    pub(super) fn failed(&mut self) -> Duration {
        let factor = 2_u32.saturating_pow(self.failures);
        self.failures = self.failures.saturating_add(1);
        self.first.saturating_mul(factor).min(self.last)
    }

    /// Begins with the first pause again.
    pub(super) fn reset(&mut self) {
        self.failures = 0;
    }
}

/// One backoff for each thing that is retried.
#[derive(Clone, Copy, Debug)]
pub(super) struct Backoffs {
    pub(super) prepare: Backoff,
    pub(super) start: Backoff,
    pub(super) release: Backoff,
}

impl Default for Backoffs {
    fn default() -> Self {
        Self {
            prepare: Backoff::new(Duration::from_secs(1), Duration::from_secs(30)),
            start: Backoff::new(Duration::from_secs(1), Duration::from_secs(15)),
            // The runtime waits in a handshake that has its own timeout: each second counts.
            release: Backoff::new(Duration::from_millis(50), Duration::from_secs(1)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_their_limit_and_begin_again() {
        let mut release = Backoffs::default().release;
        let pauses: Vec<u128> = (0..7).map(|_| release.failed().as_millis()).collect();
        assert_eq!(pauses, [50, 100, 200, 400, 800, 1000, 1000]);
        release.reset();
        assert_eq!(release.failed().as_millis(), 50);
        let mut endless = Backoff { failures: u32::MAX, ..release };
        assert_eq!(endless.failed(), Duration::from_secs(1));
    }
}
