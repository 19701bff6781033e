//! Bytes in ttrpc frames: what passes through `KATAAGENT` must be frames, and these are data frames, which nobody edits.

use std::io::{self, Error, ErrorKind, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, BufReader, ReadBuf};

/// The most data that a ttrpc frame may have, in bytes.
pub const DATA_MAX: usize = 4 * 1024 * 1024;
/// Length, stream, type, flags.
const HEADER: usize = 10;
/// Read ahead, so that a small frame costs one read, in bytes.
const READ_AHEAD: usize = 4 * 1024;
/// Odd, as a client's are; the answers come on the same one.
const STREAM: u32 = 1;
/// The type of a data frame.
const DATA: u8 = 3;

/// A byte stream in data frames of one ttrpc stream, over another byte stream.
///
/// What is written becomes frames, one a write as far as their size allows; nothing is copied or kept, so that bytes
/// which were taken are on their way without a flush. A frame that has begun must be filled: to shut down before that is
/// an error, which only the end of a `write_all` in its middle can bring about. What is read may come in frames of
/// any size. End of file is the inner stream's, between two frames.
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
    /// Bytes of the header that are here.
    header_read: usize,
    data_left: usize,
}

impl<S: AsyncRead> Framed<S> {
    /// Frames of at most [`DATA_MAX`] bytes of data: one for each write, in practice.
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
    /// Begins a frame of this much data.
    fn begin(&mut self, data: usize) {
        let length = u32::try_from(data).unwrap_or_default().to_be_bytes();
        let header = length.into_iter().chain(STREAM.to_be_bytes()).chain([DATA, 0]);
        for (to, from) in self.header.iter_mut().zip(header) {
            *to = from;
        }
        (self.header_left, self.data_left) = (HEADER, data);
    }

    /// What is not written yet: the rest of the header, and as much of `data` as the frame has room for.
    fn rest<'a>(&'a self, data: &'a [u8]) -> [IoSlice<'a>; 2] {
        let header = self.header.get(HEADER - self.header_left..).unwrap_or_default();
        [IoSlice::new(header), IoSlice::new(data.get(..self.data_left).unwrap_or(data))]
    }

    /// Notes what was written of [`Outgoing::rest`]; answers how much of it was data.
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
                    // Of the header alone: the caller must not hear of that.
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
    /// Reads headers until there is data to come; false at the end of the stream.
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

/// How much data follows this header.
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
