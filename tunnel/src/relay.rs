//! The relay: one task for each stream, with three futures in it.
//!
//! *receive* takes every message off the stream at once and queues it, so that a slow socket never holds up the
//! connection. *write_local* writes the queue to the socket and gives credit back. *read_local* waits for credit, then
//! reads the socket and sends. When *receive* sees the stream closed, it ends *read_local* wherever that waits. An
//! interceptor, where a tunnel has one, works in *receive* and in *read_local*.

use std::collections::VecDeque;
use std::future::pending;
use std::io;
use std::pin::Pin;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use secure_comms_protocol::TunnelName;
use secure_comms_protocol::limits::{FLUSH, MESSAGE_MAX};
use tokio::time::timeout;

use crate::budget;
use crate::flow::{Flow, Overrun};
use crate::intercept::{FromServer, InterceptError, Interceptor, PassThrough, ToServer};
use crate::link::{Event, Receiver, Sender, Stream};
use crate::queue::{Ending, Next, Queue};
use crate::socket::Socket;

/// Size of the first read of an idle socket, in bytes; later reads grow with the bytes they find.
const READ_MIN: usize = 2048;

/// Why a stream did not end in good order.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// The local socket failed.
    #[error("the local socket: {0}")]
    Socket(io::Error),
    /// The other end closed the stream before its end, or the connection is gone.
    #[error("the other end closed the stream before its end")]
    Cut,
    /// The other end closed the stream, and the local reader took nothing for [`FLUSH`].
    #[error("the local reader took nothing for {} s after the other end had closed", .0.as_secs())]
    Stalled(Duration),
    /// The peer broke flow control; its connection must end.
    #[error(transparent)]
    Overrun(#[from] Overrun),
    /// The interceptor can't continue after the bytes it has seen.
    #[error("{0}")]
    Intercept(InterceptError),
    /// An end that the interceptor knows to cost something.
    #[error("{fault}; {cost}")]
    Costly {
        /// How the stream ended.
        fault: Box<RelayError>,
        /// What that costs.
        cost: &'static str,
    },
}

// Without `#[from]`, which would make the error a source, too: the text has it already.
impl From<io::Error> for RelayError {
    fn from(error: io::Error) -> Self {
        Self::Socket(error)
    }
}

/// Moves bytes both ways until both ends are done; then closes socket and stream.
///
/// Dropping the future ends both sides as an error does.
///
/// # Errors
/// The stream did not end in good order. The local side then sees a reset, and the other end a close without EOF.
pub async fn relay<R: Receiver, S: Sender>(socket: Socket, stream: Stream<R, S>) -> Result<(), RelayError> {
    relay_through(&PassThrough, socket, stream).await
}

/// Moves bytes as [`relay`] does, with an interceptor between the stream and the server behind `socket`.
///
/// # Errors
/// As [`relay`]; also if the interceptor can't continue.
pub async fn relay_through<I: Interceptor, R: Receiver, S: Sender>(
    interceptor: &I,
    socket: Socket,
    Stream { mut receiver, sender, flow }: Stream<R, S>,
) -> Result<(), RelayError> {
    let queue = Queue::default();
    let ends = Ends { socket: &socket, sender: &sender, flow: &flow, queue: &queue };
    let result = ends.run(interceptor, &mut receiver).await;
    // The local side first: it must not wait until the connection has room for our close.
    match &result {
        Ok(()) => socket.finish(),
        Err(_) => socket.abort(),
    }
    drop(queue);
    tokio::select! {
        _ = sender.close() => {}
        // The connection may wait for us to take messages that still arrive, before it takes our close (D1).
        () = discard(&mut receiver) => {}
        () = flow.gone() => {}
    }
    result
}

/// Takes and drops every message that still arrives; never returns.
async fn discard<R: Receiver>(receiver: &mut R) {
    while receiver.recv().await.is_some() {}
    pending().await
}

/// Logs how a stream ended, unless it ended in good order.
pub fn report(name: &TunnelName, result: Result<(), RelayError>) {
    match result {
        Ok(()) => {}
        Err(error @ RelayError::Overrun(_)) => log::error!("tunnel {name}: {error}"),
        Err(error @ (RelayError::Intercept(_) | RelayError::Costly { .. })) => {
            log::warn!("tunnel {name}: {error}")
        }
        Err(error) => log::debug!("tunnel {name}: {error}"),
    }
}

/// Both ends of one relayed stream, but for the stream's receiving half, which *receive* alone uses.
struct Ends<'a, S> {
    socket: &'a Socket,
    sender: &'a S,
    flow: &'a Flow,
    /// Messages that were received and not yet written to the socket.
    queue: &'a Queue,
}

impl<S: Sender> Ends<'_, S> {
    async fn run<I: Interceptor, R: Receiver>(
        &self,
        interceptor: &I,
        receiver: &mut R,
    ) -> Result<(), RelayError> {
        let (mut to_server, mut from_server) = interceptor.begin();
        let result = self.run_both(&mut to_server, &mut from_server, receiver).await;
        result.map_err(|fault| match to_server.cost() {
            Some(cost) if !matches!(fault, RelayError::Overrun(_)) => {
                RelayError::Costly { fault: Box::new(fault), cost }
            }
            _ => fault,
        })
    }

    async fn run_both<R: Receiver>(
        &self,
        to_server: &mut impl ToServer,
        from_server: &mut impl FromServer,
        receiver: &mut R,
    ) -> Result<(), RelayError> {
        let receive = self.receive(receiver, to_server);
        let write_local = self.write_local();
        let read_local = self.read_local(from_server);
        tokio::pin!(receive, write_local, read_local);
        let (mut all_written, mut all_read) = (false, false);
        while !(all_written && all_read) {
            tokio::select! {
                closed = &mut receive => {
                    closed?;
                    // The other end takes no more from us. Messages that have arrived still go to the socket.
                    if !all_written {
                        self.flush(write_local).await?;
                    }
                    let complete = self.queue.ending() == Some(Ending::Complete);
                    return if complete { Ok(()) } else { Err(RelayError::Cut) };
                }
                done = &mut write_local, if !all_written => {
                    done?;
                    all_written = true;
                }
                done = &mut read_local, if !all_read => {
                    done?;
                    all_read = true;
                }
                // Once read_local has ended, no read would meet the socket's error.
                error = self.socket.failed(), if all_read => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Lets *write_local* finish, as long as the local reader takes bytes within each [`FLUSH`].
    async fn flush(
        &self,
        mut write_local: Pin<&mut impl Future<Output = Result<(), RelayError>>>,
    ) -> Result<(), RelayError> {
        loop {
            let before = self.queue.bytes();
            match timeout(FLUSH, write_local.as_mut()).await {
                Ok(done) => return done,
                Err(_) if self.queue.bytes() < before => {}
                Err(_) => return Err(RelayError::Stalled(FLUSH)),
            }
        }
    }

    /// Queues messages of the stream. Ends once the other end has closed the stream, or the connection is gone.
    async fn receive<R: Receiver>(
        &self,
        receiver: &mut R,
        to_server: &mut impl ToServer,
    ) -> Result<(), RelayError> {
        let mut ended = false;
        loop {
            if (ended || to_server.is_finished()) && !to_server.has_pending() {
                self.queue.end(Ending::Complete);
            }
            if !self.flow.has_credit() {
                // Without credits the only limit is to stop taking messages, which holds up that peer's connection.
                tokio::select! {
                    biased;
                    () = self.flow.window_only_room() => {}
                    () = self.flow.gone() => {}
                }
            }
            let has_pending = to_server.has_pending();
            let event = tokio::select! {
                biased;
                released = to_server.next_released(), if has_pending => {
                    if let Some(piece) = released.map_err(RelayError::Intercept)? {
                        self.queue.push(piece, 0);
                    }
                    continue;
                }
                event = receiver.recv() => event,
            };
            match event {
                Some(Event::Data(data)) => self.on_data(data, to_server)?,
                Some(Event::Eof) => {
                    to_server.ended().map_err(RelayError::Intercept)?;
                    ended = true;
                }
                Some(Event::Close) | None => break,
            }
        }
        // No effect after an EOF: the first ending counts.
        self.queue.end(Ending::Cut);
        Ok(())
    }

    /// Queues the pieces that the interceptor makes of one message. The last piece carries the message's whole cost; a
    /// message that the interceptor keeps leaves an empty piece, so that its cost has a place in the queue.
    fn on_data(&self, data: Bytes, to_server: &mut impl ToServer) -> Result<(), RelayError> {
        let cost = self.flow.arrived(data.len())?;
        let mut last = None;
        let mut out = |piece| {
            if let Some(before) = last.replace(piece) {
                self.queue.push(before, 0);
            }
        };
        to_server.on_message(data, &mut out).map_err(RelayError::Intercept)?;
        self.queue.push(last.unwrap_or_default(), cost);
        Ok(())
    }

    /// Writes the queue to the socket. Ends once everything before the queue's end is written.
    async fn write_local(&self) -> Result<(), RelayError> {
        loop {
            match self.queue.write_to(self.socket) {
                Ok(Next::Wrote(cost)) => {
                    self.flow.consumed(cost);
                    budget::moved(usize::try_from(cost).unwrap_or(usize::MAX)).await;
                }
                Ok(Next::Wait) => self.queue.changed().await,
                Ok(Next::End(Ending::Complete)) => return Ok(self.socket.shutdown_write()?),
                // The caller resets the socket, so that the local side sees that bytes are missing.
                Ok(Next::End(Ending::Cut)) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.socket.writable().await?,
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Sends the bytes of the socket and the pieces that the interceptor injects. Ends with the socket's end of file.
    async fn read_local(&self, from_server: &mut impl FromServer) -> Result<(), RelayError> {
        let mut read_size = READ_MIN;
        // Pieces that are to be sent before anything else is read.
        let mut pieces = VecDeque::new();
        loop {
            let credit = tokio::select! {
                biased;
                credit = self.flow.ready() => credit,
                error = self.socket.failed() => return Err(error.into()),
            };
            if pieces.is_empty() {
                pieces.extend(from_server.next_injected());
            }
            if pieces.is_empty() && from_server.is_finished() {
                return self.sender.eof().await.or(Ok(()));
            }
            if pieces.is_empty() {
                match self.read_server(credit, &mut read_size, from_server).await? {
                    Read::Data(data) => {
                        let mut out = |piece: Bytes| {
                            if !piece.is_empty() {
                                pieces.push_back(piece);
                            }
                        };
                        from_server.on_data(data, &mut out).map_err(RelayError::Intercept)?;
                    }
                    Read::Nothing => continue,
                    Read::End => {
                        from_server.ended().map_err(RelayError::Intercept)?;
                        // receive reports a connection that is gone.
                        return self.sender.eof().await.or(Ok(()));
                    }
                }
            }
            let Some(piece) = pieces.front_mut() else { continue };
            let data = piece.split_to(credit.min(piece.len()));
            if piece.is_empty() {
                pieces.pop_front();
            }
            let len = data.len();
            self.flow.spend(len);
            if self.sender.send(data).await.is_err() {
                // receive reports a connection that is gone.
                return pending().await;
            }
            // Otherwise a socket that always has bytes and a link that always has room would keep the thread.
            budget::moved(len).await;
        }
    }

    /// Reads the socket once, at most `credit` bytes, when it is readable.
    async fn read_server(
        &self,
        credit: usize,
        read_size: &mut usize,
        from_server: &mut impl FromServer,
    ) -> Result<Read, RelayError> {
        tokio::select! {
            biased;
            readable = self.socket.readable() => readable?,
            () = from_server.injection_ready() => return Ok(Read::Nothing),
        }
        let max = (*read_size).min(credit).min(from_server.read_limit());
        // Allocated only now: an idle stream holds no buffer.
        let mut data = BytesMut::with_capacity(max);
        match self.socket.try_read(&mut data, max) {
            Ok(0) => return Ok(Read::End),
            Ok(len) if len == *read_size => *read_size = (*read_size * 2).min(MESSAGE_MAX),
            Ok(len) => *read_size = len.next_power_of_two().clamp(READ_MIN, *read_size),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Read::Nothing),
            Err(error) => return Err(error.into()),
        }
        Ok(Read::Data(data.freeze()))
    }
}

/// Result of one read of the socket.
enum Read {
    /// Bytes of the server.
    Data(Bytes),
    /// No bytes yet, or a piece to inject may be ready.
    Nothing,
    /// End of file.
    End,
}
