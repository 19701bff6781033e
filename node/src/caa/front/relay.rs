//! Carries bytes between cloud-api-adaptor and a pod's kata agent.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use secure_comms_keys::text::one_line;
use tokio::io::{AsyncBufRead, AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{Sleep, sleep, timeout};
use tokio_rustls::server::TlsStream;

use super::finish::CaaStream;
use super::hangup::{Hangup, HangupWatch};

/// How much is read from the pod at once, in bytes.
const CHUNK: usize = 64 * 1024;
/// The usual reasons.
const CLOSED: &str = "it closed the connection";
const RESET: &str = "it reset the connection";
/// The longest reason, in bytes.
const MAX_TEXT: usize = 200;
/// How long one direction may go on without a byte when the other has ended.
const DRAIN: Duration = Duration::from_secs(5);
/// How long the last bytes for cloud-api-adaptor may take.
const FAREWELL: Duration = Duration::from_secs(1);

thread_local! {
    /// What is read from a pod goes out of it in the same poll: no stream needs a buffer of its own.
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; CHUNK]);
}

/// A side of a relay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The container runtime, which is behind cloud-api-adaptor.
    Runtime,
    /// The kata agent in the pod's VM, or the tunnel to it.
    Pod,
}

/// How a relay has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RelayEnd {
    /// Which side ended first.
    pub by: Side,
    /// What it did.
    pub reason: String,
    /// Bytes to the VM.
    pub to_vm: u64,
    /// Bytes from the VM.
    pub from_vm: u64,
}

/// Carries bytes both ways until both sides have ended, one is broken, or one has ended and the other is silent for 5 s. The
/// end of one side is passed on to the other.
///
/// # Cancellation
/// Closes both.
pub async fn relay(caa: CaaStream, vm: UnixStream) -> RelayEnd {
    let mut relay = Relay::new(caa.0, vm);
    let (by, reason) = poll_fn(|cx| relay.poll(cx)).await;
    let Relay { mut caa, to_vm, from_vm, .. } = relay;
    // A failure says what is known: it has ended.
    drop(timeout(FAREWELL, caa.shutdown()).await);
    RelayEnd { by, reason, to_vm: to_vm.bytes, from_vm: from_vm.bytes }
}

type End = (Side, String);

#[derive(Debug, Default)]
struct Direction {
    bytes: u64,
    ended: bool,
}

struct Relay {
    caa: TlsStream<TcpStream>,
    vm: UnixStream,
    to_vm: Direction,
    from_vm: Direction,
    /// What was read from the VM, and did not go out at once.
    rest: Vec<u8>,
    /// What ended first, if the other has not ended yet.
    first: Option<End>,
    /// The time that the other has left.
    drain: Option<Pin<Box<Sleep>>>,
    /// Made when the VM takes no more for the first time.
    hangup: Option<HangupWatch>,
}

impl Relay {
    fn new(caa: TlsStream<TcpStream>, vm: UnixStream) -> Self {
        Self {
            caa,
            vm,
            to_vm: Direction::default(),
            from_vm: Direction::default(),
            rest: Vec::new(),
            first: None,
            drain: None,
            hangup: None,
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        let before = (self.to_vm.bytes, self.from_vm.bytes);
        if !self.to_vm.ended {
            match self.poll_to_vm(cx) {
                Poll::Ready(Ok(())) => {
                    self.to_vm.ended = true;
                    self.first.get_or_insert_with(|| (Side::Runtime, CLOSED.to_owned()));
                }
                Poll::Ready(Err(end)) => return Poll::Ready(self.first.take().unwrap_or(end)),
                Poll::Pending => {}
            }
        }
        if !self.from_vm.ended {
            match self.poll_from_vm(cx) {
                Poll::Ready(Ok(())) => {
                    self.from_vm.ended = true;
                    self.first.get_or_insert_with(|| (Side::Pod, "it closed the stream".to_owned()));
                }
                Poll::Ready(Err(end)) => return Poll::Ready(self.first.take().unwrap_or(end)),
                Poll::Pending => {}
            }
        }
        if self.first.is_none() {
            return Poll::Pending;
        }
        if !(self.to_vm.ended && self.from_vm.ended) {
            if before != (self.to_vm.bytes, self.from_vm.bytes) {
                self.drain = None;
            }
            ready!(self.drain.get_or_insert_with(|| Box::pin(sleep(DRAIN))).as_mut().poll(cx));
        }
        self.first.take().map_or(Poll::Pending, Poll::Ready)
    }

    /// Ready: cloud-api-adaptor has ended, and the VM knows.
    fn poll_to_vm(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        loop {
            let data = match ready!(Pin::new(&mut self.caa).poll_fill_buf(cx)) {
                Ok(data) => data,
                Err(error) => return Poll::Ready(Err((Side::Runtime, broken(&error)))),
            };
            if data.is_empty() {
                // A failure shows when it is read from.
                drop(ready!(Pin::new(&mut self.vm).poll_shutdown(cx)));
                return Poll::Ready(Ok(()));
            }
            let written = match Pin::new(&mut self.vm).poll_write(cx, data) {
                Poll::Ready(Ok(written)) => written,
                Poll::Ready(Err(error)) => return Poll::Ready(Err((Side::Pod, broken(&error)))),
                Poll::Pending => return self.poll_hangup(cx),
            };
            Pin::new(&mut self.caa).consume(written);
            self.to_vm.bytes += written as u64;
        }
    }

    /// Looks for cloud-api-adaptor's end while the VM takes no more: nothing is read then. Ready: the connection is broken.
    fn poll_hangup(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        if self.first.is_some() {
            return Poll::Pending;
        }
        let hangup = match &self.hangup {
            Some(hangup) => hangup,
            None => match HangupWatch::new(self.caa.get_ref().0) {
                Ok(hangup) => self.hangup.insert(hangup),
                // Without it, the end is seen when the VM goes on.
                Err(_) => return Poll::Pending,
            },
        };
        match ready!(hangup.poll(cx)) {
            // What it has sent before may still be wanted: the VM has the usual time for it.
            Ok(Hangup::Closed) => {
                self.first = Some((Side::Runtime, CLOSED.to_owned()));
                Poll::Pending
            }
            Ok(Hangup::Reset) | Err(_) => Poll::Ready(Err((Side::Runtime, RESET.to_owned()))),
        }
    }

    /// Ready: the VM has ended, and cloud-api-adaptor knows.
    fn poll_from_vm(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        let to_caa = |error: io::Error| (Side::Runtime, broken(&error));
        loop {
            while !self.rest.is_empty() {
                let written = ready!(Pin::new(&mut self.caa).poll_write(cx, &self.rest)).map_err(to_caa)?;
                self.rest.drain(..written);
                self.from_vm.bytes += written as u64;
                if self.rest.is_empty() {
                    self.rest = Vec::new();
                }
            }
            // Not more than one chunk is under way.
            ready!(Pin::new(&mut self.caa).poll_flush(cx)).map_err(to_caa)?;
            let read = BUFFER.with_borrow_mut(|buffer| self.pass_chunk(cx, buffer));
            if ready!(read)? == 0 {
                ready!(Pin::new(&mut self.caa).poll_shutdown(cx)).map_err(to_caa)?;
                return Poll::Ready(Ok(()));
            }
        }
    }

    /// How much was read.
    fn pass_chunk(&mut self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<Result<usize, End>> {
        let mut buffer = ReadBuf::new(buffer);
        let read = ready!(Pin::new(&mut self.vm).poll_read(cx, &mut buffer));
        if let Err(error) = read {
            return Poll::Ready(Err((Side::Pod, broken(&error))));
        }
        let data = buffer.filled();
        let written = match Pin::new(&mut self.caa).poll_write(cx, data) {
            _ if data.is_empty() => 0,
            Poll::Ready(Ok(written)) => written,
            Poll::Ready(Err(error)) => return Poll::Ready(Err((Side::Runtime, broken(&error)))),
            Poll::Pending => 0,
        };
        self.from_vm.bytes += written as u64;
        self.rest = data.get(written..).unwrap_or_default().to_vec();
        Poll::Ready(Ok(data.len()))
    }
}

fn broken(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => "it closed the connection without a TLS close_notify".to_owned(),
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => RESET.to_owned(),
        _ => one_line(&format!("the connection is broken: {error}"), MAX_TEXT),
    }
}
