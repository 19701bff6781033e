//! Refusals of requests, as ttrpc responses.

use std::io;
use std::path::PathBuf;

use bytes::Bytes;
use secure_comms_protocol::limits::{HELD_BYTES_MAX, HELD_REQUESTS_MAX, TTRPC_DATA_MAX, VOLUME_MOUNT};

use super::frame::{HEADER, Header, RESPONSE};
use super::protobuf::{Malformed, put, put_number};

/// The longest text of a refusal, in bytes.
const TEXT_MAX: usize = 1024;
/// `Response.status`.
const STATUS: u32 = 1;
/// `google.rpc.Status.code`.
const CODE: u32 = 1;
/// `google.rpc.Status.message`.
const MESSAGE: u32 = 2;

/// Why a request does not reach the kata agent.
#[derive(Debug, thiserror::Error)]
pub enum RequestRefusal {
    /// The request is malformed.
    #[error("reading the request: {0}; check that the runtime and the kata agent are of one version")]
    Malformed(#[from] Malformed),
    /// The edited request is too long.
    #[error(
        "adding the pod's network namespace: the request of {0} bytes becomes longer than the {TTRPC_DATA_MAX} of \
         ttrpc; make the container's spec smaller"
    )]
    TooLong(usize),
    /// Too many requests are held, or too many bytes.
    #[error(
        "waiting for mounts: {HELD_REQUESTS_MAX} requests, or {HELD_BYTES_MAX} bytes of them, wait on this connection \
         already; try again once some are done"
    )]
    TooMany,
    /// The source of a bind mount could not be made.
    #[error("making {}, the source of a bind mount: {source}; check the container's mounts", path.display())]
    Source {
        /// Path of the source.
        path: PathBuf,
        /// Error of the system.
        source: io::Error,
    },
    /// Nothing was mounted on a volume in time.
    #[error(
        "waiting for the volume {}: nothing was mounted there within {} s; see the log of what mounts it in the VM",
        path.display(),
        VOLUME_MOUNT.as_secs()
    )]
    Volume {
        /// Path of the volume.
        path: PathBuf,
    },
    /// The VM's mounts could not be read.
    #[error(
        "looking at the VM's mounts: {0}; check that the agent may read /proc/self/mountinfo and start threads"
    )]
    Mounts(io::Error),
}

impl RequestRefusal {
    /// The code, from google.rpc.Code.
    fn code(&self) -> u64 {
        match self {
            Self::Malformed(_) => 3,               // INVALID_ARGUMENT
            Self::Volume { .. } => 4,              // DEADLINE_EXCEEDED
            Self::TooLong(_) | Self::TooMany => 8, // RESOURCE_EXHAUSTED
            Self::Source { .. } => 9,              // FAILED_PRECONDITION
            Self::Mounts(_) => 13,                 // INTERNAL
        }
    }

    /// Builds the response to the request of this stream, a whole frame.
    pub fn reply(&self, stream: u32) -> Bytes {
        let mut text = self.to_string();
        text.truncate(text.floor_char_boundary(TEXT_MAX));
        let mut status = Vec::new();
        put_number(CODE, self.code(), &mut status);
        put(MESSAGE, text.as_bytes(), &mut status);
        let mut frame = vec![0; HEADER];
        put(STATUS, &status, &mut frame);
        let header = Header { length: frame.len() - HEADER, stream, kind: RESPONSE, flags: 0 };
        for (to, from) in frame.iter_mut().zip(header.to_bytes()) {
            *to = from;
        }
        frame.into()
    }
}

#[cfg(test)]
#[path = "reply_tests.rs"]
mod tests;
