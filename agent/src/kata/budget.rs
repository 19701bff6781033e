//! What one session, or one SSH connection without a session, may hold of requests to the kata agent, on all streams of the
//! tunnel together: without it each of hundreds of streams could hold as much.

use std::sync::Arc;

use bytes::Bytes;
use secure_comms_protocol::limits::{
    CONNECTION_REPLIES_MAX, CONNECTION_REPLIES_WITH_TEXT_MAX, HELD_BYTES_MAX, HELD_REQUESTS_MAX,
    MOUNT_THREADS_MAX,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The budget of a session, or of a connection. Clones share it.
#[derive(Clone, Debug)]
pub(super) struct Budget {
    requests: Arc<Semaphore>,
    bytes: Arc<Semaphore>,
    replies: Arc<Semaphore>,
    /// One for each thread that looks at mounts, of all connections: a thread may outlive its request.
    threads: Arc<Semaphore>,
}

impl Default for Budget {
    fn default() -> Self {
        Self::with_threads(Arc::new(Semaphore::new(MOUNT_THREADS_MAX)))
    }
}

impl Budget {
    fn with_threads(threads: Arc<Semaphore>) -> Self {
        Self {
            requests: Arc::new(Semaphore::new(HELD_REQUESTS_MAX)),
            bytes: Arc::new(Semaphore::new(HELD_BYTES_MAX)),
            replies: Arc::new(Semaphore::new(CONNECTION_REPLIES_MAX)),
            threads,
        }
    }

    /// The budget of another connection. The threads are the same.
    pub(super) fn of_another_connection(&self) -> Self {
        Self::with_threads(self.threads.clone())
    }

    /// Takes room for a frame of this many bytes; none if there is not that much.
    pub(super) fn room(&self, bytes: usize) -> Option<Room> {
        let mut room = Room::default();
        self.grow(&mut room, bytes).then_some(room)
    }

    /// Takes room for a request that waits, whose frame has this many bytes now. Returns whether there was.
    pub(super) fn hold(&self, room: &mut Room, bytes: usize) -> bool {
        let more = bytes.saturating_sub(room.bytes.as_ref().map_or(0, OwnedSemaphorePermit::num_permits));
        room.request = self.requests.clone().try_acquire_owned().ok();
        room.request.is_some() && self.grow(room, more)
    }

    fn grow(&self, room: &mut Room, more: usize) -> bool {
        // More than u32 counts is more than there is.
        let more = u32::try_from(more).unwrap_or(u32::MAX);
        let Ok(taken) = self.bytes.clone().try_acquire_many_owned(more) else { return false };
        match &mut room.bytes {
            Some(bytes) => bytes.merge(taken),
            bytes => *bytes = Some(taken),
        }
        true
    }

    /// Takes room for one of our replies; none if as many wait as may.
    pub(super) fn reply(&self) -> Option<OwnedSemaphorePermit> {
        self.replies.clone().try_acquire_owned().ok()
    }

    /// Whether another reply on the connection may have a text.
    pub(super) fn allows_text(&self) -> bool {
        CONNECTION_REPLIES_MAX - self.replies.available_permits() < CONNECTION_REPLIES_WITH_TEXT_MAX
    }

    /// The permits of the threads that look at mounts.
    pub(super) fn threads(&self) -> &Arc<Semaphore> {
        &self.threads
    }
}

/// A frame that passes. Its room is given back when the kata agent's socket has taken it: a kata agent that stalls must not
/// make the frames of all streams pile up.
struct Passing {
    frame: Bytes,
    _room: Room,
}

impl AsRef<[u8]> for Passing {
    fn as_ref(&self) -> &[u8] {
        &self.frame
    }
}

/// Room for one request, given back on drop.
#[derive(Debug, Default)]
pub(super) struct Room {
    bytes: Option<OwnedSemaphorePermit>,
    request: Option<OwnedSemaphorePermit>,
}

impl Room {
    /// Binds the room to the frame: it is given back when the last part of the frame is dropped.
    pub(super) fn bind(mut self, frame: Bytes) -> Bytes {
        // The request waits no longer.
        self.request = None;
        Bytes::from_owner(Passing { frame, _room: self })
    }
}
