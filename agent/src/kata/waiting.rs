//! Held requests, each of which waits for its mounts in a task. None outlives the runtime's interest in it: its own timeout, or the
//! connection.

use secure_comms_protocol::limits::VOLUME_MOUNT;
use tokio::task::{JoinError, JoinSet};
use tokio::time::Instant;

use super::budget::Budget;
use super::mounts;
use super::reply::RequestRefusal;
use super::requests::Held;
use super::sources::MountPrefixes;

/// The held requests of one stream, within the budget of its connection. Dropped with the stream.
#[derive(Debug)]
pub(super) struct Waiting {
    tasks: JoinSet<Ready>,
    budget: Budget,
    prefixes: MountPrefixes,
}

/// The end of a wait: the request, or the stream that is refused and why.
pub(super) type Ready = Result<Held, (u32, RequestRefusal)>;

impl Waiting {
    /// No requests yet. Sources of bind mounts are made below the `prefixes`.
    pub(super) fn within(budget: Budget, prefixes: MountPrefixes) -> Self {
        Self { tasks: JoinSet::new(), budget, prefixes }
    }

    /// Holds a request until its mounts are ready, at most until its own timeout or for [`VOLUME_MOUNT`].
    ///
    /// # Errors
    /// Too many requests, or too many bytes of them, are held on the connection.
    pub(super) fn hold(&mut self, mut held: Held) -> Result<(), RequestRefusal> {
        if !self.budget.hold(&mut held.room, held.frame.len()) {
            return Err(RequestRefusal::TooMany);
        }
        let limit = Instant::now() + VOLUME_MOUNT;
        let end = held.deadline.map_or(limit, |deadline| deadline.min(limit));
        let mounts = std::mem::take(&mut held.mounts);
        let (threads, prefixes) = (self.budget.threads().clone(), self.prefixes.clone());
        self.tasks.spawn(async move {
            match mounts::prepare(mounts, prefixes, end, threads).await {
                Ok(()) => Ok(held),
                Err(refusal) => Err((held.stream, refusal)),
            }
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
        let Some(ready) = self.tasks.join_next().await else { return std::future::pending().await };
        ready
    }

    /// Drops every request; returns how many there were.
    pub(super) fn drop_all(&mut self) -> usize {
        std::mem::take(&mut self.tasks).len()
    }
}
