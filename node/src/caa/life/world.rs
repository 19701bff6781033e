//! What the lives of the sandboxes need of the rest of the service.

use std::future::Future;
use std::net::IpAddr;
use std::sync::Arc;

use secure_comms_protocol::PodId;

use super::super::Sandbox;
use super::super::directory::{Change, Changes};
use super::machine::{ReleaseFailure, StartFailure};
use crate::pods::Runtime;

/// A dial of cloud-api-adaptor, or of a stranger, that waits in its handshake. Dropping it closes it.
pub(super) trait Dial: Send + 'static {
    /// The VM that is dialled.
    fn vm(&self) -> IpAddr;

    /// The server name that it asks for, fit for a log.
    fn server_name(&self) -> String;

    /// Completes when it is of no more use, and says why: the other end has closed it, mostly.
    fn closed(&mut self) -> impl Future<Output = String> + Send;

    /// Closes it, and says why.
    fn refuse(self, reason: &str);

    /// Closes it: newer ones took its place.
    fn supersede(self);
}

/// The changes of the pods directory.
pub(super) trait Directory: Send {
    /// The next change.
    fn next(&mut self) -> impl Future<Output = Change> + Send;
}

impl Directory for Changes {
    async fn next(&mut self) -> Change {
        Self::next(self).await
    }
}

/// A failure, with its reason for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failed<F> {
    pub(super) failure: F,
    pub(super) reason: String,
}

/// The adaptor, the directory and the connections. Its operations may take as long as they like: each life waits for its
/// own only.
pub(super) trait World: Send + Sync + 'static {
    /// A held dial.
    type Dial: Dial;
    /// A connection whose handshake has ended.
    type Client: Send + 'static;
    /// A stream to a kata agent.
    type Stream: Send + 'static;

    /// The sandbox that is dialled. The error is its reason; it may change with the directory.
    fn sandbox_of(&self, dial: &Self::Dial) -> impl Future<Output = Result<Arc<Sandbox>, String>> + Send;

    /// Publishes the keys.
    fn prepare(&self, sandbox: &Sandbox) -> impl Future<Output = Result<(), String>> + Send;

    /// Starts the pod at this address, or waits for a start there, until it is up.
    fn start(&self, id: &PodId, vm: IpAddr) -> impl Future<Output = Result<(), Failed<StartFailure>>> + Send;

    /// Suspends the pod's channel.
    fn halt(&self, id: &PodId) -> impl Future<Output = ()> + Send;

    /// Stops the pod.
    fn stop(&self, id: &PodId) -> impl Future<Output = Result<(), String>> + Send;

    /// Waits until the pod is up, and asks its kata agent whether it answers, on a stream that is closed after it.
    fn check(&self, id: &PodId) -> impl Future<Output = Result<(), Failed<ReleaseFailure>>> + Send;

    /// Waits until the pod is up, and opens a stream to its kata agent.
    fn open(&self, id: &PodId) -> impl Future<Output = Result<Self::Stream, Failed<ReleaseFailure>>> + Send;

    /// Ends the handshake of a dial.
    fn finish(
        &self,
        dial: Self::Dial,
        sandbox: &Sandbox,
    ) -> impl Future<Output = Result<Self::Client, String>> + Send;

    /// Relays until either side ends, and says why it ended.
    fn relay(
        &self,
        id: &PodId,
        client: Self::Client,
        stream: Self::Stream,
    ) -> impl Future<Output = String> + Send;

    /// Completes once the pod has ended, or was down for longer than its runtime waits.
    fn until_down(&self, id: &PodId) -> impl Future<Output = ()> + Send;

    /// Shows how the runtime's connection is.
    fn show(&self, id: &PodId, runtime: Runtime);

    /// Shows what keeps the pod from being used; `None`: nothing does.
    fn obstacle(&self, id: &PodId, sandbox: Option<&Sandbox>, reason: Option<String>);
}
