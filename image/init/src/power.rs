//! The ends of a machine.

use std::convert::Infallible;
use std::fmt::Display;

use nix::errno::Errno;
use nix::sys::reboot::{RebootMode, reboot};

use crate::console;

/// Says why in one line, and powers the machine off.
pub fn fatal(why: impl Display) -> ! {
    console::say(format_args!("FATAL: {why}"));
    off()
}

/// Powers the machine off, for a reason that has been told.
pub fn off() -> ! {
    console::drain();
    end(reboot(RebootMode::RB_POWER_OFF))
}

/// Starts the machine again.
pub fn restart() -> ! {
    console::drain();
    end(reboot(RebootMode::RB_AUTOBOOT))
}

fn end(refused: Result<Infallible, Errno>) -> ! {
    let Err(error) = refused;
    console::say(format_args!("powering off: {error}"));
    // The kernel panics when PID 1 ends: the last way to stop.
    std::process::exit(1)
}

/// A defect of the program itself ends the machine in the same way.
pub fn off_on_panic() {
    std::panic::set_hook(Box::new(|panic| {
        fatal(format_args!("a defect: {}", panic.to_string().replace('\n', " ")))
    }));
}
