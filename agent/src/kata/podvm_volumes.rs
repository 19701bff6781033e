//! Asks `podvm-volumes`, the program in the VM that mounts cloud volumes, over its unix socket: the agent has no right to mount.

use std::io;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use log::Level;
use secure_comms_protocol::volumes::{Answer, Failure, FailureKind, LINE_MAX, Request, Volume};
use secure_comms_tunnel::Reminder;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep_until, timeout_at};

use super::cloud_volumes::{MOUNT_BASE, path_of};
use crate::os::log_limits::VOLUMES;

/// Where `podvm-volumes` listens in our image.
pub const SOCKET: &str = "/run/podvm-volumes/volumes.sock";
/// The longest text of another program in a log line or a refusal, in characters.
const TEXT_MAX: usize = 512;

/// Why volumes are not mounted, or not unmounted.
#[derive(Debug, thiserror::Error)]
pub enum VolumesFault {
    /// Nothing listens on the socket.
    #[error(
        "connecting to podvm-volumes at {}: {cause}; its service must run in the VM, and -secure-comms-volumes-socket \
         name its socket",
        socket.display()
    )]
    Unreachable {
        /// Path of the socket.
        socket: PathBuf,
        /// Error of the system.
        cause: io::Error,
    },
    /// The request does not fit into a line.
    #[error("the request to podvm-volumes is longer than {LINE_MAX} bytes; give the container fewer volumes")]
    RequestTooLong,
    /// The connection broke.
    #[error("the connection to podvm-volumes: {0}; see its log in the VM")]
    Connection(io::Error),
    /// It gave no answer, or none that is one.
    #[error("podvm-volumes {0}; see its log in the VM, and check that it and the agent are of one version")]
    Answer(&'static str),
    /// It refused.
    #[error("{}", harmless(&.0.message))]
    Failed(Failure),
    /// It did not answer in time.
    #[error("podvm-volumes did not answer within {:.1} s; see its log in the VM", .0.as_secs_f32())]
    Late(Duration),
}

impl VolumesFault {
    /// The code, from google.rpc.Code.
    pub(super) fn code(&self) -> u64 {
        match self {
            // INVALID_ARGUMENT
            Self::RequestTooLong | Self::Failed(Failure { kind: FailureKind::Invalid, .. }) => 3,
            // DEADLINE_EXCEEDED
            Self::Late(_) => 4,
            // NOT_FOUND
            Self::Failed(Failure { kind: FailureKind::NoDisk, .. }) => 5,
            // FAILED_PRECONDITION
            Self::Unreachable { .. } | Self::Failed(Failure { kind: FailureKind::Refused, .. }) => 9,
            // INTERNAL
            Self::Connection(_)
            | Self::Answer(_)
            | Self::Failed(Failure { kind: FailureKind::Internal, .. }) => 13,
        }
    }
}

/// The program that mounts volumes. Clones share what was asked of it.
#[derive(Clone, Debug)]
pub(super) struct PodvmVolumes {
    socket: Arc<Path>,
    /// Whether a volume may be mounted.
    in_use: Arc<AtomicBool>,
}

impl Default for PodvmVolumes {
    fn default() -> Self {
        Self::at(SOCKET.as_ref())
    }
}

impl PodvmVolumes {
    /// The one that listens at this path.
    pub(super) fn at(socket: &Path) -> Self {
        // Mounts outlive the agent: one that was restarted has to have them unmounted all the same.
        let in_use = std::fs::read_dir(MOUNT_BASE).is_ok_and(|mut entries| entries.next().is_some());
        Self { socket: socket.into(), in_use: Arc::new(in_use.into()) }
    }

    /// Whether a volume may be mounted: one was asked for since all were unmounted.
    pub(super) fn is_in_use(&self) -> bool {
        self.in_use.load(Ordering::Relaxed)
    }

    /// Has the volumes mounted, each at its own path, at most until `end`. Dropped or late, it closes the connection, and
    /// `podvm-volumes` gives up.
    ///
    /// # Errors
    /// Not all are mounted.
    pub(super) async fn mount(&self, volumes: Vec<Volume>, end: Instant) -> Result<(), VolumesFault> {
        let names: Vec<_> = volumes.iter().map(|volume| &*volume.name).collect();
        let names = names.join(", ");
        let paths: Vec<_> = volumes.iter().map(path_of).collect();
        log::log!(
            VOLUMES.level(Level::Info),
            "tunnel KATAAGENT: a container has the cloud volumes {names}; asking podvm-volumes to mount them"
        );
        // Before the answer: also what failed may have mounted some of them.
        self.in_use.store(true, Ordering::Relaxed);
        let request = Request::Mount(volumes);
        let mut reminder = Reminder::start();
        let mut asked = pin!(self.ask(&request));
        let answer = loop {
            tokio::select! {
                biased;
                answer = &mut asked => break answer?,
                () = sleep_until(end) => return Err(VolumesFault::Late(reminder.waited())),
                () = reminder.due() => log::log!(
                    VOLUMES.level(Level::Warn),
                    "tunnel KATAAGENT: a container waits for its cloud volumes {names}: podvm-volumes has not answered; \
                     {:.0} s left",
                    end.saturating_duration_since(Instant::now()).as_secs_f32()
                ),
            }
        };
        match answer {
            Answer::Mounted(mounted)
                if mounted.iter().map(Path::new).eq(paths.iter().map(PathBuf::as_path)) => {}
            Answer::Mounted(_) => return Err(VolumesFault::Answer("mounted the volumes somewhere else")),
            Answer::Unmounted => return Err(VolumesFault::Answer("unmounted volumes instead")),
            Answer::Failed(failure) => return Err(VolumesFault::Failed(failure)),
        }
        log::log!(
            VOLUMES.level(Level::Info),
            "tunnel KATAAGENT: the cloud volumes {names} are mounted after {:.1} s",
            reminder.waited().as_secs_f32()
        );
        Ok(())
    }

    /// Has all volumes unmounted, so that what was written reaches their disks before the VM ends, at most until `end`. Logs a
    /// fault: a pod that ends can do nothing about it.
    pub(super) async fn unmount(&self, end: Instant) {
        let start = Instant::now();
        let asked = timeout_at(end, self.ask(&Request::UnmountAll)).await;
        let fault = match asked.unwrap_or_else(|_| Err(VolumesFault::Late(start.elapsed()))) {
            Ok(Answer::Unmounted) => {
                self.in_use.store(false, Ordering::Relaxed);
                let took = start.elapsed().as_secs_f32();
                log::info!(
                    "tunnel KATAAGENT: the pod ends, its cloud volumes are unmounted after {took:.1} s"
                );
                return;
            }
            Ok(Answer::Failed(failure)) => VolumesFault::Failed(failure),
            Ok(Answer::Mounted(_)) => VolumesFault::Answer("mounted volumes instead"),
            Err(fault) => fault,
        };
        log::warn!(
            "tunnel KATAAGENT: the pod ends, and its cloud volumes are not unmounted: {fault}; what was not written to \
             their disks yet may be lost"
        );
    }

    async fn ask(&self, request: &Request) -> Result<Answer, VolumesFault> {
        let mut line =
            serde_json::to_vec(request).map_err(|error| VolumesFault::Connection(io::Error::other(error)))?;
        line.push(b'\n');
        if line.len() > LINE_MAX {
            return Err(VolumesFault::RequestTooLong);
        }
        let mut stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|cause| VolumesFault::Unreachable { socket: self.socket.to_path_buf(), cause })?;
        stream.write_all(&line).await.map_err(VolumesFault::Connection)?;
        let mut answer = Vec::new();
        let mut reader = BufReader::new(stream).take(LINE_MAX as u64);
        reader.read_until(b'\n', &mut answer).await.map_err(VolumesFault::Connection)?;
        if answer.last() != Some(&b'\n') {
            let is_long = answer.len() == LINE_MAX;
            return Err(VolumesFault::Answer(if is_long {
                "gave too long an answer"
            } else {
                "gave no answer"
            }));
        }
        serde_json::from_slice(&answer)
            .map_err(|_| VolumesFault::Answer("gave an answer that is not in its protocol"))
    }
}

/// The text of another program, in one line of a bounded length.
fn harmless(text: &str) -> String {
    text.chars().take(TEXT_MAX).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
#[path = "podvm_volumes_tests.rs"]
mod tests;
