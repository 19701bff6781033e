//! A process that outlives `init` and powers the machine off when the root turns out to be tampered with.
//!
//! Blocks are verified when they are read, hours after the start too. `table` says why an I/O error alone is not
//! enough. The kernel sends its event before the reader gets its error, so that the machine stops before much can be made of that. If the
//! reader is PID 1 in its first moments, it may die of the error before the power is off: a kernel panic, which stops the machine
//! as well, or starts it again if the command line has panic=. What does not match is never handed out in any case.

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

/// The argument that makes the program a guard.
pub const ARGUMENT: &str = "guard";

/// Starts the guard. It takes all that it needs along as input, output and errors, for its old root becomes empty: the events since the
/// start of `init`, the kernel's log for the console, and the device mapper.
pub fn start(events: Uevents, verity: Verity) -> Result<(), Failure> {
    let guard = Command::new("/proc/self/exe")
        // systemd leaves processes of root alone that start with this sign (systemd.io, "Storage Daemons for the Root File System").
        .arg0("@init")
        .arg(ARGUMENT)
        .env_clear()
        .stdin(Stdio::from(events.into_socket()))
        .stdout(Stdio::from(console::open_log()?))
        .stderr(Stdio::from(verity.into_control()))
        .spawn()
        .context(|| "starting the guard of the root")?;
    let score = format!("/proc/{}/oom_score_adj", guard.id());
    fs::write(&score, "-1000").context(|| format!("writing {score}"))
}

/// The guard itself.
pub fn run() -> ! {
    let why = match watch() {
        Ok(()) => Failure::new(
            "reading the root",
            "a block does not match the root hash: the disk is damaged or tampered with",
        ),
        Err(failure) => failure,
    };
    // "<0>": an emergency, shown on the console at every log level.
    console::write(format_args!("<0>init: FATAL: {why}"));
    power::off()
}

/// Until the root is found bad.
fn watch() -> Result<(), Failure> {
    let control = io::stderr().as_fd().try_clone_to_owned().context(|| "taking over the device mapper")?;
    let verity = Verity::inherited(control);
    while verity.is_intact()? {
        wait_for_verity_error(&io::stdin()).context(|| "watching the kernel's events")?;
    }
    Ok(())
}
