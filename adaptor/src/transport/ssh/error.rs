//! Errors of a connection attempt.

use std::io;

use secure_comms_protocol::{BannerHint, LoginState, PhaseName};
use secure_comms_ssh::profile::nothing_in_common;
use secure_comms_tunnel::names::LookupError;

use crate::text::quote;

/// Error of a connection attempt.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    /// The TCP connection failed.
    #[error("TCP connect: {0}")]
    Unreachable(io::Error),
    /// The host name has no address, or it can't be known.
    #[error("{0}")]
    Lookup(LookupError),
    /// The server at the address does not speak SSH: what it said instead.
    #[error("{0}")]
    NotSsh(String),
    /// The agent's host key is not the pod's. The connection was closed before anything else was sent.
    #[error("its host key ({shown}) is not this pod's")]
    WrongHostKey {
        /// Fingerprint of the agent's key.
        shown: String,
    },
    /// The agent refuses the user of this phase.
    #[error("user '{}' refused{}", .phase.user(), banner_suffix(.banner))]
    Refused {
        /// The requested phase.
        phase: PhaseName,
        /// The agent's banner; a hint, not proof.
        banner: Option<String>,
    },
    /// A step did not end in time: the limit in seconds, and the step.
    #[error("no answer within {0} s while {1}")]
    Timeout(u64, &'static str),
    /// The agent ended the connection during a step: the step, and its reason.
    #[error("{0}: {1}")]
    Dismissed(&'static str, String),
    /// The other end does not speak our protocol, or the connection broke: the step, and the cause.
    #[error("{0}: {1}")]
    Protocol(&'static str, String),
}

/// The resolver's own words, without those that libc's caller puts before them.
fn banner_suffix(banner: &Option<String>) -> String {
    banner.as_ref().map(|text| format!(" (it says: {text})")).unwrap_or_default()
}

impl ConnectError {
    /// The phase that a refusing agent's banner names; a hint.
    pub(crate) fn hint(&self) -> Option<PhaseName> {
        self.banner_hint().phase
    }

    /// Whether the agent's banner says that no worker node has logged in with its keys yet. If they are a stranger's, the
    /// agent attests again later. A hint: a false one delays the start at most until its deadline.
    pub(crate) fn hints_fresh(&self) -> bool {
        self.banner_hint().login == Some(LoginState::Fresh)
    }

    fn banner_hint(&self) -> BannerHint {
        match self {
            Self::Refused { banner: Some(banner), .. } => BannerHint::parse(banner),
            _ => BannerHint::default(),
        }
    }
}

/// What an error of russh means, in words that say who ended the connection.
pub(super) fn cause(error: &russh::Error) -> String {
    match error {
        russh::Error::Disconnect | russh::Error::HUP => "the other end closed the connection".into(),
        russh::Error::IO(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            "the other end closed the connection".into()
        }
        other => nothing_in_common(other, "--require-pq").unwrap_or_else(|| quote(&other.to_string())),
    }
}
