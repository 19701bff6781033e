//! Why connections are refused: counted, and logged with a limit.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use secure_comms_keys::text::one_line;

use crate::metrics::Metrics;

/// Of each kind one line is logged in this time; the others are counted.
pub(super) const WINDOW: Duration = Duration::from_secs(10);

/// The longest detail of a log line, in bytes.
const MAX_DETAIL: usize = 200;

/// Why a connection is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Refusal {
    /// It was made to our own port.
    NotRedirected,
    /// Newer connections took its place before its hello was complete.
    TooManyHellos,
    /// Its hello was not complete in time.
    HelloTimeout,
    /// Its hello is too long.
    HelloTooLong,
    /// It was closed before its hello was complete.
    ClosedEarly,
    /// It does not speak TLS.
    NotTls,
    /// Its TLS is too old.
    TlsVersion,
    /// Its hello is broken.
    BadHello,
    /// Its hello has no server name.
    NoServerName,
    /// Too many connections are held.
    TooManyHeld,
    /// Newer connections with its server name took its place.
    Superseded,
    /// It could not be looked at in time.
    Busy,
    /// No sandbox has its server name.
    UnknownPod,
    /// A younger sandbox has the address that it dialled.
    AddressOfAnotherPod,
    /// Its pod cannot be used.
    PodFailed,
    /// The service ends.
    Stopping,
    /// It presented no client certificate.
    NoClientCertificate,
    /// Its client certificate is not the one that belongs to the pod.
    OtherClientCertificate,
    /// The key and the certificates of the pod are of no use.
    BadIdentity,
    /// Its handshake failed.
    Handshake,
    /// The rest of its handshake took too long.
    HandshakeTimeout,
}

impl Refusal {
    /// The word for it in metrics.
    pub fn word(self) -> &'static str {
        match self {
            Self::NotRedirected => "not_redirected",
            Self::TooManyHellos => "too_many_hellos",
            Self::HelloTimeout => "hello_timeout",
            Self::HelloTooLong => "hello_too_long",
            Self::ClosedEarly => "closed_early",
            Self::NotTls => "not_tls",
            Self::TlsVersion => "tls_version",
            Self::BadHello => "bad_hello",
            Self::NoServerName => "no_server_name",
            Self::TooManyHeld => "too_many_held",
            Self::Superseded => "superseded",
            Self::Busy => "busy",
            Self::UnknownPod => "unknown_pod",
            Self::AddressOfAnotherPod => "address_of_another_pod",
            Self::PodFailed => "pod_failed",
            Self::Stopping => "stopping",
            Self::NoClientCertificate => "no_client_certificate",
            Self::OtherClientCertificate => "other_client_certificate",
            Self::BadIdentity => "bad_identity",
            Self::Handshake => "handshake",
            Self::HandshakeTimeout => "handshake_timeout",
        }
    }

    /// Whether cloud-api-adaptor itself ends connections like this, in good order.
    fn is_usual(self) -> bool {
        matches!(self, Self::Superseded | Self::PodFailed | Self::Stopping)
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotRedirected => "it is no redirected dial to a VM: only cloud-api-adaptor's dials belong here",
            Self::TooManyHellos => "too many others began no TLS handshake: look for the process that dials",
            Self::HelloTimeout => "it sent no complete TLS hello in time: only cloud-api-adaptor may dial a VM there",
            Self::HelloTooLong => "its TLS hello is too long: only cloud-api-adaptor may dial a VM there",
            Self::ClosedEarly => "it was closed without a TLS hello: only cloud-api-adaptor may dial a VM there",
            Self::NotTls => "it is not TLS: cloud-api-adaptor must run with TLS (no -disable-tls), all others have no business there",
            Self::TlsVersion => "it speaks no TLS 1.2 or 1.3",
            Self::BadHello => "its TLS hello is broken",
            Self::NoServerName => "it names no server (SNI): only cloud-api-adaptor may dial a VM there",
            Self::TooManyHeld => "too many connections wait for their pods",
            Self::Superseded => "newer connections for the same pod took its place",
            Self::Busy => "it could not be looked at in time: the service is overloaded",
            Self::UnknownPod => "no sandbox of cloud-api-adaptor has its server name",
            Self::AddressOfAnotherPod => "another sandbox has the address that it dialled",
            Self::PodFailed => "its pod cannot be used",
            Self::Stopping => "the service ends",
            Self::NoClientCertificate => "it presented no client certificate",
            Self::OtherClientCertificate => "its client certificate is not cloud-api-adaptor's for this pod",
            Self::BadIdentity => "the TLS key and certificates of the pod are of no use",
            Self::Handshake => "its TLS handshake failed",
            Self::HandshakeTimeout => "it did not go on with its TLS handshake in time",
        })
    }
}

/// Counts and logs refusals. A clone is the same.
#[derive(Clone, Debug)]
pub(super) struct Refusals {
    metrics: Metrics,
    windows: Arc<Mutex<BTreeMap<Kind, Window>>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    NotAccepted,
    Refused(Refusal),
}

#[derive(Debug)]
struct Window {
    began: Instant,
    left_out: u64,
}

impl Refusals {
    pub(super) fn new(metrics: Metrics) -> Self {
        Self { metrics, windows: Arc::default() }
    }

    /// A connection was refused. `detail` may have come from a stranger.
    pub(super) fn refused(&self, refusal: Refusal, vm: Option<SocketAddr>, detail: &str) {
        self.metrics.dial_refused(refusal.word());
        if !self.may_log(Kind::Refused(refusal)) {
            return;
        }
        let vm = vm.map(|vm| format!(" to {vm}")).unwrap_or_default();
        let detail =
            if detail.is_empty() { String::new() } else { format!(" ({})", one_line(detail, MAX_DETAIL)) };
        match refusal.is_usual() {
            true => tracing::info!("caa front: a connection{vm} was closed: {refusal}{detail}"),
            false => tracing::warn!("caa front: a connection{vm} was refused: {refusal}{detail}"),
        }
    }

    /// A connection was not accepted because of the system.
    pub(super) fn not_accepted(&self, error: &io::Error) {
        if self.may_log(Kind::NotAccepted) {
            tracing::warn!("caa front: cannot accept connections for now: {error}");
        }
    }

    /// Logs how many lines were left out, once their time is over.
    pub(super) fn report(&self) {
        let mut windows = self.lock();
        let now = Instant::now();
        windows.retain(|kind, window| {
            if now.duration_since(window.began) < WINDOW {
                return true;
            }
            if window.left_out > 0 {
                let (count, seconds) = (window.left_out, now.duration_since(window.began).as_secs());
                match kind {
                    Kind::Refused(refusal) => tracing::warn!(
                        "caa front: {count} more connections were refused in the last {seconds} s: {refusal}"
                    ),
                    Kind::NotAccepted => {
                        tracing::warn!(
                            "caa front: cannot accept connections, {count} more times in the last {seconds} s"
                        );
                    }
                }
            }
            false
        });
    }

    fn may_log(&self, kind: Kind) -> bool {
        let mut windows = self.lock();
        match windows.get_mut(&kind) {
            Some(window) => {
                window.left_out += 1;
                false
            }
            None => {
                windows.insert(kind, Window { began: Instant::now(), left_out: 0 });
                true
            }
        }
    }

    /// Never poisoned: nothing panics under the lock.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Kind, Window>> {
        self.windows.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_of_a_kind_is_logged_at_a_time() {
        let refusals = Refusals::new(Metrics::default());
        let (scan, other) = (Kind::Refused(Refusal::ClosedEarly), Kind::Refused(Refusal::NotTls));
        assert!(refusals.may_log(scan));
        assert!(!refusals.may_log(scan) && refusals.may_log(other));
        assert_eq!(refusals.lock().get(&scan).unwrap().left_out, 1);
        refusals.report();
        assert!(!refusals.may_log(scan), "its time is not over");
        refusals.lock().get_mut(&scan).unwrap().began = Instant::now().checked_sub(WINDOW).unwrap();
        refusals.report();
        assert!(refusals.may_log(scan) && !refusals.may_log(other));
    }
}
