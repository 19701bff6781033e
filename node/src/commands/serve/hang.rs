//! Ends the process when the threads of its pods hang, so that what supervises it starts it again. It needs no socket and
//! no setting: a fault of those must not end pods.

use std::io;
use std::process::abort;
use std::time::Duration;

use tokio::time::{sleep, timeout};

use super::own_thread::OwnThread;
use crate::pods::Pods;

/// Time in which the pods' threads must run a task.
const PULSE: Duration = Duration::from_secs(20);
/// Misses in a row that are a hang. One alone may be a process that stood still as a whole, with its clock.
const MISSES: u32 = 3;
/// Time for the line of the log: it is written by another thread.
const LAST_LINE: Duration = Duration::from_millis(500);

/// Watches until it is dropped, on a thread of its own.
///
/// # Errors
/// There can be no more threads or file descriptors.
pub(super) fn watch(pods: &Pods) -> io::Result<OwnThread> {
    let (thread, pods) = (OwnThread::start("hang")?, pods.clone());
    let watched = async move {
        hangs(|| {
            let pods = pods.clone();
            async move { pods.adaptor().pulse().await }
        })
        .await;
        let seconds = PULSE.as_secs() * u64::from(MISSES);
        tracing::error!(
            "serve: the pods' threads have run no task for {seconds} s: aborting: report the bug"
        );
        sleep(LAST_LINE).await;
        abort();
    };
    // It ends with its thread, or with the process.
    drop(thread.runtime().spawn(watched));
    Ok(thread)
}

/// Returns when [`MISSES`] pulses in a row have not come in time.
async fn hangs<F: Future<Output = ()>>(pulse: impl Fn() -> F) {
    let mut misses = 0;
    while misses < MISSES {
        match timeout(PULSE, pulse()).await {
            Ok(()) => {
                misses = 0;
                sleep(PULSE).await;
            }
            Err(_) => misses += 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::future::pending;

    use tokio::time::Instant;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn threads_that_run_no_task_for_a_minute_hang() {
        let began = Instant::now();
        hangs(pending).await;
        assert_eq!(began.elapsed().as_secs(), 60);
    }

    #[tokio::test(start_paused = true)]
    async fn threads_that_go_on_do_not_hang() {
        let pulses = Cell::new(0);
        let hung = hangs(|| {
            pulses.set(pulses.get() + 1);
            let is_late = !u32::is_multiple_of(pulses.get(), MISSES);
            async move {
                if is_late {
                    pending().await
                }
            }
        });
        assert!(timeout(Duration::from_secs(3600), hung).await.is_err());
        assert!(pulses.get() > 100);
    }
}
