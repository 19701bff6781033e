//! The relay: one task a stream, three futures in it.
//!
//! *drain* takes what arrives off the stream at once and queues it, so that one slow socket never holds up the
//! connection; *deliver* moves the queue into the socket and gives credit back; *collect* waits for credit, then
//! reads the socket and sends. A close seen by *drain* ends *collect* wherever it waits. An interceptor, where a tunnel
//! has one, stands in *drain* and in *collect*.

use std::io;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use secure_comms_protocol::TunnelName;
use secure_comms_protocol::limits::{FLUSH, MESSAGE_MAX};
use tokio::task::coop::consume_budget;
use tokio::time::timeout;

use crate::flow::{Flow, Overrun};
use crate::intercept::{FromServer, InterceptError, Interceptor, PassThrough, ToServer};
use crate::link::{Event, Receiver, Sender, Stream};
use crate::queue::{Ending, Next, Queue};
use crate::socket::Socket;

/// The first read of an idle socket, in bytes; reads grow with what they find.
const READ_MIN: usize = 2048;

/// Why a stream did not end in good order.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// The local socket failed.
    #[error("the local socket: {0}")]
    Socket(#[from] io::Error),
    /// The other end closed the stream before it was done, or the connection is gone.
    #[error("the other end closed the stream before its end")]
    Cut,
    /// The other end closed the stream, and our socket's reader took nothing more for [`FLUSH`].
    #[error("the local reader took nothing for {0:?} after the other end had closed")]
    Stalled(Duration),
    /// The peer broke flow control; its connection must end.
    #[error(transparent)]
    Overrun(#[from] Overrun),
    /// The interceptor can't go on with what it has seen.
    #[error("{0}")]
    Intercept(InterceptError),
}

/// Moves bytes both ways until both ends are done; then socket and stream are closed.
///
/// # Errors
/// Why it ended otherwise. The local side then sees a reset, the other end a close without EOF; so it is too if the
/// future is dropped.
pub async fn relay<R: Receiver, S: Sender>(socket: Socket, stream: Stream<R, S>) -> Result<(), RelayError> {
    relay_through(&PassThrough, socket, stream).await
}

/// The same, with an interceptor between the stream and the server at the other side of `socket`.
///
/// # Errors
/// As [`relay`], and where the interceptor can't go on.
pub async fn relay_through<I: Interceptor, R: Receiver, S: Sender>(
    interceptor: &I,
    socket: Socket,
    stream: Stream<R, S>,
) -> Result<(), RelayError> {
    let Stream { mut receiver, sender, flow } = stream;
    let queue = Queue::default();
    let result = run(interceptor, &socket, &mut receiver, &sender, &flow, &queue).await;
    // First the local side: it must not wait until the connection has room for our close.
    match &result {
        Ok(()) => socket.finish(),
        Err(_) => socket.abort(),
    }
    drop(queue);
    tokio::select! {
        _ = sender.close() => {}
        // The connection may wait for us to take what still arrives, before it takes our close (D1).
        () = discard(&mut receiver) => {}
        () = flow.gone() => {}
    }
    result
}

/// Takes what nobody wants any more, for ever.
async fn discard<R: Receiver>(receiver: &mut R) {
    while receiver.recv().await.is_some() {}
    std::future::pending().await
}

async fn run<I: Interceptor, R: Receiver, S: Sender>(
    interceptor: &I,
    socket: &Socket,
    receiver: &mut R,
    sender: &S,
    flow: &Flow,
    queue: &Queue,
) -> Result<(), RelayError> {
    let (mut to_server, mut from_server) = interceptor.begin();
    let drain = drain(receiver, flow, queue, &mut to_server);
    let deliver = deliver(socket, flow, queue);
    let collect = collect(socket, sender, flow, &mut from_server);
    tokio::pin!(drain, deliver, collect);
    let (mut delivered, mut collected) = (false, false);
    while !(delivered && collected) {
        tokio::select! {
            closed = &mut drain => {
                closed?;
                // Nothing we could still send would arrive; what has arrived still goes out.
                if !delivered {
                    flush(deliver, queue).await?;
                }
                return if queue.ending() == Some(Ending::Complete) { Ok(()) } else { Err(RelayError::Cut) };
            }
            done = &mut deliver, if !delivered => {
                done?;
                delivered = true;
            }
            done = &mut collect, if !collected => {
                done?;
                collected = true;
            }
            // Nobody reads or writes then, to see it.
            error = socket.failed(), if collected => return Err(error.into()),
        }
    }
    Ok(())
}

/// Lets *deliver* finish, as long as the local reader takes something now and then.
async fn flush(
    mut deliver: std::pin::Pin<&mut impl Future<Output = Result<(), RelayError>>>,
    queue: &Queue,
) -> Result<(), RelayError> {
    loop {
        let before = queue.bytes();
        match timeout(FLUSH, deliver.as_mut()).await {
            Ok(done) => return done,
            Err(_) if queue.bytes() < before => {}
            Err(_) => return Err(RelayError::Stalled(FLUSH)),
        }
    }
}

/// Ends once the other end has closed the stream, or the connection is gone.
async fn drain<R: Receiver>(
    receiver: &mut R,
    flow: &Flow,
    queue: &Queue,
    to_server: &mut impl ToServer,
) -> Result<(), RelayError> {
    let mut ended = false;
    loop {
        if ended && !to_server.has_pending() {
            queue.end(Ending::Complete);
        }
        if !flow.has_credit() {
            // Without credits all we can do is to stop taking, which holds up that peer's connection.
            tokio::select! {
                biased;
                () = flow.window_only_room() => {}
                () = flow.gone() => {}
            }
        }
        let holds = to_server.has_pending();
        let event = tokio::select! {
            biased;
            released = to_server.next_released(), if holds => {
                if let Some(piece) = released.map_err(RelayError::Intercept)? {
                    queue.push(piece, 0);
                }
                continue;
            }
            event = receiver.recv() => event,
        };
        match event {
            Some(Event::Data(data)) => {
                let cost = flow.arrived(data.len())?;
                // All that the message costs leaves with its last piece; a place in the queue is left by one kept whole.
                let mut last = None;
                let mut out = |piece| {
                    if let Some(before) = last.replace(piece) {
                        queue.push(before, 0);
                    }
                };
                to_server.on_message(data, &mut out).map_err(RelayError::Intercept)?;
                queue.push(last.unwrap_or_default(), cost);
            }
            Some(Event::Eof) => {
                to_server.ended().map_err(RelayError::Intercept)?;
                ended = true;
            }
            Some(Event::Close) | None => break,
        }
    }
    // After an EOF this changes nothing: all of it is here.
    queue.end(Ending::Cut);
    Ok(())
}

async fn deliver(socket: &Socket, flow: &Flow, queue: &Queue) -> Result<(), RelayError> {
    loop {
        match queue.write_to(socket) {
            Ok(Next::Wrote(cost)) => flow.consumed(cost),
            Ok(Next::Wait) => queue.changed().await,
            Ok(Next::End(Ending::Complete)) => return Ok(socket.shutdown_write()?),
            // The caller closes the socket so that the local side sees that this was not all.
            Ok(Next::End(Ending::Cut)) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => socket.writable().await?,
            Err(error) => return Err(error.into()),
        }
    }
}

async fn collect<S: Sender>(
    socket: &Socket,
    sender: &S,
    flow: &Flow,
    from_server: &mut impl FromServer,
) -> Result<(), RelayError> {
    let mut size = READ_MIN;
    let mut inserted = Bytes::new();
    loop {
        let credit = tokio::select! {
            biased;
            credit = flow.ready() => credit,
            error = socket.failed() => return Err(error.into()),
        };
        if inserted.is_empty() {
            inserted = from_server.next_injected().unwrap_or_default();
        }
        let data = if inserted.is_empty() {
            tokio::select! {
                biased;
                readable = socket.readable() => readable?,
                () = from_server.injection_ready() => continue,
            }
            let max = size.min(credit).min(from_server.read_limit());
            // Allocated only now: an idle stream holds no buffer.
            let mut data = BytesMut::with_capacity(max);
            match socket.try_read(&mut data, max) {
                Ok(0) => {
                    from_server.ended().map_err(RelayError::Intercept)?;
                    // A connection that is gone is drain's to report.
                    return sender.eof().await.or(Ok(()));
                }
                Ok(len) if len == size => size = (size * 2).min(MESSAGE_MAX),
                Ok(len) => size = len.next_power_of_two().clamp(READ_MIN, size),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(error) => return Err(error.into()),
            }
            from_server.inspect(&data).map_err(RelayError::Intercept)?;
            data.freeze()
        } else {
            inserted.split_to(credit.min(inserted.len()))
        };
        flow.spend(data.len());
        if sender.send(data).await.is_err() {
            // Drain's to report.
            return std::future::pending().await;
        }
        // A socket that always has more, and a link that always has room, would keep the thread.
        consume_budget().await;
    }
}

/// Logs how a stream ended, unless it ended in good order.
pub(crate) fn report(name: &TunnelName, result: Result<(), RelayError>) {
    match result {
        Ok(()) => {}
        Err(error @ RelayError::Overrun(_)) => log::error!("tunnel {name}: {error}"),
        Err(error @ RelayError::Intercept(_)) => log::warn!("tunnel {name}: {error}"),
        Err(error) => log::debug!("tunnel {name}: {error}"),
    }
}
