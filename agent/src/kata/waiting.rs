//! Held requests, each of which waits for its mounts in a task. None outlives the runtime's interest in it: its own timeout, or the
//! connection.

use secure_comms_protocol::limits::{HELD_BYTES_MAX, HELD_REQUESTS_MAX, VOLUME_MOUNT};
use tokio::task::{JoinError, JoinSet};
use tokio::time::Instant;

use super::mounts;
use super::reply::RequestRefusal;
use super::requests::Held;
use super::sources::MountPrefixes;

/// The held requests of one connection. Dropped with the tunnel.
#[derive(Debug)]
pub(super) struct Waiting {
    tasks: JoinSet<Waited>,
    bytes: usize,
    prefixes: MountPrefixes,
}

/// The end of a wait: the request, or the stream that is refused and why.
pub(super) type Ready = Result<Held, (u32, RequestRefusal)>;

#[derive(Debug)]
struct Waited {
    bytes: usize,
    ready: Ready,
}

impl Waiting {
    /// Holds nothing yet. Sources of bind mounts are made below the `prefixes`.
    pub(super) fn new(prefixes: MountPrefixes) -> Self {
        Self { tasks: JoinSet::new(), bytes: 0, prefixes }
    }

    /// Holds a request until its mounts are ready, at most until its own timeout or for [`VOLUME_MOUNT`].
    ///
    /// # Errors
    /// Too many requests, or too many bytes of them, are held.
    pub(super) fn hold(&mut self, mut held: Held) -> Result<(), RequestRefusal> {
        let bytes = held.frame.len();
        if self.tasks.len() >= HELD_REQUESTS_MAX || self.bytes + bytes > HELD_BYTES_MAX {
            return Err(RequestRefusal::TooMany);
        }
        self.bytes += bytes;
        let limit = Instant::now() + VOLUME_MOUNT;
        let end = held.deadline.map_or(limit, |deadline| deadline.min(limit));
        let mounts = std::mem::take(&mut held.mounts);
        let prefixes = self.prefixes.clone();
        self.tasks.spawn(async move {
            let ready = match mounts::prepare(mounts, prefixes, end).await {
                Ok(()) => Ok(held),
                Err(refusal) => Err((held.stream, refusal)),
            };
            Waited { bytes, ready }
        });
        Ok(())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.tasks.is_empty()
    }

    /// Waits for the next request that is ready or refused. Never returns if none is held: then a released request waits
    /// for the end of a frame, which the next messages bring. Cancellation safe.
    ///
    /// # Errors
    /// A task panicked.
    pub(super) async fn next(&mut self) -> Result<Ready, JoinError> {
        let Some(waited) = self.tasks.join_next().await else { return std::future::pending().await };
        let Waited { bytes, ready } = waited?;
        self.bytes -= bytes;
        Ok(ready)
    }

    /// Drops every request; returns how many there were.
    pub(super) fn drop_all(&mut self) -> usize {
        self.bytes = 0;
        std::mem::take(&mut self.tasks).len()
    }
}
