//! sd_notify(3): notifies systemd of readiness, status and liveness. Does nothing without systemd. Never waits: what systemd
//! does not take at once is sent again later.

use std::env;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::sleep;

/// Interval at which notifications that systemd did not take are sent again.
const RETRY: Duration = Duration::from_millis(200);

/// Why systemd can't be notified.
#[derive(Debug, thiserror::Error)]
#[error("notifying systemd: NOTIFY_SOCKET='{socket}': {source}; start this service with Type=notify")]
pub struct NotifyError {
    socket: String,
    source: io::Error,
}

/// Sends notifications to systemd, if it started this process.
#[derive(Debug, Default)]
pub struct Notifier {
    systemd: Option<(UnixDatagram, SocketAddr)>,
    unsent: Mutex<Unsent>,
    /// Notified when systemd did not take something.
    blocked: Notify,
}

/// What systemd does not know yet.
#[derive(Debug, Default)]
struct Unsent {
    ready: bool,
    stopping: bool,
    status: Option<String>,
}

impl Unsent {
    fn message(&self) -> String {
        let ready = self.ready.then(|| "READY=1".to_owned());
        let stopping = self.stopping.then(|| "STOPPING=1".to_owned());
        let status = self.status.as_ref().map(|status| format!("STATUS={}", one_line(status)));
        ready.into_iter().chain(stopping).chain(status).collect::<Vec<_>>().join("\n")
    }
}

impl Notifier {
    /// A notifier for the socket in the environment; without one it does nothing.
    ///
    /// # Errors
    /// The environment names something else than a unix socket.
    pub fn from_env() -> Result<Self, NotifyError> {
        Self::open(env::var_os("NOTIFY_SOCKET"))
    }

    fn open(name: Option<OsString>) -> Result<Self, NotifyError> {
        let Some(name) = name.filter(|name| !name.is_empty()) else { return Ok(Self::default()) };
        let open = || -> io::Result<_> {
            let address = address(&name)?;
            // Never connected: systemd may replace its socket. std opens sockets with CLOEXEC.
            let socket = UnixDatagram::unbound()?;
            socket.set_nonblocking(true)?;
            Ok((socket, address))
        };
        let systemd =
            open().map_err(|source| NotifyError { socket: name.to_string_lossy().into(), source })?;
        Ok(Self { systemd: Some(systemd), ..Self::default() })
    }

    /// Reports that the listener is bound.
    pub fn ready(&self, status: &str) {
        self.report(|unsent| unsent.ready = true, status);
    }

    /// Extends the start timeout to `by` from now; to be called more often than that, for one call may be lost.
    pub fn extend_start(&self, by: Duration) {
        self.send(&format!("EXTEND_TIMEOUT_USEC={}", by.as_micros()));
    }

    /// Sets the status that `systemctl status` shows.
    pub fn status(&self, status: &str) {
        self.report(|_| {}, status);
    }

    /// Reports that the service stops.
    pub fn stopping(&self, status: &str) {
        self.report(|unsent| unsent.stopping = true, status);
    }

    /// Reports liveness; to be called every [`watchdog_interval`], for one call may be lost.
    pub fn watchdog(&self) {
        self.send("WATCHDOG=1");
    }

    /// Sends again what systemd did not take. Never returns.
    pub async fn send_late(&self) {
        loop {
            self.blocked.notified().await;
            sleep(RETRY).await;
            self.send_unsent();
        }
    }

    fn report(&self, set: impl FnOnce(&mut Unsent), status: &str) {
        {
            let mut unsent = self.unsent.lock().unwrap_or_else(PoisonError::into_inner);
            set(&mut unsent);
            unsent.status = Some(status.to_owned());
        }
        self.send_unsent();
    }

    fn send_unsent(&self) {
        let mut unsent = self.unsent.lock().unwrap_or_else(PoisonError::into_inner);
        let message = unsent.message();
        if message.is_empty() || self.send(&message) {
            *unsent = Unsent::default();
        } else {
            self.blocked.notify_one();
        }
    }

    /// Whether there is no need to send it again: an error other than a full queue will not pass.
    fn send(&self, state: &str) -> bool {
        let Some((socket, address)) = &self.systemd else { return true };
        match socket.send_to_addr(state.as_bytes(), address) {
            Ok(_) => true,
            Err(error) => {
                log::debug!("notifying systemd of {state}: {error}");
                error.kind() != io::ErrorKind::WouldBlock
            }
        }
    }
}

fn address(name: &OsStr) -> io::Result<SocketAddr> {
    match name.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
        [b'/', ..] => SocketAddr::from_pathname(name),
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "expected a path or an abstract name (@...)")),
    }
}

/// `status` without newlines, which would begin another assignment.
fn one_line(status: &str) -> String {
    status.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// The interval of liveness reports: half of systemd's watchdog timeout; none if there is no watchdog.
pub fn watchdog_interval() -> Option<Duration> {
    let text = |name| env::var(name).ok();
    watchdog(text("WATCHDOG_USEC").as_deref(), text("WATCHDOG_PID").as_deref(), std::process::id())
}

fn watchdog(usec: Option<&str>, pid: Option<&str>, own: u32) -> Option<Duration> {
    // sd_watchdog_enabled(3): a watchdog for another process is not for us.
    if pid.is_some_and(|pid| pid.parse() != Ok(own)) {
        return None;
    }
    let usec: u64 = usec?.parse().ok()?;
    Some(Duration::from_micros(usec / 2)).filter(|interval| !interval.is_zero())
}

#[cfg(test)]
#[path = "systemd_tests.rs"]
mod tests;
