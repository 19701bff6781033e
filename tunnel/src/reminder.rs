//! When a wait says what it is for, so that an operator who looks at a quiet log knows.

use std::time::Duration;

use secure_comms_protocol::limits::{WAIT_REPEAT, WAIT_REPORT};
use tokio::time::{Instant, sleep_until};

/// The times at which one wait says what it is for.
#[derive(Clone, Copy, Debug)]
pub struct Reminder {
    start: Instant,
    next: Instant,
    was_due: bool,
}

impl Reminder {
    /// For a wait that starts now.
    pub fn start() -> Self {
        let start = Instant::now();
        Self { start, next: start + WAIT_REPORT, was_due: false }
    }

    /// Waits until something is to be said. Cancellation safe.
    pub async fn due(&mut self) {
        sleep_until(self.next).await;
        self.next = Instant::now() + WAIT_REPEAT;
        self.was_due = true;
    }

    /// Whether something was said, so that the end of the wait is news as well.
    pub fn was_due(&self) -> bool {
        self.was_due
    }

    /// How long the wait has taken so far.
    pub fn waited(&self) -> Duration {
        self.start.elapsed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_wait_is_reported_after_a_second_and_every_15_s() {
        let mut reminder = Reminder::start();
        assert!(!reminder.was_due());
        for seconds in [1, 16, 31] {
            reminder.due().await;
            assert_eq!(reminder.waited().as_secs(), seconds);
        }
        assert!(reminder.was_due());
    }
}
