//! One half of a pod, by hand in a terminal: shows what its process says until Ctrl-C.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};
use tokio::signal::unix::{SignalKind, signal};

use crate::harness::process::{Child, Signal};
use crate::harness::scene::PATIENCE;

/// How a half ends: with success, or with a line that says why not.
pub fn finish(name: &str, result: Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{name}: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Longer than anybody watches a process that says nothing.
const QUIET: Duration = Duration::from_secs(30 * 24 * 3600);

/// Prints the lines of `process` as they come, until Ctrl-C or SIGTERM; then ends it.
///
/// # Errors
/// It ended by itself, or not in good order.
pub async fn watch(process: &mut Child) -> Result<()> {
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let show = async {
        for next in 0.. {
            println!("{} | {}", process.name(), process.wait_from(next, |_| true, QUIET).await?);
        }
        anyhow::Ok(())
    };
    tokio::select! {
        biased;
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
        ended = show => return ended,
    }
    // A Ctrl-C in the terminal has reached it too, and it may have ended by now.
    drop(process.signal(Signal::SIGTERM));
    let status = process.wait_exit(PATIENCE).await?;
    if !status.success() {
        bail!("the {} ended with {status}", process.name());
    }
    Ok(())
}
