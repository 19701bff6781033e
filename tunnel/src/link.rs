//! What stands between tunnels and the transport: a link opens named streams and is asked for them.

use std::fmt;
use std::future::Future;

use bytes::Bytes;
use secure_comms_protocol::name::TUNNEL_NAME_MAX;
use secure_comms_protocol::{PhaseName, TunnelName};

use crate::flow::Flow;

/// What arrives on a stream.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// Bytes, in order.
    Data(Bytes),
    /// The other end sends no more; it may still receive.
    Eof,
    /// The other end has closed the stream.
    Close,
}

/// The receiving half of a stream.
pub trait Receiver: Send + 'static {
    /// The next event; none once the stream or its connection is gone.
    fn recv(&mut self) -> impl Future<Output = Option<Event>> + Send;
}

/// The connection of a stream is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gone;

/// The sending half of a stream. No method may be awaited alone: a peer that stops reading holds them up for
/// as long as it lives. Dropped without a [`Sender::close`] (its task was cancelled), it closes the stream too.
pub trait Sender: Send + Sync + 'static {
    /// Sends bytes, at most [`secure_comms_protocol::limits::MESSAGE_MAX`].
    fn send(&self, data: Bytes) -> impl Future<Output = Result<(), Gone>> + Send;
    /// Says that we send no more.
    fn eof(&self) -> impl Future<Output = Result<(), Gone>> + Send;
    /// Closes the stream both ways.
    fn close(&self) -> impl Future<Output = Result<(), Gone>> + Send;
}

/// A stream that both ends have agreed on.
#[derive(Debug)]
pub struct Stream<R, S> {
    /// What arrives.
    pub receiver: R,
    /// What we send.
    pub sender: S,
    /// Its share of the connection's flow control.
    pub flow: Flow,
}

/// Why a stream was not opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OpenError {
    /// The other end said no; trying again will not help.
    Refused(String),
    /// The connection is gone; another may come.
    LinkGone,
}

/// A connection to the other end on which named streams can be opened.
pub trait Link: Clone + Send + Sync + 'static {
    /// The receiving half of its streams.
    type Receiver: Receiver;
    /// The sending half of its streams.
    type Sender: Sender;
    /// Opens a stream to the other end's outbound `name`. Dropping the future gives up: a stream that is confirmed
    /// later is closed.
    fn open(
        &self,
        name: &TunnelName,
    ) -> impl Future<Output = Result<Stream<Self::Receiver, Self::Sender>, OpenError>> + Send;
    /// Whether the connection is known to be gone.
    fn is_gone(&self) -> bool;
}

/// What kind of refusal the other end hears.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusalKind {
    /// The name or the phase is not allowed (RFC 4254 5.1 `SSH_OPEN_ADMINISTRATIVELY_PROHIBITED`).
    Prohibited,
    /// The server could not be reached (RFC 4254 5.1 `SSH_OPEN_CONNECT_FAILED`).
    ConnectFailed,
    /// Too many streams are open (RFC 4254 5.1 `SSH_OPEN_RESOURCE_SHORTAGE`).
    Shortage,
}

/// A refusal: names the tunnel, the phase and the cause.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Its kind.
    pub kind: RefusalKind,
    /// The text that the other end hears.
    pub reason: String,
}

impl Refusal {
    /// A refusal of the tunnel `name` in `phase`.
    pub fn new(kind: RefusalKind, name: &str, phase: PhaseName, cause: impl fmt::Display) -> Self {
        // What the other end asked for may be as long as a message, and goes into our log.
        let name: String = name.chars().take(TUNNEL_NAME_MAX).collect();
        Self { kind, reason: format!("tunnel {}, {phase} phase: {cause}", name.escape_default()) }
    }
}

/// A stream that the other end asks for.
pub trait Incoming: Send + 'static {
    /// The receiving half of the stream.
    type Receiver: Receiver;
    /// The sending half of the stream.
    type Sender: Sender;
    /// Confirms the stream.
    fn accept(self) -> impl Future<Output = (Self::Receiver, Self::Sender)> + Send;
    /// Refuses it.
    fn refuse(self, refusal: Refusal) -> impl Future<Output = ()> + Send;
}
