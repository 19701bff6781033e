//! A connected TCP or unix socket, read and written without holding buffers while it is idle.

use std::io;
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use bytes::{BufMut, BytesMut};
use nix::sys::socket::Shutdown;
use tokio::net::{TcpStream, UnixStream};

/// The local end of a tunnel: a client of an inbound, or the server of an outbound.
#[derive(Debug)]
pub enum Socket {
    /// TCP over IPv4 or IPv6.
    Tcp(TcpStream),
    /// A unix stream socket.
    Unix(UnixStream),
}

impl Socket {
    /// A TCP socket, with Nagle's algorithm off: what a client wrote must not wait for an acknowledgement.
    ///
    /// # Errors
    /// The socket is already dead.
    pub fn tcp(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        Ok(Self::Tcp(stream))
    }

    /// Waits until a read would not block.
    ///
    /// # Errors
    /// The event loop is gone.
    pub async fn readable(&self) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.readable().await,
            Self::Unix(stream) => stream.readable().await,
        }
    }

    /// Waits until a write would not block.
    ///
    /// # Errors
    /// The event loop is gone.
    pub async fn writable(&self) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.writable().await,
            Self::Unix(stream) => stream.writable().await,
        }
    }

    /// Reads what is there, at most `max` bytes. 0 is end of file.
    ///
    /// # Errors
    /// `WouldBlock` where nothing is there; else the socket's error.
    pub fn try_read(&self, buffer: &mut BytesMut, max: usize) -> io::Result<usize> {
        let mut buffer = buffer.limit(max);
        match self {
            Self::Tcp(stream) => stream.try_read_buf(&mut buffer),
            Self::Unix(stream) => stream.try_read_buf(&mut buffer),
        }
    }

    /// Writes what fits.
    ///
    /// # Errors
    /// `WouldBlock` where nothing fits; else the socket's error.
    pub fn try_write_vectored(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.try_write_vectored(slices),
            Self::Unix(stream) => stream.try_write_vectored(slices),
        }
    }

    /// Sends FIN: we write no more, but still read.
    ///
    /// # Errors
    /// The socket's error, `NotConnected` where the other side has reset it.
    pub fn shutdown_write(&self) -> io::Result<()> {
        nix::sys::socket::shutdown(self.as_fd().as_raw_fd(), Shutdown::Write).map_err(Into::into)
    }

    /// Closes so that the other side sees a reset, not an orderly end: what it has received is not all there was.
    pub fn abort(self) {
        if let Self::Tcp(stream) = self
            && let Err(error) = stream.set_zero_linger()
        {
            log::debug!("resetting a connection: {error}");
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
