//! The socket that a russh session gets: it keeps reading while a write is pending, insists on strict key
//! exchange, and can be cut.
//!
//! A session does not read while it writes (D2), so two busy sessions can wait for each other for ever. The guard
//! reads ahead into a bounded buffer then; the bound is what the peer may have in flight, so an honest peer's
//! writes always proceed. And a session can't be stopped from outside (its task outlives every handle): cutting
//! its socket ends it.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

pub use self::strict::Peer;
use self::strict::StrictKex;

mod strict;

/// Read-ahead of a connection whose peer has not authenticated yet, in bytes.
const UNAUTHENTICATED_READ_AHEAD: usize = 256 * 1024;
/// Framing and channel messages besides the data that credits count, in bytes.
const READ_AHEAD_SLACK: usize = 1024 * 1024;
/// Reads into the read-ahead buffer, in bytes.
const READ: usize = 64 * 1024;

/// The handle on a guarded socket.
#[derive(Clone, Debug, Default)]
pub struct Guard(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    cut: AtomicBool,
    read_ahead: AtomicUsize,
    waker: Mutex<Option<Waker>>,
}

impl Guard {
    /// Cuts the connection: the session ends with an I/O error at once.
    pub fn cut(&self) {
        self.0.cut.store(true, Ordering::Release);
        let waker = self.0.waker.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// The peer has authenticated and may have this much in flight towards us.
    pub fn may_hold(&self, bytes: usize) {
        self.0.read_ahead.store(bytes + READ_AHEAD_SLACK, Ordering::Relaxed);
    }
}

/// A socket under guard.
#[derive(Debug)]
pub struct Guarded<S> {
    socket: S,
    guard: Guard,
    ahead: BytesMut,
    strict: StrictKex,
}

impl<S> Guarded<S> {
    /// Puts `socket` under guard; `peer` is what the other side is.
    pub fn new(socket: S, peer: Peer) -> (Self, Guard) {
        let guard = Guard::default();
        guard.0.read_ahead.store(UNAUTHENTICATED_READ_AHEAD, Ordering::Relaxed);
        let guarded =
            Self { socket, guard: guard.clone(), ahead: BytesMut::new(), strict: StrictKex::new(peer) };
        (guarded, guard)
    }

    fn check(&self) -> io::Result<()> {
        if self.guard.0.cut.load(Ordering::Acquire) {
            return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "cut from this side"));
        }
        Ok(())
    }

    /// Remembers whom to wake for a cut. Called when a poll is about to be pending.
    fn watch(&self, cx: &Context<'_>) {
        let mut waker = self.guard.0.waker.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *waker {
            Some(waker) if waker.will_wake(cx.waker()) => {}
            waker => *waker = Some(cx.waker().clone()),
        }
    }
}

impl<S: AsyncRead + Unpin> Guarded<S> {
    /// Reads what is there while a write is pending, as far as the bound allows.
    fn read_ahead(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        let bound = self.guard.0.read_ahead.load(Ordering::Relaxed);
        while self.ahead.len() < bound {
            let old = self.ahead.len();
            self.ahead.resize(old + READ, 0);
            let mut buffer = ReadBuf::new(self.ahead.get_mut(old..).unwrap_or_default());
            let poll = Pin::new(&mut self.socket).poll_read(cx, &mut buffer);
            let read = buffer.filled().len();
            self.ahead.truncate(old + read);
            self.strict.feed(self.ahead.get(old..).unwrap_or_default())?;
            match poll {
                Poll::Pending => break,
                // End of file or an error: the next ordinary read meets it again.
                Poll::Ready(Ok(())) if read == 0 => break,
                Poll::Ready(Err(_)) => break,
                Poll::Ready(Ok(())) => {}
            }
        }
        Ok(())
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Guarded<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        this.check()?;
        if !this.ahead.is_empty() {
            let len = out.remaining().min(this.ahead.len());
            out.put_slice(this.ahead.get(..len).unwrap_or_default());
            this.ahead.advance(len);
            if this.ahead.is_empty() {
                // Gives the memory of a burst back.
                this.ahead = BytesMut::new();
            }
            return Poll::Ready(Ok(()));
        }
        let old = out.filled().len();
        match Pin::new(&mut this.socket).poll_read(cx, out) {
            Poll::Pending => {
                this.watch(cx);
                this.check()?;
                Poll::Pending
            }
            Poll::Ready(result) => {
                this.strict.feed(out.filled().get(old..).unwrap_or_default())?;
                Poll::Ready(result)
            }
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Guarded<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        this.check()?;
        let poll = Pin::new(&mut this.socket).poll_write(cx, data);
        if poll.is_pending() {
            this.read_ahead(cx)?;
            this.watch(cx);
            this.check()?;
        }
        poll
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check()?;
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}
