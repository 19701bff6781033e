//! How many bytes a task may move before other tasks run.
//!
//! tokio lets a task complete 128 operations in a row. An operation of ours moves up to [`MESSAGE_MAX`] bytes, or a
//! batch of such messages, so 128 of them keep the thread for milliseconds, while a small request of another
//! connection waits. So a task that has moved about [`BURST`] bytes waits for its [turn](crate::turns). On a runtime that is no
//! [`SingleThread`], bytes are charged to tokio's budget instead: such a task waits until the others have run.
//!
//! [`MESSAGE_MAX`]: secure_comms_protocol::limits::MESSAGE_MAX
//! [`SingleThread`]: crate::turns::SingleThread

use std::future::poll_fn;
use std::task::{Context, Poll, ready};

use tokio::task::coop::{consume_budget, has_budget_remaining, poll_proceed};

use crate::turns::{self, Turn};

/// Operations that tokio lets a task complete in a row (`Budget::initial`, not public).
const OPERATIONS: usize = 128;
/// Most bytes that a task moves before others run, not counting the operation with which it exceeds them.
pub const BURST: usize = 64 * 1024;
/// Bytes that are charged as one operation. Half a burst in all: a small request waits for every busy task there, not for one.
const UNIT: usize = BURST / 2 / OPERATIONS;

/// Charges the running task for bytes that it has moved. Once its budget is used up, tokio's sockets and queues answer
/// `Pending` to it until the other tasks have run. Without effect outside of a task of tokio.
fn charge(cx: &mut Context<'_>, bytes: usize) {
    for _ in 0..bytes / UNIT {
        // Asking first: a charge without budget would schedule the task again, although it may have nothing to do.
        if !has_budget_remaining() {
            return;
        }
        if let Poll::Ready(operation) = poll_proceed(cx) {
            operation.made_progress();
        }
    }
}

/// What a task has moved since the others ran. A task of a [`SingleThread`] that has moved [`BURST`] bytes waits until no other
/// has anything to do. On other runtimes its bytes are charged to tokio's budget.
///
/// [`SingleThread`]: crate::turns::SingleThread
#[derive(Debug, Default)]
pub struct Burst {
    bytes: usize,
    /// When it began.
    round: u64,
    turn: Turn,
}

impl Burst {
    /// Counts bytes that the running task has moved.
    pub fn count(&mut self, cx: &mut Context<'_>, bytes: usize) {
        let Some(round) = turns::operation() else { return charge(cx, bytes) };
        if self.round != round {
            (self.bytes, self.round) = (0, round);
        }
        self.bytes += bytes;
    }

    /// Waits until the task may move bytes. Cancellation safe.
    pub fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let has_moved_a_burst = self.bytes >= BURST && turns::round() == Some(self.round);
        if has_moved_a_burst || self.turn.is_waiting() {
            ready!(self.turn.poll(cx));
            self.bytes = 0;
        }
        Poll::Ready(())
    }

    /// Counts bytes that the running task has moved, and waits until it may move more. Cancellation safe.
    pub(crate) async fn moved(&mut self, bytes: usize) {
        poll_fn(|cx| {
            self.count(cx, bytes);
            Poll::Ready(())
        })
        .await;
        poll_fn(|cx| self.poll_ready(cx)).await;
        consume_budget().await;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use secure_comms_protocol::limits::MESSAGE_MAX;

    use super::*;

    #[tokio::test]
    async fn a_task_that_always_has_bytes_lets_others_run() {
        let total = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&total);
        let endless = tokio::spawn(async move {
            let mut burst = Burst::default();
            loop {
                counted.fetch_add(MESSAGE_MAX, Ordering::Relaxed);
                burst.moved(MESSAGE_MAX).await;
            }
        });
        for round in 1..=3 {
            tokio::task::yield_now().await;
            let bytes = total.load(Ordering::Relaxed);
            assert!((1..=round * (BURST + MESSAGE_MAX)).contains(&bytes), "{bytes} bytes in round {round}");
        }
        endless.abort();
    }

    #[tokio::test]
    async fn small_messages_are_charged_as_operations() {
        let total = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&total);
        let endless = tokio::spawn(async move {
            let mut burst = Burst::default();
            loop {
                counted.fetch_add(1, Ordering::Relaxed);
                burst.moved(1).await;
            }
        });
        tokio::task::yield_now().await;
        assert!((1..=OPERATIONS + 1).contains(&total.load(Ordering::Relaxed)));
        endless.abort();
    }
}
