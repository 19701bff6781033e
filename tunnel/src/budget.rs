//! How many bytes a task may move before other tasks run.
//!
//! tokio lets a task complete 128 operations in a row. An operation of ours moves up to [`MESSAGE_MAX`] bytes, or a
//! batch of such messages, so 128 of them keep the thread for milliseconds, while a small request of another
//! connection waits. Here bytes are charged to the same budget: a task that has moved about [`BURST`] bytes waits until
//! the others have run.
//!
//! [`MESSAGE_MAX`]: secure_comms_protocol::limits::MESSAGE_MAX

use std::future::poll_fn;
use std::task::{Context, Poll};

use tokio::task::coop::{consume_budget, has_budget_remaining, poll_proceed};

/// Operations that tokio lets a task complete in a row (`Budget::initial`, not public).
const OPERATIONS: usize = 128;
/// Most bytes that a task moves before others run, not counting the operation with which it exceeds them.
pub const BURST: usize = 32 * 1024;
/// Bytes that are charged as one operation.
const UNIT: usize = BURST / OPERATIONS;

/// Charges the running task for bytes that it has moved. Once its budget is used up, tokio's sockets and queues answer
/// `Pending` to it until the other tasks have run. Without effect outside of a task of tokio.
pub fn charge(cx: &mut Context<'_>, bytes: usize) {
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

/// Charges the running task for bytes that it has moved, and lets the other tasks run if its budget is used up.
/// Cancellation safe.
pub(crate) async fn moved(bytes: usize) {
    poll_fn(|cx| {
        charge(cx, bytes);
        Poll::Ready(())
    })
    .await;
    consume_budget().await;
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
            loop {
                counted.fetch_add(MESSAGE_MAX, Ordering::Relaxed);
                moved(MESSAGE_MAX).await;
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
            loop {
                counted.fetch_add(1, Ordering::Relaxed);
                moved(1).await;
            }
        });
        tokio::task::yield_now().await;
        assert!((1..=OPERATIONS + 1).contains(&total.load(Ordering::Relaxed)));
        endless.abort();
    }
}
