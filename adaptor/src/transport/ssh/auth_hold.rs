//! What an attempt waits for between its handshake and its authentication.

use std::sync::Arc;

use tokio::sync::{Mutex, OwnedMutexGuard, watch};

/// Attempts that share a lock authenticate one at a time, and the winner keeps the lock for the life of its connection.
///
/// An agent replaces an older Kubernetes peer by a newer one. Without the lock, two addresses of one VM would replace
/// each other's connection.
#[derive(Clone, Debug, Default)]
pub(crate) struct AuthLock(Arc<Mutex<()>>);

impl AuthLock {
    pub(super) async fn acquire(self) -> OwnedMutexGuard<()> {
        self.0.lock_owned().await
    }
}

/// Holds attempts before authentication while an older connection may still be alive: an agent that authenticates a new
/// connection gives the old one up. Open, unless made closed.
#[derive(Clone, Debug)]
pub(crate) struct AuthHold(watch::Sender<HoldState>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum HoldState {
    Closed,
    HandshakeDone,
    Open,
}

impl Default for AuthHold {
    fn default() -> Self {
        Self(watch::Sender::new(HoldState::Open))
    }
}

impl AuthHold {
    /// A hold that keeps every attempt waiting until it is opened.
    pub(crate) fn closed() -> Self {
        Self(watch::Sender::new(HoldState::Closed))
    }

    pub(super) fn is_open(&self) -> bool {
        *self.0.borrow() == HoldState::Open
    }

    /// Lets every attempt authenticate from now on.
    pub(crate) fn open(&self) {
        self.0.send_replace(HoldState::Open);
    }

    /// Waits until an attempt has completed its handshake with an agent and is held.
    pub(crate) async fn handshake_done(&self) {
        self.until(|state| *state != HoldState::Closed).await;
    }

    /// Notes a completed handshake, and waits until the hold is open.
    pub(super) async fn wait(&self) {
        self.0.send_if_modified(|state| {
            let closed = *state == HoldState::Closed;
            if closed {
                *state = HoldState::HandshakeDone;
            }
            closed
        });
        self.until(|state| *state == HoldState::Open).await;
    }

    async fn until(&self, wanted: impl FnMut(&HoldState) -> bool) {
        // The wait cannot fail: the sender is `self`.
        drop(self.0.subscribe().wait_for(wanted).await);
    }
}
