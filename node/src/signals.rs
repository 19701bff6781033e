//! The signals that end the program.

use std::fmt;
use std::future::pending;
use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// A signal that asked for the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndSignal {
    /// SIGHUP: the terminal is gone.
    Hup,
    /// SIGINT: Ctrl-C.
    Int,
    /// SIGTERM, from a service manager.
    Term,
}

impl EndSignal {
    /// The exit code of a program that a signal kept from its work: 128 and the signal's number, as shells have it.
    pub fn exit_code(self) -> u8 {
        128 + match self {
            Self::Hup => 1,
            Self::Int => 2,
            Self::Term => 15,
        }
    }
}

impl fmt::Display for EndSignal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Hup => "SIGHUP",
            Self::Int => "SIGINT",
            Self::Term => "SIGTERM",
        })
    }
}

/// Receives SIGTERM, SIGINT and SIGHUP.
pub(crate) struct Signals {
    term: Signal,
    int: Signal,
    /// `None`: it was ignored when we started, as under nohup(1), and stays ignored.
    hup: Option<Signal>,
}

impl Signals {
    pub(crate) fn new() -> io::Result<Self> {
        let hup = if hup_is_ignored() { None } else { Some(signal(SignalKind::hangup())?) };
        Ok(Self { term: signal(SignalKind::terminate())?, int: signal(SignalKind::interrupt())?, hup })
    }

    /// The next signal.
    ///
    /// # Cancellation
    /// Dropping the future loses no signal.
    pub(crate) async fn next(&mut self) -> EndSignal {
        let hup = async {
            match &mut self.hup {
                Some(hup) => hup.recv().await,
                None => pending().await,
            }
        };
        tokio::select! {
            _ = self.term.recv() => EndSignal::Term,
            _ = self.int.recv() => EndSignal::Int,
            _ = hup => EndSignal::Hup,
        }
    }
}

/// Reads the mask of ignored signals. To ask with sigaction(2) needs unsafe code.
fn hup_is_ignored() -> bool {
    const HUP: u64 = 1;
    // Without /proc the signal is handled: that is what a terminal's user expects.
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask & HUP != 0)
}
