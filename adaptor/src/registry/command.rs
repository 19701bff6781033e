//! What the owner of an adaptor can ask of a pod.

use secure_comms_protocol::TunnelName;
use tokio::sync::oneshot;

use super::error::AdaptorError;
use super::retry::Stopped;
use super::shared::PodSpec;
use crate::address::Address;
use crate::deadline::Deadline;
use crate::pod::Endpoint;
use crate::transport::routes::KubernetesLink;

/// Receives the result of a command. The caller may have dropped its future: then nothing waits for the result.
pub(super) type Reply<T> = oneshot::Sender<Result<T, AdaptorError>>;

/// A command to a pod's task.
#[derive(Debug)]
pub(super) enum Command {
    Prepare {
        spec: PodSpec,
        deadline: Deadline,
        reply: Reply<Vec<Endpoint>>,
    },
    RestoreListeners {
        reply: Reply<Option<Vec<Endpoint>>>,
    },
    /// False if the pod was never started, or is served already.
    Resume {
        reply: Reply<bool>,
    },
    PublishKeys {
        reply: Reply<()>,
    },
    Start(StartOrder),
    /// For a stream of the caller's: it is opened outside the pod's task.
    Open {
        name: TunnelName,
        reply: Reply<KubernetesLink>,
    },
    Suspend {
        reply: Reply<()>,
    },
    Stop {
        reply: Reply<Stopped>,
    },
    /// Answers with the resources that may stay in the KBS.
    Forget {
        reply: Reply<Vec<String>>,
    },
}

/// A start: where, until when, and who waits for it.
#[derive(Debug)]
pub(super) struct StartOrder {
    pub(super) addresses: Vec<Address>,
    pub(super) deadline: Deadline,
    pub(super) reply: Reply<()>,
}
