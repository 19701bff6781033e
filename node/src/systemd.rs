//! The service manager's protocol (sd_notify(3)): readiness, status and liveness. Does nothing without a service manager.
//! Never waits: what it does not take at once is sent again later.

use std::env;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Longest status, in bytes.
const STATUS_MAX: usize = 1024;

/// The service manager cannot be notified.
#[derive(Debug, thiserror::Error)]
#[error("notify the service manager: NOTIFY_SOCKET='{socket}': {cause}; use Type=notify")]
pub struct NotifyError {
    socket: String,
    cause: io::Error,
}

/// Sends notifications, if a service manager started this process.
#[derive(Debug, Default)]
pub struct Notifier {
    manager: Option<(UnixDatagram, SocketAddr)>,
    unsent: Mutex<Unsent>,
}

/// What the service manager does not know yet.
#[derive(Debug, Default)]
struct Unsent {
    ready: bool,
    stopping: bool,
    status: Option<String>,
    /// The status that it knows.
    known: Option<String>,
}

impl Unsent {
    fn message(&self) -> String {
        let ready = self.ready.then(|| "READY=1".to_owned());
        let stopping = self.stopping.then(|| "STOPPING=1".to_owned());
        let status = self.status.as_ref().map(|status| format!("STATUS={status}"));
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
            // Never connected: the service manager may replace its socket.
            let socket = UnixDatagram::unbound()?;
            socket.set_nonblocking(true)?;
            Ok((socket, address))
        };
        let manager = open().map_err(|cause| NotifyError { socket: name.to_string_lossy().into(), cause })?;
        Ok(Self { manager: Some(manager), ..Self::default() })
    }

    /// The service serves.
    pub fn ready(&self) {
        self.report(|unsent| unsent.ready = true);
    }

    /// What `systemctl status` shows. One that it shows already is not sent.
    pub fn status(&self, status: &str) {
        let status = secure_comms_keys::text::one_line(status, STATUS_MAX);
        self.report(|unsent| {
            unsent.status = Some(status).filter(|status| unsent.known.as_ref() != Some(status))
        });
    }

    /// The service ends.
    pub fn stopping(&self) {
        self.report(|unsent| unsent.stopping = true);
    }

    /// The service lives; to be called every [`watchdog_interval`].
    pub fn watchdog(&self) {
        // One that is lost is made up for by the next.
        self.send("WATCHDOG=1");
    }

    /// Sends again what the service manager did not take.
    pub fn send_late(&self) {
        self.report(|_| {});
    }

    fn report(&self, change: impl FnOnce(&mut Unsent)) {
        let mut unsent = self.unsent.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut unsent);
        let message = unsent.message();
        if !message.is_empty() && self.send(&message) {
            let known = unsent.status.take().or_else(|| unsent.known.take());
            *unsent = Unsent { known, ..Unsent::default() };
        }
    }

    /// Whether there is no need to send it again: an error other than a full queue will not pass.
    fn send(&self, message: &str) -> bool {
        let Some((socket, address)) = &self.manager else { return true };
        match socket.send_to_addr(message.as_bytes(), address) {
            Ok(_) => true,
            Err(error) => {
                tracing::debug!("notify the service manager of {message}: {error}");
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

/// The interval of liveness reports: half of the watchdog's timeout; none if there is no watchdog for this process.
pub fn watchdog_interval() -> Option<Duration> {
    let text = |name| env::var(name).ok();
    watchdog(text("WATCHDOG_USEC").as_deref(), text("WATCHDOG_PID").as_deref(), std::process::id())
}

fn watchdog(usec: Option<&str>, pid: Option<&str>, own: u32) -> Option<Duration> {
    if pid.is_some_and(|pid| pid.parse() != Ok(own)) {
        return None;
    }
    let usec: u64 = usec?.parse().ok()?;
    Some(Duration::from_micros(usec / 2)).filter(|interval| !interval.is_zero())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_manager_does_not_take_is_sent_later() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        manager.set_nonblocking(true).unwrap();
        let notifier = Notifier::open(Some(path.into())).unwrap();
        let receive = || {
            let mut text = [0; 4096];
            manager.recv(&mut text).ok().map(|length| String::from_utf8_lossy(&text[..length]).into_owned())
        };
        for number in 0..10_000 {
            notifier.status(&format!("{number}\nREADY=1"));
        }
        notifier.ready();
        let mut last = String::new();
        while let Some(message) = receive() {
            assert!(!message.contains("READY=1\n") && !message.contains("\nREADY"), "{message}");
            last = message;
        }
        assert_ne!(last, "STATUS=9999\\nREADY=1", "its queue is limited");
        notifier.send_late();
        assert_eq!(receive().unwrap(), "READY=1\nSTATUS=9999\\nREADY=1");
        notifier.status("9999\nREADY=1");
        notifier.send_late();
        assert_eq!(receive(), None, "it is known");
        notifier.stopping();
        assert_eq!(receive().unwrap(), "STOPPING=1");
    }

    #[test]
    fn a_socket_has_a_path_or_an_abstract_name() {
        let name = format!("secure-comms-test-{}", std::process::id());
        let manager = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        Notifier::open(Some(format!("@{name}").into())).unwrap().watchdog();
        let mut text = [0; 16];
        assert_eq!(manager.recv(&mut text).map(|length| text[..length].to_vec()).unwrap(), b"WATCHDOG=1");
        assert!(Notifier::open(Some("relative".into())).is_err());
        assert!(Notifier::open(Some("".into())).unwrap().manager.is_none());
    }

    #[test]
    fn the_watchdog_is_ours_or_none() {
        assert_eq!(watchdog(Some("2000000"), Some("7"), 7), Some(Duration::from_secs(1)));
        assert_eq!(watchdog(Some("2000000"), None, 7), Some(Duration::from_secs(1)));
        for (usec, pid) in [(Some("2000000"), Some("8")), (None, None), (Some("x"), None), (Some("0"), None)]
        {
            assert_eq!(watchdog(usec, pid, 7), None);
        }
    }
}
