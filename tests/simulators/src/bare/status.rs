//! Prints the agent's messages to systemd (sd_notify) on the console, since systemd does not run.

use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use podvm_init::console::uptime;

use super::say;

const SOCKET: &str = "/run/notify";
/// Longer than any message of the agent, in bytes.
const LIMIT: usize = 4096;

/// Prints messages as long as the machine runs; returns the socket's path, for `NOTIFY_SOCKET`.
pub(super) fn listen() -> Result<PathBuf> {
    let socket = UnixDatagram::bind(SOCKET).with_context(|| format!("binding {SOCKET}"))?;
    std::thread::Builder::new().name("notify".into()).spawn(move || {
        let mut state = [0; LIMIT];
        loop {
            match socket.recv(&mut state) {
                Ok(length) => show(&String::from_utf8_lossy(state.get(..length).unwrap_or_default())),
                Err(error) => return say(format_args!("reading {SOCKET}: {error}")),
            }
        }
    })?;
    Ok(Path::new(SOCKET).to_owned())
}

fn show(state: &str) {
    for assignment in state.lines() {
        match assignment.split_once('=') {
            Some(("READY", "1")) => say(format_args!("agent READY, {} since the kernel started", uptime())),
            Some(("STATUS", status)) => say(format_args!("agent at {}: {status}", uptime())),
            // Watchdog messages are not printed.
            _ => {}
        }
    }
}
