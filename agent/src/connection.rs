//! One connection: its source address, and the handle that ends it, with a reason for both ends.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

use log::Level;
use secure_comms_keys::text::one_line;
use secure_comms_protocol::PhaseName;
use secure_comms_ssh::guard::Guard;
use secure_comms_tunnel::Credits;
use tokio::sync::Notify;

use crate::os::log_limits::{UNAUTHENTICATED, UNPROVEN};

/// Refusals of one connection that are logged as warnings. Later ones are logged at debug level, so that a stranger can't
/// fill the log.
const REFUSALS_LOGGED: u32 = 16;

/// Longest reason for the end of a connection, in bytes. It may quote the peer.
const REASON_MAX: usize = 300;

/// The handle on a connection. Clones refer to the same connection.
#[derive(Clone, Debug)]
pub(crate) struct Connection {
    /// Unique in this process, growing.
    pub(crate) id: u64,
    /// Address of the other end.
    pub(crate) address: SocketAddr,
    guard: Guard,
    /// Empty until the peer has authenticated: its limits depend on the phase.
    credits: Arc<OnceLock<Credits>>,
    phase: Arc<OnceLock<PhaseName>>,
    login_key: Arc<OnceLock<String>>,
    refusals: Arc<AtomicU32>,
    end: Arc<End>,
}

/// The end of a connection from this side.
#[derive(Debug, Default)]
struct End {
    /// The first reason: later ones follow from it.
    reason: OnceLock<String>,
    requested: Notify,
    /// Whether an SSH session runs, which can send the reason.
    has_session: AtomicBool,
}

impl Connection {
    /// A connection that was just accepted.
    pub(crate) fn new(id: u64, address: SocketAddr, guard: Guard) -> Self {
        Self {
            id,
            address,
            guard,
            credits: Arc::default(),
            phase: Arc::default(),
            login_key: Arc::default(),
            refusals: Arc::default(),
            end: Arc::default(),
        }
    }

    /// Sets the phase and the flow control of a peer that has authenticated. At most `held_max` bytes are read ahead from
    /// now on.
    pub(crate) fn set_authenticated(&self, phase: PhaseName, credits: Credits, held_max: usize) {
        self.guard.set_read_ahead_limit(held_max);
        // A connection authenticates once.
        let _ = self.phase.set(phase);
        drop(self.credits.set(credits));
    }

    /// Sets the key that the peer logs in with, by its fingerprint.
    pub(crate) fn set_login_key(&self, fingerprint: String) {
        // A connection logs in once.
        drop(self.login_key.set(fingerprint));
    }

    /// Fingerprint of the key that the peer has logged in with; none in the Attestation phase.
    pub(crate) fn login_key(&self) -> Option<&str> {
        self.login_key.get().map(String::as_str)
    }

    /// The level for a line that this connection causes: `level`, or debug if unproven connections have caused too many
    /// within a minute. Every such line has its level from here.
    pub(crate) fn log_level(&self, level: Level) -> Level {
        match self.phase.get() {
            None => UNAUTHENTICATED.level(level),
            Some(PhaseName::Attestation) => UNPROVEN.level(level),
            // It has proven a worker-node key.
            Some(PhaseName::Kubernetes) => level,
        }
    }

    /// Counts a refused request; returns the level to log it at.
    pub(crate) fn count_refusal(&self) -> Level {
        match self.refusals.fetch_add(1, Ordering::Relaxed) {
            0..REFUSALS_LOGGED => self.log_level(Level::Warn),
            _ => Level::Debug,
        }
    }

    /// Counts a refused login; returns the level to log it at. A client tries all of its keys: the first one's refusal says
    /// enough.
    pub(crate) fn count_login_refusal(&self) -> Level {
        match self.refusals.fetch_add(1, Ordering::Relaxed) {
            0 => self.log_level(Level::Info),
            _ => Level::Debug,
        }
    }

    /// For the line about the end of the connection: for how long the peer has answered nothing, if that is notable.
    pub(crate) fn silence(&self) -> String {
        match self.guard.unanswered().map(|silence| silence.as_secs()) {
            None | Some(0) => String::new(),
            Some(seconds) => format!("; nothing had arrived for {seconds} s"),
        }
    }

    /// Waits until flow control has ended, because the connection was cut or the peer exceeded its credit. Never returns
    /// before the peer has authenticated.
    pub(crate) async fn flow_control_ended(&self) {
        match self.credits.get() {
            Some(credits) => credits.gone().await,
            None => std::future::pending().await,
        }
    }

    /// Waits until the connection is cut. Only for the time before its SSH session starts.
    pub(crate) async fn until_cut(&self) {
        self.guard.until_cut().await;
    }

    /// Ends the connection with a reason, which the peer receives in SSH's disconnect message and our log names. It is cut
    /// if no SSH session runs yet. Only the first call has an effect.
    pub(crate) fn end(&self, reason: &str) {
        if self.end.reason.set(one_line(reason, REASON_MAX)).is_err() {
            return;
        }
        if self.end.has_session.load(Ordering::Relaxed) {
            self.end.requested.notify_one();
        } else {
            self.guard.cut();
        }
    }

    /// The reason of [`Self::end`]; none while the connection need not end.
    pub(crate) fn end_reason(&self) -> Option<&str> {
        self.end.reason.get().map(String::as_str)
    }

    /// From now on [`Self::end`] wakes [`Self::end_requested`] instead of cutting the connection.
    pub(crate) fn session_started(&self) {
        self.end.has_session.store(true, Ordering::Relaxed);
    }

    /// Waits for [`Self::end`], and returns its reason. One task may wait. Cancellation safe.
    pub(crate) async fn end_requested(&self) -> &str {
        loop {
            if let Some(reason) = self.end_reason() {
                return reason;
            }
            self.end.requested.notified().await;
        }
    }

    /// Ends the connection, its SSH session and its streams at once.
    pub(crate) fn cut(&self) {
        // The credits too: a stream whose reader has stalled would otherwise keep the SSH session from ending.
        if let Some(credits) = self.credits.get() {
            credits.end();
        }
        self.guard.cut();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use secure_comms_ssh::guard::{Guarded, Peer};
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
    use tokio::time::sleep;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_end_says_how_long_the_peer_was_silent() {
        let (own, mut other) = duplex(64);
        let (mut socket, guard) = Guarded::new(own, Peer::Client);
        let connection = Connection::new(1, "192.0.2.1:1".parse().unwrap(), guard);
        sleep(Duration::from_secs(7)).await;
        assert_eq!(connection.silence(), "", "nothing was asked");
        socket.write_all(b"are you there?").await.unwrap();
        assert_eq!(connection.silence(), "");
        sleep(Duration::from_secs(20)).await;
        assert_eq!(connection.silence(), "; nothing had arrived for 20 s");
        other.write_all(b"SSH-2.0-x\r\n").await.unwrap();
        socket.read_exact(&mut [0; 4]).await.unwrap();
        assert_eq!(connection.silence(), "");
    }

    #[test]
    fn only_the_first_refused_login_of_a_connection_is_logged() {
        let connection = Connection::new(1, "192.0.2.1:1".parse().unwrap(), Guard::default());
        let _ = connection.phase.set(PhaseName::Kubernetes);
        let levels = [(); 3].map(|()| connection.count_login_refusal());
        assert_eq!(levels, [Level::Info, Level::Debug, Level::Debug]);
    }

    fn connection() -> Connection {
        Connection::new(1, "192.0.2.1:1".parse().unwrap(), Guard::default())
    }

    #[tokio::test]
    async fn a_connection_without_a_session_is_cut() {
        let connection = connection();
        connection.end("evicted");
        connection.until_cut().await;
        assert_eq!(connection.end_reason(), Some("evicted"));
    }

    #[tokio::test]
    async fn the_first_reason_counts_and_is_one_short_line() {
        let connection = connection();
        connection.session_started();
        assert_eq!(connection.end_reason(), None);
        let waits = connection.clone();
        let waits = tokio::spawn(async move { waits.end_requested().await.to_owned() });
        tokio::task::yield_now().await;
        connection.end(&format!("a\nforged\u{1b}[2J: {}", "x".repeat(70_000)));
        connection.end("a later one");
        let reason = waits.await.unwrap();
        assert!(
            reason.starts_with("a\\nforged\\u{1b}[2J: xxx") && reason.len() < REASON_MAX + 60,
            "{reason}"
        );
        // Also for one who comes late.
        assert_eq!(connection.end_requested().await, reason);
    }
}
