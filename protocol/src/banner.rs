//! The authentication banner (RFC 4252 5.4), in which the agent names its phase.
//!
//! It is sent before authentication, so it is a hint and proves nothing.

use crate::PhaseName;

/// Whether a worker node has logged in with the agent's keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoginState {
    /// The agent has keys, and no worker node has logged in with them.
    Fresh,
    /// A worker node has logged in, and the agent keeps its keys until the VM reboots.
    Latched,
}

/// What the agent's banner says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Banner {
    /// The agent is in the Attestation phase.
    Attestation,
    /// The agent is in the Kubernetes phase.
    Kubernetes(LoginState),
}

/// What can be read from a banner. Each part is absent if the text does not name it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BannerHint {
    /// Phase of the agent.
    pub phase: Option<PhaseName>,
    /// Login state of an agent in the Kubernetes phase.
    pub login: Option<LoginState>,
}

impl Banner {
    /// Text of the banner as it is sent, with its line end.
    pub const fn text(self) -> &'static str {
        match self {
            Self::Attestation => "Secure Comms agent in the Attestation phase\r\n",
            Self::Kubernetes(LoginState::Fresh) => "Secure Comms agent in the Kubernetes phase, fresh\r\n",
            Self::Kubernetes(LoginState::Latched) => {
                "Secure Comms agent in the Kubernetes phase, latched\r\n"
            }
        }
    }
}

impl From<Banner> for BannerHint {
    fn from(banner: Banner) -> Self {
        match banner {
            Banner::Attestation => Self { phase: Some(PhaseName::Attestation), login: None },
            Banner::Kubernetes(login) => Self { phase: Some(PhaseName::Kubernetes), login: Some(login) },
        }
    }
}

impl BannerHint {
    /// Reads a banner. The words may stand anywhere in the text, so that releases may add to it.
    pub fn parse(text: &str) -> Self {
        let phase = if text.contains("Attestation phase") {
            Some(PhaseName::Attestation)
        } else if text.contains("Kubernetes phase") {
            Some(PhaseName::Kubernetes)
        } else {
            None
        };
        let login = if text.contains("fresh") {
            Some(LoginState::Fresh)
        } else if text.contains("latched") {
            Some(LoginState::Latched)
        } else {
            None
        };
        Self { phase, login }
    }
}
