//! ttrpc frames: where each begins and ends in a stream of bytes.
//!
//! A frame is a header of ten bytes and data: length of the data, stream id (both big endian, four bytes), type, flags
//! (<https://github.com/containerd/ttrpc/blob/main/PROTOCOL.md>).

use secure_comms_protocol::limits::TTRPC_DATA_MAX;

/// Bytes of a header.
pub const HEADER: usize = 10;
/// The type of a request.
pub const REQUEST: u8 = 1;
/// The type of a response.
pub const RESPONSE: u8 = 2;
/// The type of data of a stream.
const DATA: u8 = 3;

/// Why a stream of frames can't be read any further.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// A header announces more data than ttrpc allows, and has a type that ttrpc does not know: it is no header.
    #[error(
        "reading ttrpc frames: a header announces {0} bytes, and a frame has at most {TTRPC_DATA_MAX}; check that both \
         ends of the tunnel speak ttrpc"
    )]
    TooLong(u32),
    /// The stream ended within a frame.
    #[error(
        "reading ttrpc frames: the stream ended {0} bytes before the end of a frame; see the log of its sender"
    )]
    Truncated(usize),
}

/// The header of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Bytes of data that follow.
    pub length: usize,
    /// The stream id.
    pub stream: u32,
    /// The type.
    pub kind: u8,
    /// The flags.
    pub flags: u8,
}

impl Header {
    /// Reads a header.
    ///
    /// # Errors
    /// The bytes are no header of ttrpc, so the begin of the next frame is unknown.
    pub fn parse(bytes: [u8; HEADER]) -> Result<Self, FrameError> {
        let [l0, l1, l2, l3, s0, s1, s2, s3, kind, flags] = bytes;
        let announced = u32::from_be_bytes([l0, l1, l2, l3]);
        let length = usize::try_from(announced).unwrap_or(usize::MAX);
        if length > TTRPC_DATA_MAX && !(REQUEST..=DATA).contains(&kind) {
            return Err(FrameError::TooLong(announced));
        }
        Ok(Self { length, stream: u32::from_be_bytes([s0, s1, s2, s3]), kind, flags })
    }

    /// Whether the frame is longer than ttrpc allows. Its data must be discarded, and its call refused.
    pub fn is_too_long(&self) -> bool {
        self.length > TTRPC_DATA_MAX
    }

    /// Writes the header. A length above `u32::MAX` is written as that, which every reader refuses.
    pub fn to_bytes(self) -> [u8; HEADER] {
        let [l0, l1, l2, l3] = u32::try_from(self.length).unwrap_or(u32::MAX).to_be_bytes();
        let [s0, s1, s2, s3] = self.stream.to_be_bytes();
        [l0, l1, l2, l3, s0, s1, s2, s3, self.kind, self.flags]
    }
}

/// Finds the boundaries of frames in a stream that comes in pieces of any size.
#[derive(Debug, Default)]
pub struct Scanner {
    header: [u8; HEADER],
    have: usize,
    left: usize,
}

impl Scanner {
    /// Whether the next byte begins a frame.
    pub fn at_boundary(&self) -> bool {
        self.left == 0 && self.have == 0
    }

    /// Bytes of data that the current frame still lacks; 0 until its header is complete.
    pub fn left(&self) -> usize {
        self.left
    }

    /// Bytes until the end of the current header, or of the current frame's data.
    pub fn until_boundary(&self) -> usize {
        if self.left > 0 { self.left } else { HEADER - self.have }
    }

    /// Reads some of `data`, at most to the end of a header or of a frame. Returns the number of bytes read, and a header that
    /// is complete.
    ///
    /// # Errors
    /// The header is none of ttrpc.
    pub fn advance(&mut self, data: &[u8]) -> Result<(usize, Option<Header>), FrameError> {
        let used = data.len().min(self.until_boundary());
        if self.left > 0 {
            self.left -= used;
            return Ok((used, None));
        }
        for (to, from) in self.header.iter_mut().skip(self.have).zip(data) {
            *to = *from;
        }
        self.have += used;
        if self.have < HEADER {
            return Ok((used, None));
        }
        let header = Header::parse(self.header)?;
        self.have = 0;
        self.left = header.length;
        Ok((used, Some(header)))
    }

    /// Skips bytes of the current frame's data, at most to its end.
    pub fn skip(&mut self, bytes: usize) {
        self.left = self.left.saturating_sub(bytes);
    }

    /// Checks that the stream may end here.
    ///
    /// # Errors
    /// The stream ends within a frame.
    pub fn end(&self) -> Result<(), FrameError> {
        if self.at_boundary() { Ok(()) } else { Err(FrameError::Truncated(self.until_boundary())) }
    }
}
