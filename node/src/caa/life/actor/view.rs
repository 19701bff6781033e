//! What others may know of a life while it goes on.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

/// What others may know of a life.
#[derive(Clone, Debug, Default)]
pub(in crate::caa::life) struct View(Arc<Mutex<Seen>>);

/// See [`View`].
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::caa::life) struct Seen {
    /// The address at which the pod is started.
    pub(in crate::caa::life) vm: Option<IpAddr>,
    /// The runtime is connected.
    pub(in crate::caa::life) relaying: bool,
    /// Dials that wait.
    pub(in crate::caa::life) held: usize,
}

impl View {
    pub(in crate::caa::life) fn get(&self) -> Seen {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set(&self, seen: Seen) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = seen;
    }
}
