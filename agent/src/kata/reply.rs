//! Refusals of requests, as ttrpc responses.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use secure_comms_protocol::limits::{HELD_BYTES_MAX, HELD_REQUESTS_MAX, MOUNT_THREADS_MAX, TTRPC_DATA_MAX};

use super::cloud_volumes::{CLOUD_VOLUMES, InvalidVolumes};
use super::edit::EditError;
use super::frame::{HEADER, Header, RESPONSE};
use super::podvm_volumes::VolumesFault;
use super::protobuf::{Malformed, put, put_number};
use super::sources::Why;

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
    /// The frame is longer than ttrpc allows.
    #[error(
        "reading a frame of {0} bytes: ttrpc allows {TTRPC_DATA_MAX}; the frame was dropped, send less in one call"
    )]
    FrameTooLong(usize),
    /// A frame of the kata agent is longer than ttrpc allows.
    #[error(
        "reading the kata agent's frame of {0} bytes: ttrpc allows {TTRPC_DATA_MAX}; the frame was dropped, ask for less in \
         one call"
    )]
    AnswerTooLong(usize),
    /// The edited request is too long.
    #[error(
        "adding the pod's network namespace and volumes: the request of {0} bytes becomes longer than the {TTRPC_DATA_MAX} of \
         ttrpc; make the container's spec smaller"
    )]
    TooLong(usize),
    /// The annotation of the cloud volumes can't be right.
    #[error(
        "reading the annotation {CLOUD_VOLUMES}: {0}; see what cloud-api-adaptor makes of the pod's volumes"
    )]
    CloudVolumes(InvalidVolumes),
    /// The cloud volumes are not mounted.
    #[error("mounting the cloud volumes: {0}")]
    NotMounted(#[from] VolumesFault),
    /// Too many requests are held, or too many bytes.
    #[error(
        "waiting for mounts: {HELD_REQUESTS_MAX} requests, or {HELD_BYTES_MAX} bytes of them, wait on this connection \
         already; try again once some are done"
    )]
    TooMany,
    /// All threads that may look at mounts hang.
    #[error(
        "looking at the sources of bind mounts: {MOUNT_THREADS_MAX} threads do so already, and none ended within {:.1} s; \
         check the file systems of the VM",
        .0.as_secs_f32()
    )]
    TooManyThreads(Duration),
    /// The source of a bind mount could not be made.
    #[error("making {}, the source of a bind mount: {source}; check the container's mounts", path.display())]
    Source {
        /// Path of the source.
        path: PathBuf,
        /// Error of the system.
        source: io::Error,
    },
    /// A volume is missing, and may not be made.
    #[error(
        "waiting for the volume {}: it is missing and not made: {why}; name its directory there, or make it in the VM",
        path.display()
    )]
    VolumeLeft {
        /// Path of the volume.
        path: PathBuf,
        /// Why it is not made.
        why: Why,
    },
    /// Nothing was mounted on a volume in time.
    #[error(
        "waiting for the volume {}: nothing was mounted there within {:.1} s; see the log of what mounts it in the VM",
        path.display(),
        waited.as_secs_f32()
    )]
    Volume {
        /// Path of the volume.
        path: PathBuf,
        /// How long it was waited for: the request's timeout, at most `limits::VOLUME_MOUNT`.
        waited: Duration,
    },
    /// The sources of bind mounts were not made in time.
    #[error(
        "making the sources of bind mounts: not done within {:.1} s; check the file systems of the VM",
        .0.as_secs_f32()
    )]
    Sources(Duration),
    /// The request was ready to pass when its timeout had ended.
    #[error(
        "passing the request on: its timeout has ended; give the runtime a longer create_container_timeout"
    )]
    TimedOut,
    /// The VM's mounts could not be read.
    #[error(
        "looking at the VM's mounts: {0}; check that the agent may read /proc/self/mountinfo and start threads"
    )]
    Mounts(io::Error),
}

impl From<EditError> for RequestRefusal {
    fn from(error: EditError) -> Self {
        match error {
            EditError::Malformed(malformed) => Self::Malformed(malformed),
            EditError::Volumes(invalid) => Self::CloudVolumes(invalid),
        }
    }
}

impl RequestRefusal {
    /// The code, from google.rpc.Code.
    fn code(&self) -> u64 {
        match self {
            // INVALID_ARGUMENT
            Self::Malformed(_) | Self::CloudVolumes(_) => 3,
            Self::NotMounted(fault) => fault.code(),
            // DEADLINE_EXCEEDED
            Self::Volume { .. } | Self::Sources(_) | Self::TimedOut => 4,
            // RESOURCE_EXHAUSTED
            Self::FrameTooLong(_)
            | Self::AnswerTooLong(_)
            | Self::TooLong(_)
            | Self::TooMany
            | Self::TooManyThreads(_) => 8,
            // FAILED_PRECONDITION
            Self::Source { .. } | Self::VolumeLeft { .. } => 9,
            // INTERNAL
            Self::Mounts(_) => 13,
        }
    }

    /// Builds the response to the request of this stream, a whole frame.
    pub fn reply(&self, stream: u32) -> Bytes {
        let mut text = self.to_string();
        text.truncate(text.floor_char_boundary(TEXT_MAX));
        self.with_text(stream, &text)
    }

    /// A response of some 30 bytes, for a client that does not read those it has: with the code, without the text.
    pub fn short_reply(&self, stream: u32) -> Bytes {
        self.with_text(stream, "")
    }

    fn with_text(&self, stream: u32, text: &str) -> Bytes {
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
