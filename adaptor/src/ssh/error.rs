//! Why there is no connection.

use std::io;

use secure_comms_protocol::{BannerHint, LoginState, PhaseName};

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// No TCP connection.
    #[error("TCP connect: {0}")]
    Unreachable(#[source] io::Error),
    /// The agent's host key is not the pod's; nothing was sent to it.
    #[error("its host key ({shown}) is not this pod's")]
    WrongHostKey {
        /// The fingerprint of the key it showed.
        shown: String,
    },
    /// The agent refuses this user.
    #[error("user '{}' refused{}", .phase.user(), said(.banner))]
    Refused {
        /// The phase that we asked for.
        phase: PhaseName,
        /// What the agent said before; it proves nothing.
        banner: Option<String>,
    },
    /// It took too long.
    #[error("no answer within {0} s while {1}")]
    Timeout(u64, &'static str),
    /// The other end does not speak our protocol, or the connection broke.
    #[error("{0}: {1}")]
    Protocol(&'static str, String),
}

fn said(banner: &Option<String>) -> String {
    banner.as_ref().map(|text| format!(" (it says: {text})")).unwrap_or_default()
}

impl ConnectError {
    /// The phase that the agent says it is in, where it refuses ours: a hint.
    pub fn hint(&self) -> Option<PhaseName> {
        self.banner_hint().phase
    }

    /// Whether the agent says that nobody has logged in with its keys yet: if they are a stranger's, it will ask for
    /// others. A hint as well: an agent that lies only makes us wait.
    pub fn hints_fresh(&self) -> bool {
        self.banner_hint().login == Some(LoginState::Fresh)
    }

    fn banner_hint(&self) -> BannerHint {
        match self {
            Self::Refused { banner: Some(banner), .. } => BannerHint::parse(banner),
            _ => BannerHint::default(),
        }
    }
}
