//! The end of a connection: that of the other end, seen without reading, and our own.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::task::{Context, Poll, ready};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::TcpStream;

/// How the other end has ended a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hangup {
    /// It sends no more.
    Closed,
    /// The connection is broken.
    Reset,
}

/// Watches for the other end's end. An epoll instance of its own: data that arrive wake it not, and may lie unread before
/// the end. tokio's own readiness shows either.
#[derive(Debug)]
pub(super) struct HangupWatch(AsyncFd<Waiting>);

#[derive(Debug)]
struct Waiting(Epoll);

impl AsRawFd for Waiting {
    fn as_raw_fd(&self) -> RawFd {
        self.0.0.as_raw_fd()
    }
}

impl HangupWatch {
    /// # Errors
    /// No free file descriptor.
    pub(super) fn new(stream: &TcpStream) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(stream, EpollEvent::new(EpollFlags::EPOLLRDHUP, 0))?;
        #[expect(
            deprecated,
            reason = "what replaces it is unsafe; the AsyncFd owns the descriptor, which never changes"
        )]
        let watched = AsyncFd::with_interest(Waiting(epoll), Interest::READABLE)?;
        Ok(Self(watched))
    }

    /// # Errors
    /// The system cannot say.
    pub(super) fn poll(&self, cx: &mut Context<'_>) -> Poll<io::Result<Hangup>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(cx))?;
            let mut events = [EpollEvent::empty()];
            match self.0.get_ref().0.wait(&mut events, EpollTimeout::ZERO) {
                Ok(0) => guard.clear_ready(),
                Ok(_) => {
                    let [event] = events;
                    let broken = event.events().intersects(EpollFlags::EPOLLERR);
                    return Poll::Ready(Ok(if broken { Hangup::Reset } else { Hangup::Closed }));
                }
                Err(Errno::EINTR) => {}
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
    }
}

/// Makes the connection end with a reset when it is dropped.
pub(super) fn reset(stream: &TcpStream) {
    if let Err(error) = stream.set_zero_linger() {
        // It ends otherwise then, which costs the client nothing.
        tracing::debug!("caa front: a connection is closed instead of reset: {error}");
    }
}
