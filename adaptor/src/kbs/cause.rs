//! Why an attempt got no answer, in words for operators: the cause at the root, without the layers of the HTTP client.

use std::time::Duration;

use secure_comms_tunnel::names::LookupError;

use super::KbsError;
use super::chain::{chain, root};
use super::tls;

const UNREACHABLE: &str = "; check that it runs, --kbs-url, and the network";
const NO_ANSWER: &str = "no answer in time";
const UNRESOLVED: &str = "; check the name in --kbs-url, and this node's DNS: a name of the cluster resolves only with the cluster's DNS";

/// Why an attempt failed.
pub(super) enum Failure {
    /// A retry may succeed.
    Transient(Cause),
    Permanent(KbsError),
}

/// A passing cause.
pub(super) struct Cause {
    pub(super) text: String,
    /// What to do, with its separator; may be empty.
    pub(super) advice: String,
    /// How long the KBS asks to wait.
    pub(super) retry_after: Option<Duration>,
    /// Whether the request had no connection, so that the KBS cannot carry it out.
    pub(super) not_sent: bool,
}

impl Cause {
    /// The KBS did not answer in the time of an attempt.
    pub(super) fn no_answer() -> Self {
        Self {
            text: NO_ANSWER.to_owned(),
            advice: UNREACHABLE.to_owned(),
            retry_after: None,
            not_sent: false,
        }
    }

    /// Whether there was no answer in the time of the attempt.
    pub(super) fn is_no_answer(&self) -> bool {
        self.text == NO_ANSWER
    }
}

impl Failure {
    /// What an error of the HTTP client means, on the request to the KBS at `url`.
    pub(super) fn of(error: &reqwest::Error, url: &str) -> Self {
        if let Some(cause) = tls::refused_certificate(error, url) {
            return Self::Permanent(KbsError::Certificate { url: url.to_owned(), cause });
        }
        if error.is_builder() {
            return Self::Permanent(KbsError::Setup(root(error)));
        }
        let (text, advice) = explain(error, url);
        Self::Transient(Cause { text, advice, retry_after: None, not_sent: error.is_connect() })
    }

    /// Whether the KBS cannot have received the request.
    pub(super) fn not_sent(&self) -> bool {
        match self {
            Self::Transient(cause) => cause.not_sent,
            Self::Permanent(error) => matches!(error, KbsError::Certificate { .. } | KbsError::Setup(_)),
        }
    }
}

fn explain(error: &reqwest::Error, url: &str) -> (String, String) {
    let cause = root(error);
    if url.starts_with("https:") {
        if let Some(hint) = tls::handshake_hint(error, url) {
            return (format!("TLS handshake: {cause}"), hint);
        }
    } else if cause.contains("HTTP version") || cause.contains("HTTP status line") {
        return (
            "its answer is not HTTP".to_owned(),
            "; does it speak TLS there? Then write https:// in --kbs-url".to_owned(),
        );
    }
    if error.is_timeout() {
        return (NO_ANSWER.to_owned(), UNREACHABLE.to_owned());
    }
    if let Some(lookup) = chain(error).find_map(|layer| layer.downcast_ref::<LookupError>()) {
        return (lookup.to_string(), UNRESOLVED.to_owned());
    }
    let text = if error.is_connect() { format!("connect: {cause}") } else { cause };
    (text, UNREACHABLE.to_owned())
}
