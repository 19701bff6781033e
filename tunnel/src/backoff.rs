//! Pauses between tries that repeat.

use std::time::Duration;

use secure_comms_protocol::limits::{RETRY_MAX, RETRY_MIN};

/// Pauses that double from [`RETRY_MIN`] to [`RETRY_MAX`], each with jitter, so that many clients of one
/// server that comes back do not come back together.
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
    /// The next pause: between half of the step and the whole.
    pub fn next_pause(&mut self) -> Duration {
        let step = self.next;
        self.next = (step * 2).min(RETRY_MAX);
        step.mul_f64(rand::random_range(0.5..=1.0))
    }

    /// Waits for the next pause.
    pub async fn pause(&mut self) {
        tokio::time::sleep(self.next_pause()).await;
    }

    /// Starts over: something succeeded.
    pub fn reset(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_the_limit_and_start_over() {
        let mut backoff = Backoff::default();
        let pauses: Vec<_> = (0..20).map(|_| backoff.next_pause()).collect();
        assert!(pauses[0] >= RETRY_MIN / 2 && pauses[0] <= RETRY_MIN, "{:?}", pauses[0]);
        assert!(pauses.iter().all(|pause| *pause <= RETRY_MAX));
        assert!(pauses[19] >= RETRY_MAX / 2);
        backoff.reset();
        assert!(backoff.next_pause() <= RETRY_MIN);
    }
}
