//! The requests to the kata agent, frame by frame, without I/O.
//!
//! Frames that are not edited pass as slices of the messages they came in. Of a request only the beginning is read, and kept
//! until its service and method are known. Requests that are edited are assembled first.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use secure_comms_protocol::limits::TTRPC_DATA_MAX;

use super::edit::{self, Edited, Mounts, Verdict, recognise};
use super::frame::{FrameError, HEADER, Header, REQUEST, Scanner};
use super::reply::RequestRefusal;

/// Bytes of a request that are searched for its service and method. Those of the edited requests take 36.
const BEGINNING: usize = 64;

/// The result for a part of the stream.
#[derive(Debug)]
pub enum Out {
    /// Pass these bytes on.
    Pass(Bytes),
    /// Hold this request until [`Requests::release`].
    Hold(Held),
    /// Refuse this request.
    Refuse {
        /// Stream id of the request.
        stream: u32,
        /// Reason, for the client.
        refusal: RequestRefusal,
    },
}

/// A held request.
#[derive(Debug)]
pub struct Held {
    /// Stream id of the request.
    pub stream: u32,
    /// The edited frame.
    pub frame: Bytes,
    /// Mounts to wait for.
    pub mounts: Mounts,
}

/// How the current frame is treated.
#[derive(Clone, Copy, Debug)]
enum FrameState {
    Unknown,
    Pass,
    Assemble,
}

/// The requests of one connection.
#[derive(Debug)]
pub struct Requests {
    namespace: Option<Arc<str>>,
    scanner: Scanner,
    state: FrameState,
    header: Header,
    /// The beginning of a request, and how much of it there is.
    beginning: [u8; BEGINNING],
    known: usize,
    /// Pieces of the current frame from earlier messages, while its state is unknown.
    kept: Vec<Bytes>,
    /// The current frame, while it is assembled.
    frame: BytesMut,
    /// Released frames that wait for the end of the current one.
    ready: VecDeque<Bytes>,
}

impl Requests {
    /// The requests of a new connection. Containers join the network namespace at this path.
    pub fn new(namespace: Option<Arc<str>>) -> Self {
        Self {
            namespace,
            scanner: Scanner::default(),
            state: FrameState::Unknown,
            header: Header { length: 0, stream: 0, kind: 0, flags: 0 },
            beginning: [0; BEGINNING],
            known: 0,
            kept: Vec::new(),
            frame: BytesMut::new(),
            ready: VecDeque::new(),
        }
    }

    /// Reads a message of the stream.
    ///
    /// # Errors
    /// The stream does not consist of ttrpc frames.
    pub fn take(&mut self, mut message: Bytes, out: &mut impl FnMut(Out)) -> Result<(), FrameError> {
        // The bytes before `begin` pass; those from `begin` to `at` belong to the current frame.
        let (mut begin, mut at) = (0, 0);
        while let Some(rest) = message.get(at..).filter(|rest| !rest.is_empty()) {
            match self.state {
                FrameState::Unknown => {
                    let (used, verdict) = self.classify(rest)?;
                    at += used;
                    match verdict {
                        Verdict::More => {}
                        Verdict::Pass => {
                            self.kept.drain(..).for_each(|piece| out(Out::Pass(piece)));
                            self.state = FrameState::Pass;
                        }
                        Verdict::Assemble => {
                            pass(message.split_to(begin), out);
                            self.assemble(&message.split_to(at - begin));
                            (begin, at) = (0, 0);
                        }
                    }
                }
                FrameState::Pass => at += self.scanner.advance(rest)?.0,
                FrameState::Assemble => {
                    let (used, _) = self.scanner.advance(rest)?;
                    self.frame.extend_from_slice(&message.split_to(used));
                }
            }
            if !self.scanner.at_boundary() || matches!(self.state, FrameState::Unknown) {
                continue;
            }
            if matches!(std::mem::replace(&mut self.state, FrameState::Unknown), FrameState::Assemble) {
                out(self.finish());
            }
            if !self.ready.is_empty() {
                pass(message.split_to(at), out);
                at = 0;
                self.ready.drain(..).for_each(|frame| out(Out::Pass(frame)));
            }
            begin = at;
        }
        if matches!(self.state, FrameState::Unknown) {
            let unknown = message.split_off(begin);
            if !unknown.is_empty() {
                self.kept.push(unknown);
            }
        }
        pass(message, out);
        Ok(())
    }

    /// Reads more of a frame whose state is unknown.
    fn classify(&mut self, rest: &[u8]) -> Result<(usize, Verdict), FrameError> {
        let mut used = 0;
        if self.scanner.left() == 0 {
            let header;
            (used, header) = self.scanner.advance(rest)?;
            let Some(header) = header else { return Ok((used, Verdict::More)) };
            if header.kind != REQUEST {
                return Ok((used, Verdict::Pass));
            }
            (self.header, self.known) = (header, 0);
        }
        let rest = rest.iter().skip(used).take(self.scanner.left());
        let room = self.beginning.iter_mut().skip(self.known);
        let more = rest.zip(room).map(|(from, to)| *to = *from).count();
        self.scanner.skip(more);
        self.known += more;
        let beginning = self.beginning.get(..self.known).unwrap_or_default();
        let whole = self.known == BEGINNING || self.scanner.left() == 0;
        Ok((used + more, recognise(beginning, whole)))
    }

    /// Starts to assemble a frame from the pieces that were kept, and `last`.
    fn assemble(&mut self, last: &[u8]) {
        self.state = FrameState::Assemble;
        self.frame = BytesMut::with_capacity(HEADER + self.header.length);
        self.kept.drain(..).for_each(|piece| self.frame.extend_from_slice(&piece));
        self.frame.extend_from_slice(last);
    }

    /// Edits the assembled frame, which is complete.
    fn finish(&mut self) -> Out {
        let (stream, frame) = (self.header.stream, std::mem::take(&mut self.frame).freeze());
        match self.edit(frame) {
            Ok((frame, mounts)) if mounts.sources.is_empty() => Out::Pass(frame),
            Ok((frame, mounts)) => Out::Hold(Held { stream, frame, mounts }),
            Err(refusal) => Out::Refuse { stream, refusal },
        }
    }

    fn edit(&self, frame: Bytes) -> Result<(Bytes, Mounts), RequestRefusal> {
        let data = frame.get(HEADER..).unwrap_or_default();
        let Edited { request, mounts } = edit::request(data, self.namespace.as_deref())?;
        let Cow::Owned(request) = request else { return Ok((frame, mounts)) };
        if request.len() > TTRPC_DATA_MAX {
            return Err(RequestRefusal::TooLong(data.len()));
        }
        let mut edited = BytesMut::with_capacity(HEADER + request.len());
        edited.extend_from_slice(&Header { length: request.len(), ..self.header }.to_bytes());
        edited.extend_from_slice(&request);
        Ok((edited.freeze(), mounts))
    }

    /// Releases a held request. It passes at the next frame boundary, from [`Requests::take`] or [`Requests::due`].
    pub fn release(&mut self, frame: Bytes) {
        self.ready.push_back(frame);
    }

    /// Whether released requests wait for a frame boundary.
    pub fn has_released(&self) -> bool {
        !self.ready.is_empty()
    }

    /// A released request, if the stream is at a frame boundary.
    pub fn due(&mut self) -> Option<Bytes> {
        if self.scanner.at_boundary() { self.ready.pop_front() } else { None }
    }

    /// Checks that the stream may end here.
    ///
    /// # Errors
    /// The stream ends within a frame.
    pub fn end(&self) -> Result<(), FrameError> {
        self.scanner.end()
    }
}

fn pass(piece: Bytes, out: &mut impl FnMut(Out)) {
    if !piece.is_empty() {
        out(Out::Pass(piece));
    }
}

#[cfg(test)]
#[path = "requests_tests.rs"]
mod tests;
