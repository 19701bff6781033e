//! Errors of the operations on a pod.

use secure_comms_keys::KeyError;
use secure_comms_protocol::{PodId, TunnelName};
use secure_comms_tunnel::inbound::BindError;

use super::listen_path::PathError;
use crate::kbs::KbsError;
use crate::publication::PublicationError;
use crate::store::StoreError;

/// Error of an operation on a pod. Its text says what to do next.
#[derive(Debug, thiserror::Error)]
pub enum AdaptorError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The KBS failed.
    #[error(transparent)]
    Kbs(#[from] KbsError),
    /// An inbound cannot listen.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The unix path of an inbound cannot be used for the pod.
    #[error(transparent)]
    Path(#[from] PathError),
    /// A key of the store is invalid.
    #[error("use a key of the store")]
    Key(#[from] KeyError),
    /// The VMs get their keys from their user data, and this pod has none in the store.
    #[error("pod {0} has no key here: run user-data first (wrong --store?)")]
    NoKey(PodId),
    /// A `stop` or `suspend` of the pod came while the call was under way.
    #[error("pod {0}: stopped while this was under way: prepare it again if it is still wanted")]
    Stopped(PodId),
    /// The pod's task ended unexpectedly: a panic, or the runtime that ran it is gone.
    #[error(
        "pod {0}: its task ended unexpectedly: prepare it again, and report the panic if the log has one"
    )]
    TaskEnded(PodId),
    /// The pod was not prepared in time.
    #[error(
        "prepare pod {pod}: not done within {seconds} s, waiting for {waiting_for}; allow more time (--deadline)"
    )]
    PrepareDeadline {
        /// Id of the pod.
        pod: PodId,
        /// Length of the deadline, in seconds.
        seconds: u64,
        /// What was waited for.
        waiting_for: String,
    },
    /// The KBS did not delete the pod's key. The key is still in the store, so that the pod can be stopped again.
    #[error(
        "stop pod {pod}: {resource} may still be in the KBS: {cause}; then stop the pod again, or delete it from the KBS by hand"
    )]
    NotDeleted {
        /// Id of the pod.
        pod: PodId,
        /// The resource that may still be in the KBS.
        resource: String,
        /// Why. It is part of the text.
        cause: Box<KbsError>,
    },
    /// The pod is being ended, and its keys are not deleted yet.
    #[error("pod {pod}: it is being ended, and its earlier keys must be deleted first: {cause}")]
    Ending {
        /// Id of the pod.
        pod: PodId,
        /// Why that is not done. It is part of the text.
        cause: String,
    },
    /// The pod is not prepared.
    #[error("pod {0}: not prepared: prepare it first")]
    NotPrepared(PodId),
    /// The pod is started already.
    #[error("pod {0}: already started: stop it first")]
    AlreadyStarted(PodId),
    /// A stream cannot be opened.
    #[error("pod {pod}: tunnel {tunnel}: {reason}")]
    NotOpened {
        /// Id of the pod.
        pod: PodId,
        /// The tunnel.
        tunnel: TunnelName,
        /// Why.
        reason: String,
    },
    /// The call names no address.
    #[error("start pod {0}: no address: give at least one")]
    NoAddress(PodId),
    /// The start failed before its deadline.
    #[error("start pod {pod}: {reason}")]
    StartFailed {
        /// Id of the pod.
        pod: PodId,
        /// Cause of the failure, and what to do.
        reason: String,
    },
    /// The agent has the pod's key, and runs with what is not expected.
    #[error("start pod {pod}: {reason}")]
    UnexpectedAgent {
        /// Id of the pod.
        pod: PodId,
        /// The differences, and what to do about each.
        reason: String,
    },
    /// The Kubernetes phase was not up at the deadline.
    #[error(
        "start pod {pod}: not up within {seconds} s; last seen: {last_seen}{}",
        deadline_advice(.last_seen)
    )]
    Deadline {
        /// Id of the pod.
        pod: PodId,
        /// Length of the deadline, in seconds.
        seconds: u64,
        /// The last error of each kind.
        last_seen: String,
    },
}

impl From<PublicationError> for AdaptorError {
    fn from(error: PublicationError) -> Self {
        match error {
            PublicationError::Store(error) => error.into(),
            PublicationError::Kbs(error) => error.into(),
            PublicationError::Key(error) => error.into(),
        }
    }
}

/// The advice after the last error, unless that has its own: two would contradict each other.
fn deadline_advice(last_seen: &str) -> &'static str {
    let advised = ["; check ", "; give ", "; make ", "; if ", ": check ", ": make ", ": update it"];
    if advised.iter().any(|advice| last_seen.contains(advice)) {
        return "";
    }
    "; check that the VM runs and its agent can be reached, or allow more time (--deadline)"
}
