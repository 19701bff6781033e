//! Why connections are refused.

use std::fmt;

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
            Self::NoClientCertificate => "no_client_certificate",
            Self::OtherClientCertificate => "other_client_certificate",
            Self::BadIdentity => "bad_identity",
            Self::Handshake => "handshake",
            Self::HandshakeTimeout => "handshake_timeout",
        }
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
            Self::Superseded => "newer connections for the same pod took its place: only cloud-api-adaptor may dial a VM there",
            Self::Busy => "it could not be looked at in time: the service is overloaded",
            Self::UnknownPod => "no sandbox of cloud-api-adaptor has its server name",
            Self::NoClientCertificate => "it presented no client certificate",
            Self::OtherClientCertificate => "its client certificate is not cloud-api-adaptor's for this pod",
            Self::BadIdentity => "the TLS key and certificates of the pod are of no use",
            Self::Handshake => "its TLS handshake failed",
            Self::HandshakeTimeout => "it did not go on with its TLS handshake in time",
        })
    }
}
