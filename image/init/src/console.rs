//! Lines on the console, all of which start with "init: ".

use std::fmt::Display;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};

use nix::sys::termios::tcdrain;
use nix::time::{ClockId, clock_gettime};
use nix::unistd::{dup2_stderr, dup2_stdin, dup2_stdout};

use crate::failure::{Context, Failure};

/// Opens /dev/console for input, output and errors. The kernel does so before PID 1 starts, but only if the initramfs
/// has the node; so this is called when devtmpfs is mounted. If the console of the command line does not exist (a
/// cloud without a serial port), the lines go to the kernel's log.
///
/// # Errors
/// Neither can be opened.
pub fn open() -> Result<(), Failure> {
    let terminal = OpenOptions::new().read(true).write(true).open("/dev/console");
    let (what, file) = match terminal {
        Ok(file) => ("/dev/console", file),
        Err(_) => ("/dev/kmsg", open_log()?),
    };
    dup2_stdin(&file)
        .and_then(|()| dup2_stdout(&file))
        .and_then(|()| dup2_stderr(&file))
        .context(|| format!("using {what} for the console"))
}

/// Opens the kernel's log for writing; the kernel copies it to its console.
pub(crate) fn open_log() -> Result<File, Failure> {
    OpenOptions::new().write(true).open("/dev/kmsg").context(|| "opening /dev/kmsg")
}

/// Prints a line with the prefix "init: ".
pub fn say(line: impl Display) {
    write(format_args!("init: {line}"));
}

/// Prints a line without a prefix, in one write. A failure is ignored, because there is no other output.
pub(crate) fn write(line: impl Display) {
    let mut out = io::stdout().lock();
    drop(out.write_all(format!("{line}\n").as_bytes()).and_then(|()| out.flush()));
}

/// Waits until the console has sent all lines.
pub(crate) fn drain() {
    // Fails if the console is not a terminal; then no wait is needed.
    let _no_terminal = tcdrain(io::stdout());
}

/// Seconds since the kernel started, for messages.
pub fn uptime() -> String {
    match clock_gettime(ClockId::CLOCK_BOOTTIME) {
        Ok(time) => format!("{}.{:02} s", time.tv_sec(), time.tv_nsec() / 10_000_000),
        Err(error) => format!("an unknown time ({error})"),
    }
}
