//! How an end learns that its close has arrived.
//!
//! russh reports the other end's close only to an end that has not sent its own. But a connection keeps the order of what is
//! sent on it: once a ping is answered that was sent after the close, the close has arrived, and all that was before it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::sleep;

/// Closes within this time share a ping.
const SHARED: Duration = Duration::from_millis(10);

/// Counts the pings of one connection.
#[derive(Debug, Default)]
pub(super) struct Barrier {
    sent: AtomicU64,
    answered: AtomicU64,
    /// A ping is asked for within [`SHARED`].
    is_asked: AtomicBool,
    /// Makes the connection send a ping.
    probe: OnceLock<Arc<Notify>>,
}

impl Barrier {
    /// Only the first call has an effect.
    pub(super) fn probe_with(&self, probe: Arc<Notify>) {
        self.probe.get_or_init(|| probe);
    }

    /// A ping is about to be sent.
    pub(super) fn pinged(&self) {
        self.sent.fetch_add(1, Relaxed);
    }

    /// The last ping was answered. There is one at a time.
    pub(super) fn ponged(&self) {
        self.answered.store(self.sent.load(Relaxed), Relaxed);
    }

    /// The number of the first ping after now, which is asked for.
    pub(super) fn next(self: &Arc<Self>) -> u64 {
        let next = self.sent.load(Relaxed) + 1;
        self.ask();
        next
    }

    /// Asks for a ping, soon. One that is asked for while another is unanswered is not sent: ask again after the pong.
    pub(super) fn ask(self: &Arc<Self>) {
        if self.is_asked.swap(true, Relaxed) {
            return;
        }
        let barrier = self.clone();
        tokio::spawn(async move {
            sleep(SHARED).await;
            barrier.is_asked.store(false, Relaxed);
            if let Some(probe) = barrier.probe.get() {
                probe.notify_one();
            }
        });
    }

    pub(super) fn has_answered(&self, ping: u64) -> bool {
        self.answered.load(Relaxed) >= ping
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::timeout;

    #[tokio::test(start_paused = true)]
    async fn only_a_ping_after_the_close_says_that_it_has_arrived() {
        let barrier = Arc::<Barrier>::default();
        barrier.pinged();
        let close = barrier.next();
        barrier.ponged();
        assert!(!barrier.has_answered(close), "this ping was sent before the close");
        barrier.pinged();
        assert!(!barrier.has_answered(close));
        barrier.ponged();
        assert!(barrier.has_answered(close));
    }

    #[tokio::test(start_paused = true)]
    async fn closes_at_the_same_time_share_a_ping() {
        let (barrier, probe) = (Arc::<Barrier>::default(), Arc::<Notify>::default());
        barrier.probe_with(probe.clone());
        let asked = async || timeout(10 * SHARED, probe.notified()).await.is_ok();
        for _ in 0..3 {
            barrier.next();
        }
        assert!(asked().await);
        assert!(!asked().await);
        barrier.ask();
        assert!(asked().await);
    }
}
