//! Backoff: the growing pause between retries.

use std::time::Duration;

use secure_comms_protocol::limits::{RETRY_MAX, RETRY_MIN};

/// Pauses that double from [`RETRY_MIN`] to [`RETRY_MAX`]. Jitter spreads the retries of many clients whose server
/// restarts.
#[derive(Clone, Debug)]
pub struct Backoff {
    next: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { next: RETRY_MIN }
    }
}

impl Backoff {
    /// Next pause: between half of the current step and the whole step.
    pub fn next_pause(&mut self) -> Duration {
        let step = self.next;
        self.next = (step * 2).min(RETRY_MAX);
        step.mul_f64(rand::random_range(0.5..=1.0))
    }

    /// Sleeps for the next pause. Cancellation safe; a cancelled pause counts as one.
    pub async fn pause(&mut self) {
        tokio::time::sleep(self.next_pause()).await;
    }

    /// Restarts with the shortest pause, after a success.
    pub fn reset(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_the_limit_and_restart() {
        let mut backoff = Backoff::default();
        let pauses: Vec<_> = (0..20).map(|_| backoff.next_pause()).collect();
        assert!(pauses[0] >= RETRY_MIN / 2 && pauses[0] <= RETRY_MIN, "{:?}", pauses[0]);
        assert!(pauses.iter().all(|pause| *pause <= RETRY_MAX));
        assert!(pauses[19] >= RETRY_MAX / 2);
        backoff.reset();
        assert!(backoff.next_pause() <= RETRY_MIN);
    }
}
