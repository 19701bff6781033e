//! Waits that say what they wait for.

use std::fmt::Display;
use std::pin::pin;
use std::time::Duration;

use secure_comms_protocol::limits::WAIT_REPEAT;
use tokio::time::{Instant, sleep};

/// Waits for `future`. Every [`WAIT_REPEAT`] logs `what` is waited for, and how much is left of `limit`, which the caller enforces. The
/// caller has logged that the wait began.
///
/// Cancellation: as `future`.
pub(crate) async fn with_progress<F: Future>(what: impl Display, limit: Duration, future: F) -> F::Output {
    let began = Instant::now();
    let mut future = pin!(future);
    loop {
        tokio::select! {
            biased;
            output = &mut future => return output,
            () = sleep(WAIT_REPEAT) => {
                let left = limit.saturating_sub(began.elapsed()).as_secs();
                log::info!("{what}: still waiting, at most {left} s more");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn progress_changes_neither_result_nor_time() {
        let began = Instant::now();
        let limit = Duration::from_secs(75);
        let result = with_progress("a test", limit, async {
            sleep(Duration::from_secs(40)).await;
            7
        });
        assert_eq!((result.await, began.elapsed().as_secs()), (7, 40));
        let late = tokio::time::timeout(limit, with_progress("a test", limit, std::future::pending::<()>()));
        assert!(late.await.is_err());
    }
}
