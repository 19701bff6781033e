//! What the demo programs `demo-vm` and `demo-node` share: they run one process in a terminal until Ctrl-C.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};
use tokio::signal::unix::{SignalKind, signal};

use crate::harness::process::{Child, Signal};
use crate::harness::scene::PATIENCE;

/// Exit code of a demo program; prints the error, if any.
pub fn finish(name: &str, result: Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{name}: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Longer than any demo runs without output.
const QUIET: Duration = Duration::from_secs(30 * 24 * 3600);

/// Prints the output of `process` until Ctrl-C or SIGTERM, then stops the process.
///
/// # Errors
/// If the process ends before, or not in good order.
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
    // Ctrl-C in the terminal reaches the process too: it may have ended.
    drop(process.signal(Signal::SIGTERM));
    let status = process.wait_exit(PATIENCE).await?;
    if !status.success() {
        bail!("the {} ended with {status}", process.name());
    }
    Ok(())
}
