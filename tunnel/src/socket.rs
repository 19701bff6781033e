//! A connected TCP or unix socket that holds no buffer while it is idle.

use std::io;
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use bytes::{BufMut, BytesMut};
use nix::libc::linger;
use nix::sys::socket::sockopt::Linger;
use nix::sys::socket::{MsgFlags, Shutdown, recv, setsockopt};
use tokio::io::Interest;
use tokio::net::{TcpStream, UnixStream};

/// Largest size of a small read, in bytes.
const SMALL: usize = 4096;

/// The local end of a tunnel: a client of an inbound, or the server of an outbound.
///
/// Dropping it resets a TCP connection, so that a cancelled or crashed task never looks like an orderly end: only
/// `finish` closes in good order. Unix sockets have no reset: the other side reads an end of file, and can't
/// write.
#[derive(Debug)]
pub enum Socket {
    /// TCP over IPv4 or IPv6, from [`Socket::tcp`].
    Tcp(TcpStream),
    /// A unix stream socket.
    Unix(UnixStream),
}

impl Socket {
    /// Takes a TCP connection. Turns Nagle's algorithm off, so that bytes do not wait for an acknowledgement. From now
    /// on a close is a reset.
    ///
    /// # Errors
    /// The connection has already failed.
    pub fn tcp(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_zero_linger()?;
        Ok(Self::Tcp(stream))
    }

    /// Waits until a read would not block. Cancellation safe.
    ///
    /// # Errors
    /// The runtime is shutting down.
    pub(crate) async fn readable(&self) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.readable().await,
            Self::Unix(stream) => stream.readable().await,
        }
    }

    /// Waits until a write would not block. Cancellation safe.
    ///
    /// # Errors
    /// The runtime is shutting down.
    pub(crate) async fn writable(&self) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.writable().await,
            Self::Unix(stream) => stream.writable().await,
        }
    }

    /// Waits until the connection has failed, and returns the error, usually a reset. Reads no bytes. Cancellation
    /// safe.
    pub(crate) async fn failed(&self) -> io::Error {
        let ready = match self {
            Self::Tcp(stream) => stream.ready(Interest::ERROR).await.and_then(|_| stream.take_error()),
            Self::Unix(stream) => stream.ready(Interest::ERROR).await.and_then(|_| stream.take_error()),
        };
        ready.unwrap_or_else(Some).unwrap_or_else(|| io::ErrorKind::ConnectionReset.into())
    }

    /// Waits until the client is gone: its connection has failed, or it ended without sending a byte. A client that
    /// ended after sending bytes may still wait for an answer, and does not count. Reads no bytes. Cancellation safe.
    pub(crate) async fn client_gone(&self) {
        loop {
            if self.readable().await.is_err() {
                return;
            }
            match self.try_peek() {
                Ok(0) => return,
                Ok(_) => break,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return,
            }
        }
        self.failed().await;
    }

    fn try_peek(&self) -> io::Result<usize> {
        let peek = || Ok(recv(self.as_fd().as_raw_fd(), &mut [0], MsgFlags::MSG_PEEK)?);
        match self {
            Self::Tcp(stream) => stream.try_io(Interest::READABLE, peek),
            Self::Unix(stream) => stream.try_io(Interest::READABLE, peek),
        }
    }

    /// Reads the bytes that have arrived, at most `max`; returns their number, 0 at the end of file.
    ///
    /// # Errors
    /// `WouldBlock` if no bytes have arrived; otherwise the socket's error.
    pub(crate) fn try_read(&self, buffer: &mut BytesMut, max: usize) -> io::Result<usize> {
        if max <= SMALL {
            return self.try_read_small(buffer, max);
        }
        let mut buffer = buffer.limit(max);
        match self {
            Self::Tcp(stream) => stream.try_read_buf(&mut buffer),
            Self::Unix(stream) => stream.try_read_buf(&mut buffer),
        }
    }

    /// Small read. Fewer bytes than `max` mean that the socket is empty, so readiness is cleared and the next read
    /// waits without a system call. Zeroing the memory costs less than that system call.
    fn try_read_small(&self, buffer: &mut BytesMut, max: usize) -> io::Result<usize> {
        let old = buffer.len();
        buffer.resize(old + max, 0);
        let mut result = Err(io::ErrorKind::WouldBlock.into());
        let read = || {
            result =
                recv(self.as_fd().as_raw_fd(), buffer.get_mut(old..).unwrap_or_default(), MsgFlags::empty())
                    .map_err(io::Error::from);
            // As tokio's own reads do: bytes that arrive in between raise a new event, which this does not clear.
            match &result {
                Ok(read) if (1..max).contains(read) => Err(io::ErrorKind::WouldBlock.into()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    Err(io::ErrorKind::WouldBlock.into())
                }
                _ => Ok(()),
            }
        };
        // This result only says whether the socket was ready. `result` holds that of the read.
        let _ = match self {
            Self::Tcp(stream) => stream.try_io(Interest::READABLE, read),
            Self::Unix(stream) => stream.try_io(Interest::READABLE, read),
        };
        buffer.truncate(old + result.as_ref().map_or(0, |read| *read));
        result
    }

    /// Writes as many bytes as fit into the send buffer; returns their number.
    ///
    /// # Errors
    /// `WouldBlock` if no bytes fit; otherwise the socket's error.
    pub(crate) fn try_write_vectored(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.try_write_vectored(slices),
            Self::Unix(stream) => stream.try_write_vectored(slices),
        }
    }

    /// Sends FIN: we write no more bytes, but still read.
    ///
    /// # Errors
    /// The socket's error; `NotConnected` if the other side has reset it.
    pub(crate) fn shutdown_write(&self) -> io::Result<()> {
        nix::sys::socket::shutdown(self.as_fd().as_raw_fd(), Shutdown::Write).map_err(Into::into)
    }

    /// Closes with a reset, so that the other side knows that bytes are missing.
    pub(crate) fn abort(self) {
        drop(self);
    }

    /// Closes in good order: bytes that were written are still sent.
    pub(crate) fn finish(self) {
        if let Self::Tcp(stream) = self
            && let Err(error) = setsockopt(&stream, Linger, &linger { l_onoff: 0, l_linger: 0 })
        {
            log::debug!("closing a connection: {error}");
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(stream) => stream.as_fd(),
            Self::Unix(stream) => stream.as_fd(),
        }
    }
}

impl From<UnixStream> for Socket {
    fn from(stream: UnixStream) -> Self {
        Self::Unix(stream)
    }
}
