//! What becomes of the sandboxes, for those that follow them: coalesced by sandbox, so that nothing is lost and nothing grows.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use secure_comms_protocol::PodId;
use tokio::sync::Notify;

use crate::caa::sandbox::Sandbox;

/// A change of the pods directory.
#[derive(Clone, Debug)]
pub enum Change {
    /// A sandbox is there. The first for a sandbox, and again if it was gone in between.
    Appeared(Arc<Sandbox>),
    /// Its file has another content.
    Changed(Arc<Sandbox>),
    /// Its file, or its directory, is not there any more. This alone does not say that its VM is gone.
    Gone(PodId),
    /// Its file cannot be used. What was read of it before remains. Once for each content.
    Broken {
        /// The sandbox.
        id: PodId,
        /// Why, in one line.
        reason: String,
    },
}

impl Change {
    /// The sandbox.
    pub fn id(&self) -> &PodId {
        match self {
            Self::Appeared(sandbox) | Self::Changed(sandbox) => &sandbox.id,
            Self::Gone(id) | Self::Broken { id, .. } => id,
        }
    }
}

/// The changes for one receiver: first what is there, as [`Change::Appeared`], then what changes.
///
/// A receiver that is slow gets the last state of a sandbox, not each one: so it holds as many changes as there are
/// sandboxes, and misses none that still matters.
#[derive(Debug)]
pub struct Changes(Arc<Pending>);

impl Changes {
    /// The next change; waits for it. Dropping the future loses none.
    pub async fn next(&mut self) -> Change {
        loop {
            if let Some(change) = self.try_next() {
                return change;
            }
            self.0.added.notified().await;
        }
    }

    /// The next change, if there is one now.
    pub fn try_next(&mut self) -> Option<Change> {
        self.0.queue().pop()
    }
}

#[derive(Debug, Default)]
struct Pending {
    queue: Mutex<Queue>,
    added: Notify,
}

impl Pending {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// At most two changes for each sandbox: its state, and what is wrong with its file.
#[derive(Debug, Default)]
struct Queue {
    order: VecDeque<(PodId, bool)>,
    last: HashMap<(PodId, bool), Change>,
}

impl Queue {
    fn push(&mut self, change: Change) {
        let broken = matches!(change, Change::Broken { .. });
        let key = (change.id().clone(), broken);
        if !broken {
            // A later state of the file is good, or there is none.
            let broken = (key.0.clone(), true);
            if self.last.remove(&broken).is_some() {
                self.order.retain(|waiting| *waiting != broken);
            }
        }
        let change = match (self.last.get(&key), change) {
            // The receiver has not heard of it yet.
            (Some(Change::Appeared(_)), Change::Changed(sandbox)) => Change::Appeared(sandbox),
            (_, change) => change,
        };
        if self.last.insert(key.clone(), change).is_none() {
            self.order.push_back(key);
        }
    }

    fn pop(&mut self) -> Option<Change> {
        let key = self.order.pop_front()?;
        self.last.remove(&key)
    }
}

/// All receivers.
#[derive(Debug, Default)]
pub(super) struct Receivers(Vec<Weak<Pending>>);

impl Receivers {
    /// A new receiver, which begins with `first`.
    pub(super) fn add(&mut self, first: impl Iterator<Item = Change>) -> Changes {
        let pending = Arc::new(Pending::default());
        for change in first {
            pending.queue().push(change);
        }
        self.0.retain(|receiver| receiver.strong_count() > 0);
        self.0.push(Arc::downgrade(&pending));
        Changes(pending)
    }

    pub(super) fn send(&self, change: &Change) {
        for receiver in self.0.iter().filter_map(Weak::upgrade) {
            receiver.queue().push(change.clone());
            receiver.added.notify_one();
        }
    }
}
