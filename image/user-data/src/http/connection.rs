//! A TCP connection that ends at a deadline, however slowly bytes arrive.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use super::{HttpError, Limits};

/// A connection of one request.
#[derive(Debug)]
pub(super) struct Connection {
    stream: TcpStream,
    deadline: Instant,
}

impl Connection {
    /// Connects.
    ///
    /// # Errors
    /// If there is no connection within `limits`.
    pub(super) fn open(address: SocketAddr, limits: Limits) -> Result<Self, HttpError> {
        if limits.connect.is_zero() {
            return Err(HttpError::ConnectTimeout(limits.connect));
        }
        let start = Instant::now();
        let stream =
            TcpStream::connect_timeout(&address, limits.connect).map_err(|error| match error.kind() {
                ErrorKind::TimedOut => HttpError::ConnectTimeout(limits.connect),
                _ => HttpError::Connect(error),
            })?;
        let deadline = (Instant::now() + limits.answer).min(start + limits.total);
        Ok(Self { stream, deadline })
    }

    /// Sends all of `bytes`.
    ///
    /// # Errors
    /// If the connection breaks or the deadline passes.
    pub(super) fn send(&mut self, mut bytes: &[u8]) -> Result<(), HttpError> {
        while !bytes.is_empty() {
            self.stream.set_write_timeout(Some(self.left()?)).map_err(HttpError::Broken)?;
            match self.stream.write(bytes) {
                Ok(sent) => bytes = bytes.get(sent..).unwrap_or_default(),
                Err(error) => self.go_on_after(error)?,
            }
        }
        Ok(())
    }

    /// The time until the deadline.
    fn left(&self) -> Result<Duration, HttpError> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(HttpError::AnswerTimeout) } else { Ok(left) }
    }

    /// A timeout of the socket is no error yet: the deadline decides.
    fn go_on_after(&self, error: io::Error) -> Result<(), HttpError> {
        match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted => Ok(()),
            _ => Err(HttpError::Broken(error)),
        }
    }
}

/// What an answer is read from: a connection, or bytes in tests.
pub trait Source {
    /// Reads at least one byte into `buffer`; 0 at the end.
    ///
    /// # Errors
    /// If the connection breaks or its deadline passes.
    fn receive(&mut self, buffer: &mut [u8]) -> Result<usize, HttpError>;
}

impl Source for Connection {
    fn receive(&mut self, buffer: &mut [u8]) -> Result<usize, HttpError> {
        loop {
            self.stream.set_read_timeout(Some(self.left()?)).map_err(HttpError::Broken)?;
            match self.stream.read(buffer) {
                Ok(length) => return Ok(length),
                Err(error) => self.go_on_after(error)?,
            }
        }
    }
}

impl Source for &[u8] {
    fn receive(&mut self, buffer: &mut [u8]) -> Result<usize, HttpError> {
        self.read(buffer).map_err(HttpError::Broken)
    }
}
