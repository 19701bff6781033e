//! The pace of one operation's attempts: timeouts and pauses that end with its time limit.

use std::time::Duration;

use secure_comms_protocol::limits::RETRY_MIN;
use secure_comms_tunnel::Backoff;
use tokio::time::Instant;

/// Timeout of the first attempt, response included. It doubles with each attempt, up to [`REQUEST_TIMEOUT_MAX`].
const REQUEST_TIMEOUT_MIN: Duration = Duration::from_secs(5);
/// The longest timeout of an attempt, response included.
pub(super) const REQUEST_TIMEOUT_MAX: Duration = Duration::from_secs(30);
/// The longest pause that a KBS can ask for with `Retry-After`.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);
/// Time that the last long pause leaves for an attempt, if there is that much. An attempt with less may be too short for an
/// answer.
pub(super) const LAST_ATTEMPT: Duration = Duration::from_secs(1);

/// Timeouts and pauses of the attempts of one operation. No attempt and no pause outlasts the time limit.
pub(super) struct Pace {
    start: Instant,
    deadline: Instant,
    backoff: Backoff,
    timeout: Duration,
    tries: u32,
}

impl Pace {
    /// Starts now, and ends after `limit`.
    pub(super) fn new(limit: Duration) -> Self {
        let start = Instant::now();
        Self {
            start,
            deadline: start + limit,
            backoff: Backoff::default(),
            timeout: REQUEST_TIMEOUT_MIN,
            tries: 0,
        }
    }

    /// The time until its time limit.
    pub(super) fn left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }

    /// Timeout of the next attempt. Short at first: an attempt that gets no response must not delay the next one. A
    /// slow KBS gets more each time.
    pub(super) fn next_timeout(&mut self) -> Duration {
        self.tries += 1;
        let timeout = self.timeout;
        self.timeout = (timeout * 2).min(REQUEST_TIMEOUT_MAX);
        // Zero would be no time at all, also for an operation whose limit is shorter than any attempt.
        timeout.min(self.left()).max(Duration::from_millis(1))
    }

    /// The pause before the next attempt: the backoff, or longer if the KBS asks for it, but short enough for one more
    /// attempt before the deadline. `None` if there is no time for one.
    pub(super) fn next_pause(&mut self, asked: Option<Duration>) -> Option<Duration> {
        let left = self.left();
        if left <= RETRY_MIN {
            return None;
        }
        let pause = self.backoff.next_pause().max(asked.unwrap_or_default().min(RETRY_AFTER_MAX));
        Some(pause.min(left - LAST_ATTEMPT.min(left / 2)))
    }

    /// The number of attempts, and the time since the start in seconds, rounded.
    pub(super) fn spent(&self) -> (u32, u64) {
        let spent = self.start.elapsed() + Duration::from_millis(500);
        (self.tries, spent.as_secs())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs attempts that fail at once; returns the pauses and the time when the pace gave up.
    async fn pauses(limit: Duration, asked: Option<Duration>) -> (Vec<Duration>, Duration) {
        let start = Instant::now();
        let mut pace = Pace::new(limit);
        let mut pauses = Vec::new();
        loop {
            assert!(pace.next_timeout() <= limit - start.elapsed());
            let Some(pause) = pace.next_pause(asked) else { break };
            pauses.push(pause);
            tokio::time::sleep(pause).await;
            assert!(pauses.len() < 1000, "no end");
        }
        assert_eq!(pace.spent().0 as usize, pauses.len() + 1);
        (pauses, start.elapsed())
    }

    #[tokio::test(start_paused = true)]
    async fn the_last_pause_is_shortened_to_fit_the_deadline() {
        for limit in [1, 2, 4, 5, 8, 13, 60, 300].map(Duration::from_secs) {
            let (pauses, spent) = pauses(limit, None).await;
            assert!(
                spent <= limit && spent + RETRY_MIN >= limit,
                "gave up after {spent:?} of {limit:?}: {pauses:?}"
            );
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_kbs_that_asks_for_time_gets_it_within_bounds() {
        let (pauses_60, spent) = pauses(Duration::from_secs(300), Some(Duration::MAX)).await;
        assert_eq!(pauses_60[..4], [RETRY_AFTER_MAX; 4]);
        assert!(pauses_60.iter().all(|pause| *pause <= RETRY_AFTER_MAX), "{pauses_60:?}");
        assert!(spent <= Duration::from_secs(300));
        let (seven, spent) = pauses(Duration::from_secs(10), Some(Duration::from_secs(7))).await;
        assert_eq!(seven[0], Duration::from_secs(7));
        assert!(spent <= Duration::from_secs(10), "{seven:?}");
        let (short, spent) = pauses(Duration::from_secs(3), Some(Duration::from_secs(7))).await;
        assert_eq!(short[0], Duration::from_secs(2));
        assert!(spent <= Duration::from_secs(3), "{short:?}");
        let (zero, _) = pauses(Duration::from_secs(3), Some(Duration::ZERO)).await;
        assert!(zero[0] >= RETRY_MIN / 2, "{zero:?}");
    }
}
