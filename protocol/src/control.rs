//! Messages of the control channel: in both directions, each line is one JSON object with one key.

use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;

use serde::{Deserialize, Serialize};

use crate::hello::Hello;
use crate::json::unquoted;
use crate::limits::CONTROL_LINE_MAX;
use crate::session::Position;

/// Progress of the agent's attempts to get its keys.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyProgress {
    /// Number of attempts so far, from 1.
    pub attempt: u64,
    /// Error of the last attempt; none once the agent has its keys.
    pub error: Option<String>,
}

/// A line of the agent's log, for the operator.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LogLine {
    /// Number of the line in the agent's process, from 1. A gap means lines that are not kept any more.
    pub seq: u64,
    /// Age of the line, in seconds.
    pub age: u64,
    /// `error`, `warning` or `info`; a later version may have others.
    pub level: String,
    /// The line.
    pub text: String,
}

/// Message that gives credit back to the sender of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credit {
    /// Stream id: the originator port of the channel open.
    pub stream: u32,
    /// Cost of the messages that the receiver's socket has taken, in bytes.
    pub bytes: u32,
}

/// How far the sender has come with receiving a stream of a session: gives credit back, and acknowledges what arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamPosition {
    /// Stream id: the originator port of the channel open.
    pub stream: u32,
    /// See [`Position::received`].
    pub received: u64,
    /// See [`Position::granted`].
    pub granted: u64,
}

impl StreamPosition {
    /// The position of this stream.
    pub const fn new(stream: u32, Position { received, granted }: Position) -> Self {
        Self { stream, received, granted }
    }

    /// The position without the stream.
    pub const fn position(self) -> Position {
        Position { received: self.received, granted: self.granted }
    }
}

/// The agent's answer to a `hello` with a lane.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionReply {
    /// Id of the session that this connection belongs to.
    pub id: String,
    /// Whether it is the session that the hello named, with its streams.
    pub resumed: bool,
}

/// Adaptor to agent, on a connection that resumes a session: the streams that the adaptor knows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownStreams {
    /// Stream ids, of the streams of both ends.
    pub known: Vec<u32>,
}

/// Agent to adaptor: the agent has a stream for a lane that is not connected.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WantedLane {
    /// Name of the lane.
    pub name: String,
}

/// Message before an end closes the connection.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bye {
    /// Reason, for the log of the other end.
    pub reason: String,
    /// Whether the session ends, too, and with it all its streams and lanes. Otherwise only this connection does.
    #[serde(default, skip_serializing_if = "core::ops::Not::not")]
    pub ends_session: bool,
}

/// A message with no content.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Empty {}

/// A control message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[expect(
    clippy::large_enum_variant,
    reason = "at most a few exist at a time, and a box would be allocated for each hello"
)]
#[serde(rename_all = "lowercase")]
pub enum Control {
    /// First message of each end.
    Hello(Hello),
    /// Agent to adaptor: progress of getting the keys.
    Keys(KeyProgress),
    /// Agent to adaptor: the agent has its keys. This connection ends; the adaptor must reconnect as `kubernetes`.
    Upgrade(Empty),
    /// Agent to adaptor, in the Kubernetes phase: a line of the agent's log.
    Log(LogLine),
    /// Credit for a stream without a session.
    Credit(Credit),
    /// Position in a stream of a session.
    Position(StreamPosition),
    /// Agent to adaptor: the session of this connection.
    Session(SessionReply),
    /// Adaptor to agent: the streams that go on.
    Streams(KnownStreams),
    /// Agent to adaptor: a lane is wanted.
    Lane(WantedLane),
    /// Liveness probe; the answer is a pong with the same number.
    Ping(u64),
    /// Answer to the ping with this number.
    Pong(u64),
    /// The sender closes the connection.
    Bye(Bye),
}

/// Received line. Unknown keys are ignored, so that versions can differ.
#[derive(Deserialize)]
struct Line {
    hello: Option<Hello>,
    keys: Option<KeyProgress>,
    upgrade: Option<Empty>,
    log: Option<LogLine>,
    credit: Option<Credit>,
    position: Option<StreamPosition>,
    session: Option<SessionReply>,
    streams: Option<KnownStreams>,
    lane: Option<WantedLane>,
    ping: Option<u64>,
    pong: Option<u64>,
    bye: Option<Bye>,
}

/// A line is not a control message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ControlError {
    /// The line is longer than [`CONTROL_LINE_MAX`].
    TooLong,
    /// The line is not a JSON object of the expected shape; with the parser's error.
    Malformed(String),
}

impl fmt::Display for ControlError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLong => write!(f, "control line: longer than {CONTROL_LINE_MAX} bytes"),
            Self::Malformed(cause) => write!(f, "control line: not a control message: {cause}"),
        }
    }
}

impl core::error::Error for ControlError {}

impl Control {
    /// Reads one line, with or without its newline. Returns none for a message of a later version, which is ignored.
    ///
    /// # Errors
    /// The line is too long or malformed.
    pub fn parse(line: &[u8]) -> Result<Option<Self>, ControlError> {
        if line.len() > CONTROL_LINE_MAX + usize::from(line.ends_with(b"\n")) {
            return Err(ControlError::TooLong);
        }
        // serde would also accept an array of the fields in order; the protocol does not allow it.
        if !line.trim_ascii_start().starts_with(b"{") {
            return Err(ControlError::Malformed("expected a JSON object".to_string()));
        }
        let line: Line = serde_json::from_slice(line)
            .map_err(|error| ControlError::Malformed(unquoted(&error.to_string())))?;
        Ok(line
            .hello
            .map(Self::Hello)
            .or(line.credit.map(Self::Credit))
            .or(line.position.map(Self::Position))
            .or(line.session.map(Self::Session))
            .or(line.streams.map(Self::Streams))
            .or(line.lane.map(Self::Lane))
            .or(line.ping.map(Self::Ping))
            .or(line.pong.map(Self::Pong))
            .or(line.keys.map(Self::Keys))
            .or(line.upgrade.map(Self::Upgrade))
            .or(line.log.map(Self::Log))
            .or(line.bye.map(Self::Bye)))
    }

    /// Appends the message and its newline to `out`.
    pub fn write_line(&self, out: &mut Vec<u8>) {
        // Serialising these types into memory can't fail. If that changes, the whole line is left out, never a part.
        if let Ok(mut line) = serde_json::to_vec(self) {
            out.append(&mut line);
            out.push(b'\n');
        }
    }
}

/// Splits a byte stream into control messages, with bounded memory.
#[derive(Debug, Default)]
pub struct Lines {
    partial: Vec<u8>,
}

impl Lines {
    /// Takes received bytes, and calls `each` for every complete message.
    ///
    /// # Errors
    /// A line is too long or malformed. The stream can't recover, so the connection must end.
    pub fn feed(&mut self, mut data: &[u8], mut each: impl FnMut(Control)) -> Result<(), ControlError> {
        while let Some(end) = data.iter().position(|&byte| byte == b'\n') {
            let (line, rest) = data.split_at(end);
            data = rest.get(1..).unwrap_or_default();
            let message = if self.partial.is_empty() {
                parse_line(line)?
            } else {
                self.keep(line)?;
                let message = parse_line(&self.partial)?;
                self.partial.clear();
                message
            };
            if let Some(message) = message {
                each(message);
            }
        }
        self.keep(data)
    }

    fn keep(&mut self, data: &[u8]) -> Result<(), ControlError> {
        if self.partial.len() + data.len() > CONTROL_LINE_MAX {
            return Err(ControlError::TooLong);
        }
        self.partial.extend_from_slice(data);
        Ok(())
    }
}

fn parse_line(line: &[u8]) -> Result<Option<Control>, ControlError> {
    // Checked before trimming, so that the result does not depend on how the bytes were split.
    if line.len() > CONTROL_LINE_MAX {
        return Err(ControlError::TooLong);
    }
    let line = line.trim_ascii();
    if line.is_empty() { Ok(None) } else { Control::parse(line) }
}
