//! What stands between tunnels and the transport: a link opens named streams and is asked for them.

use std::future::Future;

use bytes::Bytes;
use secure_comms_protocol::{Refusal, TunnelName};

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
