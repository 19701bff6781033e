//! The deletion of a pod that has ended is retried until it is done.

use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Instant, sleep_until};

use super::error::AdaptorError;

/// The pause after the first failed deletion; it doubles up to [`PAUSE_MAX`].
const PAUSE_MIN: Duration = Duration::from_secs(5);
const PAUSE_MAX: Duration = Duration::from_secs(300);
/// The shortest time between two attempts for one pod, also if the KBS has just deleted something else.
const ATTEMPT_MIN: Duration = Duration::from_secs(1);
/// Deletions of all pods that are retried at a time, so that a KBS that comes back is not flooded.
const AT_A_TIME: usize = 8;

/// How a stop ended.
#[derive(Debug)]
pub enum Stopped {
    /// The pod's keys are deleted, from the KBS and from the store.
    Done,
    /// The pod is not served any more, and marked in the store as one that is being ended. Its keys could not be deleted,
    /// as the error says. That is retried until it is done, over restarts of the process.
    Retried(AdaptorError),
}

/// What the retries of all pods share.
#[derive(Debug)]
pub(super) struct Retries {
    /// Counts the deletions that succeeded: the KBS answers again.
    succeeded: watch::Sender<u64>,
    permits: Arc<Semaphore>,
}

impl Default for Retries {
    fn default() -> Self {
        Self { succeeded: watch::Sender::new(0), permits: Arc::new(Semaphore::new(AT_A_TIME)) }
    }
}

impl Retries {
    pub(super) fn succeeded(&self) {
        self.succeeded.send_modify(|count| *count = count.wrapping_add(1));
    }
}

/// A deletion that is not done.
#[derive(Debug)]
pub(super) struct Undone {
    /// Error of the last attempt of this process.
    pub(super) last_error: Option<String>,
    earliest: Instant,
    at: Instant,
    pause: Duration,
    succeeded: watch::Receiver<u64>,
    permits: Arc<Semaphore>,
}

impl Undone {
    /// A deletion that an earlier process did not complete: it is due at once.
    pub(super) fn of_before(retries: &Retries) -> Self {
        let now = Instant::now();
        Self {
            last_error: None,
            earliest: now,
            at: now,
            pause: PAUSE_MIN,
            succeeded: retries.succeeded.subscribe(),
            permits: Arc::clone(&retries.permits),
        }
    }

    /// An attempt failed. Returns whether its error is another one than before.
    pub(super) fn failed(&mut self, error: String) -> bool {
        let now = Instant::now();
        (self.earliest, self.at) = (now + ATTEMPT_MIN, now + self.pause);
        self.pause = (self.pause * 2).min(PAUSE_MAX);
        self.succeeded.mark_unchanged();
        let differs = self.last_error.as_ref() != Some(&error);
        self.last_error = Some(error);
        differs
    }

    /// Returns when the next attempt may begin: after the pause, or soon after a deletion of any pod that succeeded.
    ///
    /// Cancellation: nothing is lost.
    pub(super) async fn due(&mut self) -> OwnedSemaphorePermit {
        sleep_until(self.earliest).await;
        tokio::select! {
            () = sleep_until(self.at) => {}
            // An error would mean that the adaptor is gone.
            _ = self.succeeded.changed() => self.at = self.earliest,
        }
        match Arc::clone(&self.permits).acquire_owned().await {
            Ok(permit) => permit,
            // The semaphore is closed, which it never is.
            Err(_) => pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_pause_doubles_up_to_five_minutes() {
        let retries = Retries::default();
        let mut undone = Undone::of_before(&retries);
        let mut pauses = Vec::new();
        for _ in 0..8 {
            undone.failed("x".to_owned());
            let begin = Instant::now();
            drop(undone.due().await);
            pauses.push(begin.elapsed().as_secs());
        }
        assert_eq!(pauses, [5, 10, 20, 40, 80, 160, 300, 300]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_success_with_the_kbs_ends_the_pause() {
        let retries = Retries::default();
        let mut undone = Undone::of_before(&retries);
        for _ in 0..8 {
            undone.failed("x".to_owned());
        }
        let begin = Instant::now();
        let ((), _permit) = tokio::join!(async { retries.succeeded() }, undone.due());
        assert!(begin.elapsed() <= ATTEMPT_MIN, "{:?}", begin.elapsed());
    }

    #[test]
    fn an_error_is_new_once() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let _entered = runtime.enter();
        let mut undone = Undone::of_before(&Retries::default());
        assert!(undone.failed("x".to_owned()) && !undone.failed("x".to_owned()));
        assert!(undone.failed("y".to_owned()));
    }
}
