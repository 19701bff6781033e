//! Held requests, each of which waits for its volumes and mounts in a task. None outlives the runtime's interest in it: its own timeout, or the
//! connection.

use secure_comms_protocol::limits::{VOLUME_MOUNT, VOLUMES_UNMOUNT};
use secure_comms_protocol::volumes::Request as VolumesRequest;
use tokio::task::{JoinError, JoinSet};
use tokio::time::Instant;

use super::budget::Budget;
use super::mounts;
use super::podvm_volumes::PodvmVolumes;
use super::reply::RequestRefusal;
use super::requests::{Held, Out};
use super::sources::MountPrefixes;

/// The held requests of one stream, within the budget of its connection. Dropped with the stream.
#[derive(Debug)]
pub(super) struct Waiting {
    tasks: JoinSet<Ready>,
    budget: Budget,
    means: Means,
}

/// What a request waits with.
#[derive(Clone, Debug)]
pub(super) struct Means {
    /// Directories below which sources of bind mounts are made.
    pub(super) prefixes: MountPrefixes,
    /// The program that mounts cloud volumes.
    pub(super) volumes: PodvmVolumes,
}

/// The end of a wait: the request, or the stream that is refused and why.
pub(super) type Ready = Result<Held, (u32, RequestRefusal)>;

impl Waiting {
    /// No requests yet.
    pub(super) fn within(budget: Budget, means: Means) -> Self {
        Self { tasks: JoinSet::new(), budget, means }
    }

    /// Holds a request until its volumes and mounts are ready, at most until its own timeout or for [`VOLUME_MOUNT`]. Returns
    /// what becomes of one that is not held: it is refused if too many requests, or too many bytes of them, are held on the
    /// connection; one that only unmounts passes then, as it does if nothing is mounted.
    pub(super) fn hold(&mut self, mut held: Held) -> Option<Out> {
        let unmounts = held.volumes == Some(VolumesRequest::UnmountAll);
        if unmounts && !self.means.volumes.is_in_use() {
            return Some(held.passing());
        }
        if !self.budget.hold(&mut held.room, held.frame.len()) {
            let refused = Out::Refuse { stream: held.stream, refusal: RequestRefusal::TooMany };
            return Some(if unmounts { held.passing() } else { refused });
        }
        let now = Instant::now();
        let limit = now + VOLUME_MOUNT;
        let end = held.deadline.map_or(limit, |deadline| deadline.min(limit));
        let stream = held.stream;
        let (volumes, mounts) = (held.volumes.take(), std::mem::take(&mut held.mounts));
        let (threads, means) = (self.budget.threads().clone(), self.means.clone());
        self.tasks.spawn(async move {
            let ready = async {
                match volumes {
                    Some(VolumesRequest::Mount(volumes)) => means.volumes.mount(volumes, end).await?,
                    // The kata agent needs time for its answer too.
                    Some(VolumesRequest::UnmountAll) => {
                        means.volumes.unmount((now + VOLUMES_UNMOUNT).min(now + (end - now) / 2)).await;
                    }
                    None => {}
                }
                mounts::prepare(mounts, means.prefixes, end, threads).await
            };
            ready.await.map(|()| held).map_err(|refusal| (stream, refusal))
        });
        None
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
