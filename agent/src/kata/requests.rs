//! The requests to the kata agent, frame by frame, without I/O.
//!
//! Frames that are not edited pass as slices of the messages they came in. Of a request only the beginning is read, and kept
//! until its service and method are known. Requests that are edited are assembled first.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::sync::Arc;

use bytes::{Buf, Bytes, BytesMut};
use secure_comms_protocol::limits::TTRPC_DATA_MAX;
use secure_comms_protocol::volumes::Request as VolumesRequest;
use tokio::time::{Duration, Instant};

use super::budget::{Budget, Room};
use super::edit::{self, Edited, Method, Mounts, Verdict, recognise};
use super::frame::{FrameError, HEADER, Header, REQUEST, Scanner};
use super::podvm_volumes::PodvmVolumes;
use super::protobuf::Malformed;
use super::reply::RequestRefusal;

/// Bytes of a request that are searched for its service and method. Those of the edited requests take 36.
const BEGINNING: usize = 64;

/// Longest message of which a part is kept, in bytes.
const KEPT_MESSAGE_MAX: usize = 1024;

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
    /// What `podvm-volumes` must have done first.
    pub volumes: Option<VolumesRequest>,
    /// Mounts to wait for.
    pub mounts: Mounts,
    /// The end of the request's own timeout, if it has one.
    pub deadline: Option<Instant>,
    /// Its room in the budget of the connection.
    pub(super) room: Room,
}

impl Held {
    /// The request at the time when it passes: with what is left of its timeout, so that the kata agent does not work on it after
    /// the runtime has given up.
    pub(super) fn passing(self) -> Out {
        let Self { stream, frame, volumes: _, mounts: _, deadline, room } = self;
        let Some(deadline) = deadline else { return Out::Pass(room.bind(frame)) };
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Out::Refuse { stream, refusal: RequestRefusal::TimedOut };
        }
        match with_timeout(&frame, left) {
            Ok(frame) => Out::Pass(room.bind(frame)),
            Err(refusal) => Out::Refuse { stream, refusal },
        }
    }
}

fn with_timeout(frame: &[u8], left: Duration) -> Result<Bytes, RequestRefusal> {
    let Some((header, request)) = frame.split_first_chunk() else { return Ok(Bytes::new()) };
    // It was parsed when it came, and then edited.
    let header = Header::parse(*header).map_err(|_| Malformed::Truncated)?;
    Ok(whole(header, &edit::with_timeout(request, left)?))
}

fn whole(header: Header, data: &[u8]) -> Bytes {
    let mut frame = BytesMut::with_capacity(HEADER + data.len());
    frame.extend_from_slice(&Header { length: data.len(), ..header }.to_bytes());
    frame.extend_from_slice(data);
    frame.freeze()
}

/// How the current frame is treated.
#[derive(Clone, Copy, Debug)]
enum FrameState {
    Unknown,
    Pass,
    Assemble,
    /// It is too long, and was refused: its bytes are dropped, so that the next frame is found.
    Discard,
}

/// What a connection was used for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// `CreateSandbox`: this is the one connection of a pod's runtime.
    pub sandbox: bool,
    /// `DestroySandbox`: the pod has ended, so the connection may.
    pub destroyed: bool,
}

/// The beginning of a request to destroy the sandbox, as every encoder writes it.
const DESTROY_SANDBOX: &[u8] = b"\x0a\x11grpc.AgentService\x12\x0eDestroySandbox";

/// The requests of one connection.
#[derive(Debug)]
pub struct Requests {
    namespace: Option<Arc<str>>,
    volumes: PodvmVolumes,
    scanner: Scanner,
    state: FrameState,
    header: Header,
    /// The beginning of a request, and how much of it there is.
    beginning: [u8; BEGINNING],
    known: usize,
    /// Pieces of the current frame from earlier messages, while its state is unknown.
    kept: Vec<Bytes>,
    /// The current frame, while it is assembled, and its room.
    frame: BytesMut,
    room: Room,
    budget: Budget,
    seen: Seen,
    /// Released requests that wait for the end of the current frame.
    ready: VecDeque<Held>,
}

impl Requests {
    /// The requests of a new stream, the only one of its connection. Containers join the network namespace at this path.
    pub fn new(namespace: Option<Arc<str>>) -> Self {
        Self::within(namespace, PodvmVolumes::default(), Budget::default())
    }

    /// The requests of a new stream, within the budget of its connection.
    pub(super) fn within(namespace: Option<Arc<str>>, volumes: PodvmVolumes, budget: Budget) -> Self {
        Self {
            namespace,
            volumes,
            budget,
            room: Room::default(),
            scanner: Scanner::default(),
            state: FrameState::Unknown,
            header: Header { length: 0, stream: 0, kind: 0, flags: 0 },
            beginning: [0; BEGINNING],
            known: 0,
            kept: Vec::new(),
            frame: BytesMut::new(),
            seen: Seen::default(),
            ready: VecDeque::new(),
        }
    }

    /// Reads a message of the stream.
    ///
    /// # Errors
    /// The stream does not consist of ttrpc frames.
    pub fn take(&mut self, mut message: Bytes, out: &mut impl FnMut(Out)) -> Result<(), FrameError> {
        let length = message.len();
        // The bytes before `begin` pass; those from `begin` to `at` belong to the current frame.
        let (mut begin, mut at) = (0, 0);
        while let Some(rest) = message.get(at..).filter(|rest| !rest.is_empty()) {
            match self.state {
                FrameState::Unknown => {
                    let (used, state) = self.classify(rest)?;
                    at += used;
                    self.state = state;
                    match state {
                        FrameState::Unknown => {}
                        FrameState::Pass => self.kept.drain(..).for_each(|piece| out(Out::Pass(piece))),
                        FrameState::Assemble => {
                            pass(message.split_to(begin), out);
                            let last = message.split_to(at - begin);
                            (begin, at) = (0, 0);
                            if let Err(refusal) = self.assemble(&last) {
                                self.state = FrameState::Discard;
                                self.kept.clear();
                                out(Out::Refuse { stream: self.header.stream, refusal });
                            }
                        }
                        FrameState::Discard => {
                            pass(message.split_to(begin), out);
                            message.advance(at - begin);
                            self.kept.clear();
                            (begin, at) = (0, 0);
                            // At once: the runtime need not wait until it has sent what is dropped.
                            let refusal = RequestRefusal::FrameTooLong(self.header.length);
                            out(Out::Refuse { stream: self.header.stream, refusal });
                        }
                    }
                }
                FrameState::Pass => at += self.scanner.advance(rest)?.0,
                FrameState::Assemble => {
                    let (used, _) = self.scanner.advance(rest)?;
                    self.frame.extend_from_slice(&message.split_to(used));
                }
                FrameState::Discard => {
                    let (used, _) = self.scanner.advance(rest)?;
                    message.advance(used);
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
                self.ready.drain(..).for_each(|held| out(held.passing()));
            }
            begin = at;
        }
        if matches!(self.state, FrameState::Unknown) {
            let unknown = message.split_off(begin);
            if !unknown.is_empty() {
                // Of a large message a copy of these few bytes: a part of it would keep the whole in memory.
                let is_small = length <= KEPT_MESSAGE_MAX;
                self.kept.push(if is_small { unknown } else { Bytes::copy_from_slice(&unknown) });
            }
        }
        pass(message, out);
        Ok(())
    }

    /// Reads more of a frame whose state is unknown.
    fn classify(&mut self, rest: &[u8]) -> Result<(usize, FrameState), FrameError> {
        let mut used = 0;
        if self.scanner.left() == 0 {
            let header;
            (used, header) = self.scanner.advance(rest)?;
            let Some(header) = header else { return Ok((used, FrameState::Unknown)) };
            (self.header, self.known) = (header, 0);
            if header.is_too_long() {
                return Ok((used, FrameState::Discard));
            }
            if header.kind != REQUEST {
                return Ok((used, FrameState::Pass));
            }
        }
        let rest = rest.iter().skip(used).take(self.scanner.left());
        let room = self.beginning.iter_mut().skip(self.known);
        let more = rest.zip(room).map(|(from, to)| *to = *from).count();
        self.scanner.skip(more);
        self.known += more;
        let beginning = self.beginning.get(..self.known).unwrap_or_default();
        let whole = self.known == BEGINNING || self.scanner.left() == 0;
        let state = match recognise(beginning, whole) {
            Verdict::More => FrameState::Unknown,
            Verdict::Pass => FrameState::Pass,
            // Where nothing is to be unmounted it passes whatever the connection holds.
            Verdict::Assemble if beginning.starts_with(DESTROY_SANDBOX) && !self.volumes.is_in_use() => {
                self.seen.destroyed = true;
                FrameState::Pass
            }
            Verdict::Assemble => FrameState::Assemble,
        };
        Ok((used + more, state))
    }

    /// Starts to assemble a frame from the pieces that were kept, and `last`.
    ///
    /// # Errors
    /// The connection has no room for it.
    fn assemble(&mut self, last: &[u8]) -> Result<(), RequestRefusal> {
        let bytes = HEADER + self.header.length;
        self.room = self.budget.room(bytes).ok_or(RequestRefusal::TooMany)?;
        self.state = FrameState::Assemble;
        self.frame = BytesMut::with_capacity(bytes);
        self.kept.drain(..).for_each(|piece| self.frame.extend_from_slice(&piece));
        self.frame.extend_from_slice(last);
        Ok(())
    }

    /// Edits the assembled frame, which is complete.
    fn finish(&mut self) -> Out {
        let (stream, frame) = (self.header.stream, std::mem::take(&mut self.frame).freeze());
        match self.edit(stream, frame) {
            Ok(held) if held.mounts.sources.is_empty() && held.volumes.is_none() => {
                Out::Pass(held.room.bind(held.frame))
            }
            Ok(held) => Out::Hold(held),
            Err(refusal) => Out::Refuse { stream, refusal },
        }
    }

    fn edit(&mut self, stream: u32, frame: Bytes) -> Result<Held, RequestRefusal> {
        let room = std::mem::take(&mut self.room);
        let data = frame.get(HEADER..).unwrap_or_default();
        let Edited { request, volumes, mounts, method, timeout } =
            edit::request(data, self.namespace.as_deref())?;
        self.seen.sandbox |= method == Some(Method::CreateSandbox);
        self.seen.destroyed |= method == Some(Method::DestroySandbox);
        // A timeout beyond what a clock can hold is none.
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        if request.len() > TTRPC_DATA_MAX {
            return Err(RequestRefusal::TooLong(data.len()));
        }
        let frame = match request {
            Cow::Borrowed(_) => frame,
            Cow::Owned(request) => whole(self.header, &request),
        };
        Ok(Held { stream, frame, volumes, mounts, deadline, room })
    }

    /// What has passed or was edited so far.
    pub fn seen(&self) -> Seen {
        self.seen
    }

    /// Releases a held request. It passes at the next frame boundary, from [`Requests::take`] or [`Requests::due`], if its timeout
    /// has not ended by then.
    pub fn release(&mut self, held: Held) {
        self.ready.push_back(held);
    }

    /// Drops released requests; returns how many there were.
    pub fn drop_released(&mut self) -> usize {
        self.ready.drain(..).count()
    }

    /// Whether released requests wait for a frame boundary.
    pub fn has_released(&self) -> bool {
        !self.ready.is_empty()
    }

    /// A released request, if the stream is at a frame boundary.
    pub fn due(&mut self) -> Option<Out> {
        if self.scanner.at_boundary() { self.ready.pop_front().map(Held::passing) } else { None }
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
