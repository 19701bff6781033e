//! The container runtime's connection to a pod's kata agent, where we carry it.

use std::time::SystemTime;

/// The state of the runtime's connection to a pod's kata agent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Runtime {
    /// None has been seen, or the runtime connects to the pod's socket by itself.
    #[default]
    None,
    /// It waits in its TLS handshake until the pod can be used.
    Held {
        /// When the first one that waits came.
        since: SystemTime,
    },
    /// It is connected.
    Connected {
        /// Since when.
        since: SystemTime,
    },
    /// It has ended. The pod is ended too, unless a new one comes soon.
    Ended {
        /// When it ended.
        since: SystemTime,
        /// Why.
        reason: String,
    },
}
