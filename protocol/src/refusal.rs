//! Refusals of streams: what an end answers when it does not open a stream that the other end asks for.

use alloc::format;
use alloc::string::String;
use core::fmt;

use crate::PhaseName;
use crate::name::TUNNEL_NAME_MAX;

/// Kind of a refusal: its reason code on the wire (RFC 4254 5.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusalKind {
    /// The name or the phase is not allowed (`SSH_OPEN_ADMINISTRATIVELY_PROHIBITED`).
    Prohibited,
    /// The server could not be reached (`SSH_OPEN_CONNECT_FAILED`).
    ConnectFailed,
    /// Too many streams are open (`SSH_OPEN_RESOURCE_SHORTAGE`).
    Shortage,
}

impl RefusalKind {
    /// Reason code of `SSH_MSG_CHANNEL_OPEN_FAILURE`.
    pub const fn code(self) -> u32 {
        match self {
            Self::Prohibited => 1,
            Self::ConnectFailed => 2,
            Self::Shortage => 4,
        }
    }

    /// Kind of the refusal with this reason code; none for a code that our ends do not send.
    pub const fn from_code(code: u32) -> Option<Self> {
        match code {
            1 => Some(Self::Prohibited),
            2 => Some(Self::ConnectFailed),
            4 => Some(Self::Shortage),
            _ => None,
        }
    }
}

/// Why a stream is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RefusalReason {
    /// The text is not a tunnel name.
    BadName,
    /// The phase has no outbound of this name.
    NoOutbound,
    /// The adaptor has not requested the agent to forward streams of this name.
    NotRequested,
    /// The connection has as many streams as it may have, or as its tunnel may have of them.
    TooManyStreams,
    /// The stream id is in use, or belongs to the other end's range.
    BadStreamId(u32),
    /// The session has no stream of this id and tunnel that could go on.
    UnknownStream(u32),
    /// The connection has ended.
    ConnectionGone,
    /// The server of the outbound can't be reached; with the error.
    Unreachable(String),
}

impl RefusalReason {
    /// Kind that goes with the reason.
    pub const fn kind(&self) -> RefusalKind {
        match self {
            Self::BadName
            | Self::NoOutbound
            | Self::NotRequested
            | Self::BadStreamId(_)
            | Self::UnknownStream(_)
            | Self::ConnectionGone => RefusalKind::Prohibited,
            Self::TooManyStreams => RefusalKind::Shortage,
            Self::Unreachable(_) => RefusalKind::ConnectFailed,
        }
    }
}

impl fmt::Display for RefusalReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BadName => f.write_str("not a tunnel name"),
            Self::NoOutbound => f.write_str("no outbound of this name in this phase"),
            Self::NotRequested => f.write_str("the adaptor has not asked for streams of this name"),
            Self::TooManyStreams => f.write_str("too many open streams on this connection; close some"),
            Self::BadStreamId(id) => write!(f, "stream id {id} is in use or not the opener's to give"),
            Self::UnknownStream(id) => write!(f, "the session knows no stream {id} of this tunnel"),
            Self::ConnectionGone => f.write_str("the connection is gone"),
            Self::Unreachable(error) => f.write_str(error),
        }
    }
}

/// A refusal, as the other end receives it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Kind of the refusal.
    pub kind: RefusalKind,
    /// Text for the other end: the tunnel, the phase and the reason.
    pub reason: String,
}

impl Refusal {
    /// Refuses a stream to the tunnel `name` in `phase`.
    pub fn new(name: &str, phase: PhaseName, reason: &RefusalReason) -> Self {
        // The peer chose the name. It may be as long as a message, and the text goes into our log.
        let name: String = name.chars().take(TUNNEL_NAME_MAX).collect();
        Self {
            kind: reason.kind(),
            reason: format!("tunnel {}, {phase} phase: {reason}", name.escape_default()),
        }
    }
}
