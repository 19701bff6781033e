//! A wait says what it is for, so that an operator who looks at a quiet log knows.

use std::fmt;
use std::time::Duration;

use secure_comms_protocol::limits::{WAIT_REPEAT, WAIT_REPORT};
use tokio::time::{Instant, timeout_at};

/// Runs `future`, which ends within `limit`. If it takes longer than [`WAIT_REPORT`], logs `what`, the time left and the
/// `detail` of that moment, every [`WAIT_REPEAT`] again, and once more when it is done without an error. Cancellation safe as
/// far as `future` is.
pub(crate) async fn reported<T, E>(
    future: impl Future<Output = Result<T, E>>,
    what: impl fmt::Display,
    limit: Duration,
    detail: impl Fn() -> String,
) -> Result<T, E> {
    tokio::pin!(future);
    let start = Instant::now();
    let mut next = start + WAIT_REPORT;
    let mut has_reported = false;
    let done = loop {
        match timeout_at(next, &mut future).await {
            Ok(done) => break done,
            Err(_) => {
                let left = limit.saturating_sub(start.elapsed()).as_secs();
                log::info!("{what}: {left} s left{}", detail());
                has_reported = true;
                next += WAIT_REPEAT;
            }
        }
    };
    if has_reported && done.is_ok() {
        log::info!("{what}: done after {} s", start.elapsed().as_secs());
    }
    done
}
