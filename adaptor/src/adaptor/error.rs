//! Why something could not be done for a pod.

use secure_comms_keys::KeyError;
use secure_comms_protocol::PodId;
use secure_comms_tunnel::inbound::BindError;

use crate::kbs::KbsError;
use crate::store::StoreError;

/// Why something could not be done for a pod.
#[derive(Debug, thiserror::Error)]
pub enum AdaptorError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The KBS failed.
    #[error(transparent)]
    Kbs(#[from] KbsError),
    /// An inbound can't listen.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// A key of the store can't be used.
    #[error("use a key of the store")]
    Key(#[from] KeyError),
    /// The pod has not been prepared.
    #[error("pod {0}: it is not prepared: prepare it first")]
    NotPrepared(PodId),
    /// The pod has been started.
    #[error("pod {0}: it is started already: stop it first")]
    AlreadyStarted(PodId),
    /// There is nothing to connect to.
    #[error("start pod {0}: no address: give at least one")]
    NoAddress(PodId),
    /// The pod did not come up.
    #[error("start pod {pod}: {reason}")]
    StartFailed {
        /// The pod.
        pod: PodId,
        /// Why.
        reason: String,
    },
    /// The pod did not come up in time.
    #[error(
        "start pod {pod}: not up within {seconds} s; last seen: {last_seen}; see that the VM runs and its agent is reached, or give it more time"
    )]
    Deadline {
        /// The pod.
        pod: PodId,
        /// The deadline, in seconds.
        seconds: u64,
        /// The last word on each thing that keeps the pod from coming up.
        last_seen: String,
    },
}
