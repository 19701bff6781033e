//! The interface between tunnels and the transport: a link opens named streams, and delivers those of the peer.

use std::future::Future;

use bytes::Bytes;
use secure_comms_protocol::{Refusal, TunnelName};

use crate::flow::{Flow, StreamError};

/// Event on the receiving half of a stream.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// Bytes, in the order in which the peer sent them.
    Data(Bytes),
    /// The other end sends no more bytes; it may still receive.
    Eof,
    /// The other end has closed the stream.
    Close,
}

/// The receiving half of a stream.
pub trait Receiver: Send + 'static {
    /// Waits for the next event; none once the stream or its connection is gone. Cancellation safe.
    fn recv(&mut self) -> impl Future<Output = Option<Event>> + Send;
}

/// Error: the connection of the stream is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gone;

/// The sending half of a stream.
///
/// A peer that stops reading can block every method for as long as the connection lives, so await them together with
/// the stream's end or a timeout. Dropping the sender without [`Sender::close`] closes the stream too.
pub trait Sender: Send + Sync + 'static {
    /// Sends one message of at most [`secure_comms_protocol::limits::MESSAGE_MAX`] bytes.
    ///
    /// # Errors
    /// The connection is gone.
    fn send(&self, data: Bytes) -> impl Future<Output = Result<(), Gone>> + Send;
    /// Ends our direction of the stream: we send no more.
    ///
    /// # Errors
    /// The connection is gone.
    fn eof(&self) -> impl Future<Output = Result<(), Gone>> + Send;
    /// Closes the stream in both directions.
    ///
    /// # Errors
    /// The connection is gone.
    fn close(&self) -> impl Future<Output = Result<(), Gone>> + Send;
}

/// A stream that both ends have agreed on.
#[derive(Debug)]
pub struct Stream<R, S> {
    /// Receiving half.
    pub receiver: R,
    /// Sending half.
    pub sender: S,
    /// Flow control of the stream.
    pub flow: Flow,
}

/// Why a stream was not opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OpenError {
    /// The other end refused the stream; a retry will not help.
    Refused(String),
    /// One of the ends has no place for another stream. Streams that end free some, so a later retry may help.
    Full,
    /// The connection is gone; a new one may be opened.
    LinkGone,
}

impl From<StreamError> for OpenError {
    fn from(error: StreamError) -> Self {
        match error {
            StreamError::TooMany => Self::Full,
            StreamError::BadId(_) => Self::Refused(error.to_string()),
            StreamError::Gone => Self::LinkGone,
        }
    }
}

/// A connection on which named streams can be opened.
pub trait Link: Clone + Send + Sync + 'static {
    /// Receiving half of its streams.
    type Receiver: Receiver;
    /// Sending half of its streams.
    type Sender: Sender;
    /// Opens a stream to the other end's outbound `name`. If the future is dropped, a stream that the other end
    /// confirms later is closed.
    ///
    /// # Errors
    /// The other end refused, or the connection is gone.
    fn open(
        &self,
        name: &TunnelName,
    ) -> impl Future<Output = Result<Stream<Self::Receiver, Self::Sender>, OpenError>> + Send;
    /// Waits while no connection is there to open a stream of this tunnel on, as in a session between two connections. Returns at
    /// once if the link is gone. Cancellation safe.
    fn ready(&self, name: &TunnelName) -> impl Future<Output = ()> + Send {
        let _ = name;
        std::future::ready(())
    }
    /// Whether the connection is known to be gone.
    fn is_gone(&self) -> bool;
}

/// A stream that the other end asks to open.
pub trait Incoming: Send + 'static {
    /// Receiving half of the stream.
    type Receiver: Receiver;
    /// Sending half of the stream.
    type Sender: Sender;
    /// Confirms the stream, and returns its halves.
    fn accept(self) -> impl Future<Output = (Self::Receiver, Self::Sender)> + Send;
    /// Refuses the stream.
    fn refuse(self, refusal: Refusal) -> impl Future<Output = ()> + Send;
}
