//! The control channel: one JSON object with one key a line, both ways.

use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;

use serde::{Deserialize, Serialize};

use crate::hello::Hello;
use crate::limits::CONTROL_LINE_MAX;

/// How the agent's attempts to get its keys go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyProgress {
    /// The number of attempts so far, from 1.
    pub attempt: u64,
    /// Why the last attempt failed; none once the keys are here.
    pub error: Option<String>,
}

/// Credit that goes back to the sender of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credit {
    /// The stream: the originator port of its channel open.
    pub stream: u32,
    /// The cost of what the receiver's socket has taken, in bytes.
    pub bytes: u32,
}

/// Why a side ends the connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bye {
    /// For the log of the other side.
    pub reason: String,
}

/// A message with no content.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Empty {}

/// A control message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Control {
    /// The first message each way.
    Hello(Hello),
    /// Agent to adaptor: how getting the keys goes.
    Keys(KeyProgress),
    /// Agent to adaptor: the keys are here; this connection ends, come back as `kubernetes`.
    Upgrade(Empty),
    /// Credit for a stream.
    Credit(Credit),
    /// A probe, to be answered by a pong with the same number.
    Ping(u64),
    /// The answer to a ping.
    Pong(u64),
    /// The connection ends.
    Bye(Bye),
}

/// The shape of a line on the way in: keys we do not know are ignored, so that versions can differ.
#[derive(Deserialize)]
struct Line {
    hello: Option<Hello>,
    keys: Option<KeyProgress>,
    upgrade: Option<Empty>,
    credit: Option<Credit>,
    ping: Option<u64>,
    pong: Option<u64>,
    bye: Option<Bye>,
}

/// Why a line is not a control message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ControlError {
    /// Longer than [`CONTROL_LINE_MAX`].
    TooLong,
    /// Not a JSON object of the expected shape.
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
    /// Reads one line (without or with its newline). `None`: a message of a later version, to be ignored.
    pub fn parse(line: &[u8]) -> Result<Option<Self>, ControlError> {
        if line.len() > CONTROL_LINE_MAX + usize::from(line.ends_with(b"\n")) {
            return Err(ControlError::TooLong);
        }
        // serde would take an array of the fields in order as well; the protocol does not.
        if !line.trim_ascii_start().starts_with(b"{") {
            return Err(ControlError::Malformed("expected a JSON object".to_string()));
        }
        let line: Line =
            serde_json::from_slice(line).map_err(|error| ControlError::Malformed(error.to_string()))?;
        Ok(line
            .hello
            .map(Self::Hello)
            .or(line.credit.map(Self::Credit))
            .or(line.ping.map(Self::Ping))
            .or(line.pong.map(Self::Pong))
            .or(line.keys.map(Self::Keys))
            .or(line.upgrade.map(Self::Upgrade))
            .or(line.bye.map(Self::Bye)))
    }

    /// Appends the message and its newline to `out`.
    pub fn write_line(&self, out: &mut Vec<u8>) {
        // Serialising these types into memory has no way to fail; were one added, the line would be left out
        // whole, never half written.
        if let Ok(mut line) = serde_json::to_vec(self) {
            out.append(&mut line);
            out.push(b'\n');
        }
    }
}

/// Cuts a byte stream into lines of bounded length.
#[derive(Debug, Default)]
pub struct Lines {
    partial: Vec<u8>,
}

impl Lines {
    /// Takes what arrived and calls `each` for every message that is complete.
    ///
    /// # Errors
    /// A line that is too long or malformed: the connection has no way to recover and should end.
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
    // Before the blanks go, so that how the bytes were split never decides whether a line is too long.
    if line.len() > CONTROL_LINE_MAX {
        return Err(ControlError::TooLong);
    }
    let line = line.trim_ascii();
    if line.is_empty() { Ok(None) } else { Control::parse(line) }
}
