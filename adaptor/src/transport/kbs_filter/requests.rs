//! The requests on one stream to the KBS, byte by byte: which bytes may pass.

use bytes::{Bytes, BytesMut};

use super::head::{self, BODY_MAX, Body, Fault, HEAD_MAX};

/// First bytes of a TLS ClientHello: a handshake record (22) of version 3.x (RFC 8446 5.1), and in it message 1.
const TLS_HEAD: usize = 6;
/// Most digits of a chunk's size.
const CHUNK_DIGITS: usize = 8;

/// Reads the requests of one stream. After a fault no byte passes.
#[derive(Debug, Default)]
pub(super) struct Requests {
    state: State,
    /// The beginning of a head.
    held: BytesMut,
    /// Bytes of the current request's body.
    body: u64,
}

/// What the next byte belongs to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    /// The first bytes of the stream, of which TLS takes six.
    #[default]
    Start,
    /// A head.
    Head(Line),
    /// A body, or the data of a chunk, of which this number of bytes is left.
    Data { left: u64, chunked: bool },
    /// The size of a chunk, of which this number of digits was read.
    ChunkSize { digits: usize, size: u64 },
    /// The LF after a chunk's size.
    ChunkSizeEnd { size: u64 },
    /// The CR and LF after the data of a chunk; after the last chunk, whose data is empty, the end of the body.
    ChunkEnd { lf: bool, last: bool },
    /// TLS: nothing is read.
    Tls,
    /// A request was refused.
    Refused,
}

/// Where in its line a byte of a head is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Line {
    /// The first byte of the head.
    Begin,
    /// The first byte of a further line.
    First,
    /// A further byte.
    Inside,
    /// After a CR; whether the line is empty.
    Cr { empty: bool },
}

/// A request that may not pass, for the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refused {
    pub(super) fault: Fault,
    /// The beginning of its first line, as it was sent.
    pub(super) line: Bytes,
}

impl Requests {
    /// Handles a message, and passes the bytes to `out` that the KBS may see.
    ///
    /// # Errors
    /// A request may not pass. What comes after it is dropped.
    pub(super) fn on_message(
        &mut self,
        mut message: Bytes,
        out: &mut impl FnMut(Bytes),
    ) -> Result<(), Refused> {
        while !message.is_empty() && self.state != State::Refused {
            let result = match self.state {
                State::Start => self.start(&mut message),
                State::Tls => {
                    out(message);
                    return Ok(());
                }
                State::Head(line) => self.head(line, &mut message, out),
                _ => self.body(&mut message, out),
            };
            if let Err(fault) = result {
                self.state = State::Refused;
                let held = std::mem::take(&mut self.held).freeze();
                let end = held.iter().position(|byte| matches!(byte, b'\r' | b'\n')).unwrap_or(held.len());
                return Err(Refused { fault, line: held.slice(..end) });
            }
        }
        Ok(())
    }

    pub(super) fn is_refused(&self) -> bool {
        self.state == State::Refused
    }

    fn start(&mut self, message: &mut Bytes) -> Result<(), Fault> {
        const HANDSHAKE: u8 = 22;
        let first = if self.held.is_empty() { message.first() } else { self.held.first() };
        if first != Some(&HANDSHAKE) {
            self.state = State::Head(Line::Begin);
            return Ok(());
        }
        let missing = TLS_HEAD - self.held.len();
        self.held.extend_from_slice(&message.split_to(missing.min(message.len())));
        match self.held.as_ref() {
            [_, 3, 0..=4, _, _, 1] => {
                // Passed in front of what follows.
                let mut all = std::mem::take(&mut self.held);
                all.extend_from_slice(message);
                *message = all.freeze();
                self.state = State::Tls;
                Ok(())
            }
            held if held.len() < TLS_HEAD => Ok(()),
            _ => Err(Fault::NotHttp),
        }
    }

    /// Takes the bytes of a head from the message, up to its end.
    fn head(
        &mut self,
        mut line: Line,
        message: &mut Bytes,
        out: &mut impl FnMut(Bytes),
    ) -> Result<(), Fault> {
        let room = HEAD_MAX - self.held.len();
        let mut end = None;
        for (index, byte) in message.iter().take(room).enumerate() {
            line = match (line, byte) {
                (Line::Cr { empty: true }, b'\n') => {
                    end = Some(index + 1);
                    break;
                }
                (Line::Cr { empty: false }, b'\n') => Line::First,
                (Line::First, b'\r') => Line::Cr { empty: true },
                (Line::Inside, b'\r') => Line::Cr { empty: false },
                // A line that continues the one before (RFC 9112 5.2), or an empty line in front of a request.
                (Line::First, b' ' | b'\t')
                | (Line::Begin, b'\r')
                | (Line::Cr { .. }, _)
                | (_, b'\n' | 0) => {
                    self.hold(message, index);
                    return Err(Fault::NotHttp);
                }
                (Line::Begin | Line::First | Line::Inside, _) => Line::Inside,
            };
        }
        let Some(end) = end else {
            self.hold(message, message.len().min(room));
            self.state = State::Head(line);
            return if message.is_empty() { Ok(()) } else { Err(Fault::TooLong) };
        };
        // Not copied if the whole head is in this message, as a rule.
        let head = if self.held.is_empty() {
            message.split_to(end)
        } else {
            self.hold(message, end);
            std::mem::take(&mut self.held).freeze()
        };
        match head::read(&head) {
            Ok(body) => self.state = Self::after_head(body),
            Err(fault) => {
                self.held = BytesMut::from(head.as_ref());
                return Err(fault);
            }
        }
        self.body = 0;
        out(head);
        Ok(())
    }

    fn hold(&mut self, message: &mut Bytes, length: usize) {
        self.held.extend_from_slice(&message.split_to(length));
    }

    fn after_head(body: Body) -> State {
        match body {
            Body::Length(0) => State::Head(Line::Begin),
            Body::Length(left) => State::Data { left, chunked: false },
            Body::Chunked => State::ChunkSize { digits: 0, size: 0 },
        }
    }

    /// Passes bytes of a body.
    fn body(&mut self, message: &mut Bytes, out: &mut impl FnMut(Bytes)) -> Result<(), Fault> {
        if let State::Data { left, chunked } = self.state {
            let length = usize::try_from(left).unwrap_or(usize::MAX).min(message.len());
            out(message.split_to(length));
            self.state = match left - length as u64 {
                0 if chunked => State::ChunkEnd { lf: false, last: false },
                0 => State::Head(Line::Begin),
                left => State::Data { left, chunked },
            };
            return Ok(());
        }
        let mut length = 0;
        let result = self.framing(message, &mut length);
        let read = message.split_to(length);
        if !read.is_empty() {
            out(read);
        }
        result
    }

    /// Reads the bytes between the data of chunks; `length` is the number of those that are right.
    fn framing(&mut self, message: &[u8], length: &mut usize) -> Result<(), Fault> {
        for byte in message {
            self.state = match (self.state, byte) {
                (State::ChunkSize { digits, size }, b'\r') if digits > 0 => State::ChunkSizeEnd { size },
                (State::ChunkSize { digits, size }, byte) if digits < CHUNK_DIGITS => {
                    let digit = char::from(*byte).to_digit(16).ok_or(Fault::Length)?;
                    State::ChunkSize { digits: digits + 1, size: size * 16 + u64::from(digit) }
                }
                (State::ChunkSizeEnd { size: 0 }, b'\n') => State::ChunkEnd { lf: false, last: true },
                (State::ChunkSizeEnd { size }, b'\n') => {
                    self.body += size;
                    if self.body > BODY_MAX {
                        return Err(Fault::TooLong);
                    }
                    State::Data { left: size, chunked: true }
                }
                (State::ChunkEnd { lf: false, last }, b'\r') => State::ChunkEnd { lf: true, last },
                (State::ChunkEnd { lf: true, last: false }, b'\n') => State::ChunkSize { digits: 0, size: 0 },
                (State::ChunkEnd { lf: true, last: true }, b'\n') => State::Head(Line::Begin),
                _ => return Err(Fault::Length),
            };
            *length += 1;
            if matches!(self.state, State::Data { .. } | State::Head(_)) {
                break;
            }
        }
        Ok(())
    }
}
