//! Bytes in ttrpc frames, for `KATAAGENT`: data frames, which the agent does not edit.

use std::io::{self, Error, ErrorKind, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, BufReader, ReadBuf};

/// Most data of a ttrpc frame, in bytes.
pub const DATA_MAX: usize = 4 * 1024 * 1024;
/// Length, stream, type, flags.
const HEADER: usize = 10;
/// Read-ahead in bytes, so that a small frame costs one read.
const READ_AHEAD: usize = 4 * 1024;
/// Odd, as the streams of a client are; the answers use the same stream.
const STREAM: u32 = 1;
/// Type of a data frame.
const DATA: u8 = 3;

/// A byte stream in data frames of one ttrpc stream, over another byte stream.
///
/// Each write becomes one frame, or several if it is too large; nothing is buffered, so no flush is needed. A frame
/// whose header was written must be completed: shutting down before is an error, which only a cancelled `write_all` can
/// cause. Frames of any size may be read. The stream ends where the inner stream ends between two
/// frames.
#[derive(Debug)]
pub struct Framed<S> {
    inner: BufReader<S>,
    frame: usize,
    outgoing: Outgoing,
    incoming: Incoming,
}

/// The frame that is being written.
#[derive(Debug, Default)]
struct Outgoing {
    header: [u8; HEADER],
    /// Bytes of the header that are not written yet.
    header_left: usize,
    /// Bytes of data that the header has promised and that are not written yet.
    data_left: usize,
}

/// The frame that is being read.
#[derive(Debug, Default)]
struct Incoming {
    header: [u8; HEADER],
    /// Bytes of the header that have been read.
    header_read: usize,
    data_left: usize,
}

impl<S: AsyncRead> Framed<S> {
    /// Frames of at most [`DATA_MAX`] bytes of data: usually one for each write.
    pub fn new(inner: S) -> Self {
        Self::with_frames_of(inner, DATA_MAX)
    }

    /// Frames of at most `size` bytes of data; from 1 to [`DATA_MAX`], else the nearest of these.
    pub fn with_frames_of(inner: S, size: usize) -> Self {
        Self {
            inner: BufReader::with_capacity(READ_AHEAD, inner),
            frame: size.clamp(1, DATA_MAX),
            outgoing: Outgoing::default(),
            incoming: Incoming::default(),
        }
    }
}

impl Outgoing {
    /// Begins a frame with so much data.
    fn begin(&mut self, data: usize) {
        let length = u32::try_from(data).unwrap_or_default().to_be_bytes();
        let header = length.into_iter().chain(STREAM.to_be_bytes()).chain([DATA, 0]);
        for (to, from) in self.header.iter_mut().zip(header) {
            *to = from;
        }
        (self.header_left, self.data_left) = (HEADER, data);
    }

    /// The bytes to write: the rest of the header, and as much of `data` as the frame has room for.
    fn rest<'a>(&'a self, data: &'a [u8]) -> [IoSlice<'a>; 2] {
        let header = self.header.get(HEADER - self.header_left..).unwrap_or_default();
        [IoSlice::new(header), IoSlice::new(data.get(..self.data_left).unwrap_or(data))]
    }

    /// Records how much of [`Outgoing::rest`] was written; returns how much of it was data.
    fn written(&mut self, bytes: usize) -> usize {
        let header = bytes.min(self.header_left);
        self.header_left -= header;
        let data = (bytes - header).min(self.data_left);
        self.data_left -= data;
        data
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Framed<S> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if data.is_empty() {
            return Poll::Ready(Ok(0));
        }
        if this.outgoing.data_left == 0 {
            this.outgoing.begin(data.len().min(this.frame));
        }
        loop {
            let rest = this.outgoing.rest(data);
            match ready!(Pin::new(&mut this.inner).poll_write_vectored(context, &rest))? {
                0 => return Poll::Ready(Err(ErrorKind::WriteZero.into())),
                bytes => match this.outgoing.written(bytes) {
                    // Only header bytes were written, which the caller does not count.
                    0 => {}
                    data => return Poll::Ready(Ok(data)),
                },
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.outgoing.data_left > 0 {
            let text = format!("framed: shut down with {} bytes of a frame to come", self.outgoing.data_left);
            return Poll::Ready(Err(Error::new(ErrorKind::InvalidInput, text)));
        }
        Pin::new(&mut self.get_mut().inner).poll_shutdown(context)
    }
}

impl<S: AsyncRead + Unpin> Framed<S> {
    /// Reads headers until data follows; false at the end of the stream.
    fn poll_header(&mut self, context: &mut Context<'_>) -> Poll<io::Result<bool>> {
        while self.incoming.data_left == 0 {
            let missing = self.incoming.header.get_mut(self.incoming.header_read..).unwrap_or_default();
            let mut missing = ReadBuf::new(missing);
            ready!(Pin::new(&mut self.inner).poll_read(context, &mut missing))?;
            match (missing.filled().len(), self.incoming.header_read) {
                (0, 0) => return Poll::Ready(Ok(false)),
                (0, read) => return Poll::Ready(Err(cut(format!("after {read} bytes of a header")))),
                (bytes, _) => self.incoming.header_read += bytes,
            }
            if self.incoming.header_read == HEADER {
                self.incoming.data_left = data_length(self.incoming.header)?;
                self.incoming.header_read = 0;
            }
        }
        Poll::Ready(Ok(true))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Framed<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if out.remaining() == 0 || !ready!(this.poll_header(context))? {
            return Poll::Ready(Ok(()));
        }
        let room = out.remaining().min(this.incoming.data_left);
        let mut piece = ReadBuf::new(out.initialize_unfilled_to(room));
        ready!(Pin::new(&mut this.inner).poll_read(context, &mut piece))?;
        let bytes = piece.filled().len();
        if bytes == 0 {
            return Poll::Ready(Err(cut(format!(
                "{} bytes before the end of a frame",
                this.incoming.data_left
            ))));
        }
        out.advance(bytes);
        this.incoming.data_left -= bytes;
        Poll::Ready(Ok(()))
    }
}

/// Length of the data that follows this header.
fn data_length([a, b, c, d, e, f, g, h, kind, flags]: [u8; HEADER]) -> io::Result<usize> {
    let length = usize::try_from(u32::from_be_bytes([a, b, c, d])).unwrap_or(usize::MAX);
    let stream = u32::from_be_bytes([e, f, g, h]);
    if length > DATA_MAX || (stream, kind, flags) != (STREAM, DATA, 0) {
        let text = format!(
            "framed: {length} bytes of type {kind} on stream {stream}, flags {flags}: no data frame of stream {STREAM}"
        );
        return Err(Error::new(ErrorKind::InvalidData, text));
    }
    Ok(length)
}

fn cut(at: String) -> Error {
    Error::new(ErrorKind::UnexpectedEof, format!("framed: the stream ended {at}"))
}

#[cfg(test)]
#[path = "framed_tests.rs"]
mod tests;
