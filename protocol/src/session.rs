//! Sessions: streams that outlive the connections which carry them. Their names, and what is said when a stream goes on
//! over another connection.

use alloc::string::String;
use core::fmt;
use core::str::FromStr;

use crate::TunnelName;

/// Length of a session id in hex digits: 128 random bits.
const ID_DIGITS: usize = 32;

/// Identifies a session at its agent: 32 hex digits in lower case, which the agent chooses at random.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SessionId(String);

impl SessionId {
    /// The id of these random bits.
    pub fn from_random(bits: u128) -> Self {
        Self(alloc::format!("{bits:032x}"))
    }
}

/// A text is not a session id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionIdError;

impl fmt::Display for SessionIdError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "not a session id: expected {ID_DIGITS} hex digits in lower case")
    }
}

impl core::error::Error for SessionIdError {}

impl FromStr for SessionId {
    type Err = SessionIdError;

    fn from_str(text: &str) -> Result<Self, SessionIdError> {
        let is_digit = |digit: u8| digit.is_ascii_digit() || (b'a'..=b'f').contains(&digit);
        if text.len() == ID_DIGITS && text.bytes().all(is_digit) {
            Ok(Self(text.into()))
        } else {
            Err(SessionIdError)
        }
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A connection of a session, by the tunnels that it is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Lane {
    /// The control channel of the session, and the tunnel to the kata agent.
    Main,
    /// All other tunnels, so that their bytes never stand before a request of the runtime.
    Data,
}

impl Lane {
    /// All lanes, in the order in which they are opened.
    pub const ALL: [Self; 2] = [Self::Main, Self::Data];

    /// The lane for the streams of a tunnel.
    pub fn of(tunnel: &TunnelName) -> Self {
        if tunnel.is_kata_agent() { Self::Main } else { Self::Data }
    }

    /// The lane of this name; none for a lane of a later version.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|lane| lane.name() == name)
    }

    /// Name in `hello`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Main => "main",
            Self::Data => "data",
        }
    }
}

impl fmt::Display for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How far an end has come with receiving a stream. Both numbers only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// Bytes of the stream that have arrived, and one more if its end of file has.
    pub received: u64,
    /// All credit that was ever granted for the stream, the initial one included, in bytes.
    pub granted: u64,
}

/// Length of [`Position::to_bytes`].
pub const POSITION_BYTES: usize = 16;

impl Position {
    /// First message on a channel on which a stream goes on, from the end that accepts the channel.
    pub fn to_bytes(self) -> [u8; POSITION_BYTES] {
        let both = u128::from(self.received) << 64 | u128::from(self.granted);
        both.to_be_bytes()
    }

    /// Reads that message; none if it has another length.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let both = u128::from_be_bytes(bytes.try_into().ok()?);
        let half = |bits: u128| u64::try_from(bits & u128::from(u64::MAX)).unwrap_or(u64::MAX);
        Some(Self { received: half(both >> 64), granted: half(both) })
    }
}

/// For what a channel is opened in a session: the originator address of its open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opening {
    /// For a new stream.
    New,
    /// For a stream that its opener has asked for before, on a connection that ended before the answer came. If the other
    /// end knows the stream, it goes on; otherwise it is new.
    Again(Position),
    /// For a stream that both ends know; the other end refuses one that it does not know.
    Resume(Position),
}

/// Originator address of a new stream.
const NEW: &str = "127.0.0.1";

impl Opening {
    /// The originator address of a channel open. A text of no known form is that of a new stream: other clients send
    /// addresses.
    pub fn from_originator(text: &str) -> Self {
        let mut words = text.split(' ');
        let (word, received, granted) = (words.next(), words.next(), words.next());
        // Digits only: `parse` would take a sign, too.
        let decimal = |word: &&str| word.bytes().all(|byte| byte.is_ascii_digit());
        let number = |word: Option<&str>| word.filter(decimal).and_then(|word| word.parse().ok());
        match (word, number(received), number(granted), words.next()) {
            (Some("again"), Some(received), Some(granted), None) => {
                Self::Again(Position { received, granted })
            }
            (Some("resume"), Some(received), Some(granted), None) => {
                Self::Resume(Position { received, granted })
            }
            _ => Self::New,
        }
    }

    /// Where the opener is with receiving the stream, unless it is new: the other end then begins with its own position.
    pub const fn position(self) -> Option<Position> {
        match self {
            Self::New => None,
            Self::Again(position) | Self::Resume(position) => Some(position),
        }
    }
}

impl fmt::Display for Opening {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (word, Position { received, granted }) = match self {
            Self::New => return f.write_str(NEW),
            Self::Again(position) => ("again", position),
            Self::Resume(position) => ("resume", position),
        };
        write!(f, "{word} {received} {granted}")
    }
}

#[cfg(test)]
mod tests {
    use alloc::string::ToString;

    use super::*;

    #[test]
    fn an_opening_survives_the_originator_address() {
        let position = Position { received: u64::MAX, granted: 7 };
        for opening in [Opening::New, Opening::Again(position), Opening::Resume(position)] {
            assert_eq!(Opening::from_originator(&opening.to_string()), opening);
        }
    }

    #[test]
    fn other_originators_are_those_of_new_streams() {
        for text in [
            "",
            "::1",
            "resume",
            "resume 1",
            "resume 1 x",
            "resume 1 2 3",
            "again -1 2",
            "again +1 2",
            "Resume 1 2",
        ] {
            assert_eq!(Opening::from_originator(text), Opening::New, "{text}");
        }
    }

    #[test]
    fn a_position_survives_its_bytes() {
        let position = Position { received: 1 << 63, granted: u64::MAX - 1 };
        assert_eq!(Position::from_bytes(&position.to_bytes()), Some(position));
        assert_eq!(Position::from_bytes(&[0; 15]), None);
    }

    #[test]
    fn a_session_id_is_32_lower_case_hex_digits() {
        let id = SessionId::from_random(255);
        assert_eq!(id.to_string().parse(), Ok(id));
        for text in ["", "0", &"A".repeat(32), &"g".repeat(32), &"0".repeat(33)] {
            assert_eq!(text.parse::<SessionId>(), Err(SessionIdError), "{text}");
        }
    }

    #[test]
    fn only_the_kata_agent_is_on_the_main_lane() {
        assert_eq!(Lane::of(&TunnelName::kata_agent()), Lane::Main);
        assert_eq!(Lane::of(&TunnelName::kbs()), Lane::Data);
        assert_eq!(Lane::ALL.map(|lane| Lane::from_name(lane.name())), Lane::ALL.map(Some));
        assert_eq!(Lane::from_name("network"), None);
    }
}
