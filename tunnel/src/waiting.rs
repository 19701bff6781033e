//! A wait says what it is for, so that an operator who looks at a quiet log knows.

use std::fmt;

use secure_comms_protocol::limits::WAIT_REPORT;
use tokio::time::{Instant, timeout};

/// Runs `future`. If it takes longer than [`WAIT_REPORT`], logs `what` once with the `detail` of that moment, and again when it
/// is done without an error. Cancellation safe as far as `future` is.
pub(crate) async fn reported<T, E>(
    future: impl Future<Output = Result<T, E>>,
    what: impl fmt::Display,
    detail: impl FnOnce() -> String,
) -> Result<T, E> {
    tokio::pin!(future);
    let start = Instant::now();
    if let Ok(done) = timeout(WAIT_REPORT, &mut future).await {
        return done;
    }
    log::info!("{what}: {}", detail());
    let done = future.await;
    if done.is_ok() {
        log::info!("{what}: done after {} s", start.elapsed().as_secs());
    }
    done
}
