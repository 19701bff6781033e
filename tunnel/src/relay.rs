//! The relay: one task a stream, three futures in it.
//!
//! *drain* takes what arrives off the stream at once and queues it, so that one slow socket never holds up the
//! connection; *deliver* moves the queue into the socket and gives credit back; *collect* waits for credit, then
//! reads the socket and sends. A close seen by *drain* ends *collect* wherever it waits.

use std::io;
use std::time::Duration;

use bytes::BytesMut;
use secure_comms_protocol::limits::{FLUSH, MESSAGE_MAX};
use tokio::task::coop::consume_budget;
use tokio::time::timeout;

use crate::flow::{Flow, Overrun};
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
}

/// Moves bytes both ways until both ends are done; then socket and stream are closed.
///
/// # Errors
/// Why it ended otherwise. The local side then sees a reset, the other end a close without EOF; so it is too if the
/// future is dropped.
pub async fn relay<R: Receiver, S: Sender>(socket: Socket, stream: Stream<R, S>) -> Result<(), RelayError> {
    let Stream { mut receiver, sender, flow } = stream;
    let queue = Queue::default();
    let result = run(&socket, &mut receiver, &sender, &flow, &queue).await;
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

async fn run<R: Receiver, S: Sender>(
    socket: &Socket,
    receiver: &mut R,
    sender: &S,
    flow: &Flow,
    queue: &Queue,
) -> Result<(), RelayError> {
    let drain = drain(receiver, flow, queue);
    let deliver = deliver(socket, flow, queue);
    let collect = collect(socket, sender, flow);
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
async fn drain<R: Receiver>(receiver: &mut R, flow: &Flow, queue: &Queue) -> Result<(), RelayError> {
    loop {
        if !flow.has_credit() {
            // Without credits all we can do is to stop taking, which holds up that peer's connection.
            tokio::select! {
                biased;
                () = flow.plain_room() => {}
                () = flow.gone() => {}
            }
        }
        match receiver.recv().await {
            Some(Event::Data(data)) => {
                let cost = flow.arrived(data.len())?;
                queue.push(data, cost);
            }
            Some(Event::Eof) => queue.end(Ending::Complete),
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

async fn collect<S: Sender>(socket: &Socket, sender: &S, flow: &Flow) -> Result<(), RelayError> {
    let mut size = READ_MIN;
    loop {
        let credit = tokio::select! {
            biased;
            credit = flow.ready() => credit,
            error = socket.failed() => return Err(error.into()),
        };
        socket.readable().await?;
        // Allocated only now: an idle stream holds no buffer.
        let mut data = BytesMut::with_capacity(size.min(credit));
        match socket.try_read(&mut data, credit.min(size)) {
            Ok(0) => {
                // A connection that is gone is drain's to report.
                return sender.eof().await.or(Ok(()));
            }
            Ok(len) => {
                size = if len == size {
                    (size * 2).min(MESSAGE_MAX)
                } else {
                    len.next_power_of_two().clamp(READ_MIN, size)
                };
                flow.spend(len);
                if sender.send(data.freeze()).await.is_err() {
                    // Drain's to report.
                    return std::future::pending().await;
                }
                // A socket that always has more, and a link that always has room, would keep the thread.
                consume_budget().await;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
    }
}
