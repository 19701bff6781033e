//! Power off and restart.

use std::convert::Infallible;
use std::fmt::Display;

use nix::errno::Errno;
use nix::sys::reboot::{RebootMode, reboot};

use crate::console;
use crate::failure::Cause;

/// Prints the cause in one line, and powers the machine off.
pub fn fatal(why: impl Display) -> ! {
    console::say(format_args!("FATAL: {why}"));
    off()
}

/// Powers the machine off. The caller has printed the cause.
pub fn off() -> ! {
    console::drain();
    end(reboot(RebootMode::RB_POWER_OFF))
}

/// Restarts the machine.
pub fn restart() -> ! {
    console::drain();
    end(reboot(RebootMode::RB_AUTOBOOT))
}

fn end(refused: Result<Infallible, Errno>) -> ! {
    let Err(error) = refused;
    console::say(format_args!("powering off: {}", error.text()));
    // The kernel panics when PID 1 ends, which stops the machine as well.
    std::process::exit(1)
}

/// Makes a panic of this program print one line and power the machine off.
pub fn off_on_panic() {
    std::panic::set_hook(Box::new(|panic| {
        fatal(format_args!("a defect: {}", panic.to_string().replace('\n', " ")))
    }));
}
