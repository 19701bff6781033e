//! A process that outlives `init` and powers the machine off when the root turns out to be tampered with.
//!
//! Blocks are verified at every read, also hours after the boot. `table` explains why an I/O error alone is not enough.
//! The kernel sends its event before the reader gets its error, so the machine stops before the error can be exploited.
//! PID 1 may meet a bad block early and end before the power is off. Then the kernel panics, which stops the machine as
//! well, or restarts it if the command line has panic=. Bytes that do not match are never delivered in any case.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use crate::console;
use crate::dm::Verity;
use crate::failure::{Context, Failure};
use crate::power;
use crate::uevents::{Uevents, wait_for_verity_error};

/// Argument with which this program runs as the block watcher.
pub const ARGUMENT: &str = "guard";

/// Starts the block watcher. Its root becomes empty, so it receives all it needs as standard input (the events since
/// the start of `init`), output (the kernel's log) and error (the device mapper).
///
/// # Errors
/// The process can't be started or protected from the OOM killer.
pub fn start(events: Uevents, verity: Verity) -> Result<(), Failure> {
    let watcher = Command::new("/proc/self/exe")
        // systemd does not kill root's processes whose name starts with "@" (systemd.io, "Storage Daemons for the Root
        // File System").
        .arg0("@init")
        .arg(ARGUMENT)
        .env_clear()
        .stdin(Stdio::from(events.into_socket()))
        .stdout(Stdio::from(console::open_log()?))
        .stderr(Stdio::from(verity.into_control()))
        .spawn()
        .context(|| "starting the block watcher of the root")?;
    let score = format!("/proc/{}/oom_score_adj", watcher.id());
    fs::write(&score, "-1000").context(|| format!("writing {score}"))
}

/// Runs the block watcher; powers the machine off at the first bad block.
pub fn run() -> ! {
    let why = match watch() {
        Ok(()) => Failure::new(
            "reading the root",
            "a block does not match the root hash: the disk is damaged or tampered with",
        ),
        Err(failure) => failure,
    };
    // "<0>" is the level of an emergency, shown on the console at every log level.
    console::write(format_args!("<0>init: FATAL: {why}"));
    power::off()
}

/// Waits until a block does not match the root hash.
fn watch() -> Result<(), Failure> {
    let control = io::stderr().as_fd().try_clone_to_owned().context(|| "taking over the device mapper")?;
    let verity = Verity::inherited(control);
    while verity.is_intact()? {
        wait_for_verity_error(&io::stdin()).context(|| "watching the kernel's events")?;
    }
    Ok(())
}
