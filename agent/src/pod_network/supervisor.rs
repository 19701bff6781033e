//! Keeps the pod's network up as long as the agent lives.

use std::future::Future;
use std::pin::pin;

use secure_comms_protocol::limits::POD_NETWORK_UNDO;
use secure_comms_tunnel::Backoff;
use tokio::sync::watch;
use tokio::time::timeout;

use super::error::PodNetworkError;
use super::secondary;
use super::setup::PodNetwork;
use crate::os::log_limits::Repeated;

/// A part of the network that is tried until it works.
struct RetryLoop<'a> {
    doing: &'static str,
    failure: Repeated,
    backoff: Backoff,
    trouble: &'a watch::Sender<String>,
}

impl<'a> RetryLoop<'a> {
    fn new(doing: &'static str, trouble: &'a watch::Sender<String>) -> Self {
        trouble.send_replace(doing.to_owned());
        Self { doing, failure: Repeated::new(doing), backoff: Backoff::default(), trouble }
    }

    async fn failed(&mut self, error: PodNetworkError) {
        self.trouble.send_replace(format!("{}: {error}", self.doing));
        self.failure.failed(&error);
        self.backoff.pause().await;
    }

    fn succeeded(mut self) {
        self.trouble.send_replace(String::new());
        self.failure.succeeded();
    }
}

impl PodNetwork {
    /// Sets the network up, trying again for ever, and undoes it once `stop` comes. `trouble` says what is missing;
    /// nothing when all is up. The pod can't do without its network, but the worker node can reach the kata agent: so a
    /// failure is told, and ends nothing.
    pub(crate) async fn supervise(self, trouble: watch::Sender<String>, stop: impl Future<Output = ()>) {
        let mut stop = pin!(stop);
        tokio::select! {
            () = self.set_up_with_retries(&trouble) => {
                if self.spec.external {
                    self.attach_secondary(&trouble, stop.as_mut()).await;
                } else {
                    stop.await;
                }
            }
            () = stop.as_mut() => {}
        }
        match timeout(POD_NETWORK_UNDO, self.tear_down()).await {
            Ok(Ok(())) => log::info!("pod network: undone"),
            Ok(Err(error)) => log::warn!("pod network: {error}"),
            Err(_) => log::warn!("pod network: undoing it took too long; the next start does the rest"),
        }
    }

    async fn set_up_with_retries(&self, trouble: &watch::Sender<String>) {
        let mut trying = RetryLoop::new("setting up the pod network", trouble);
        while let Err(error) = self.set_up().await {
            trying.failed(error).await;
        }
        trying.succeeded();
    }

    /// Returns when it is time to stop.
    async fn attach_secondary(
        &self,
        trouble: &watch::Sender<String>,
        mut stop: impl Future<Output = ()> + Unpin,
    ) {
        let mut trying = RetryLoop::new("moving the VM's second interface to the pod", trouble);
        loop {
            let found = tokio::select! {
                found = secondary::find(self.host_interface.as_ref()) => found,
                () = &mut stop => return,
            };
            // The move itself is short, and whole or not at all.
            let given = match found {
                Ok(second) => self.move_secondary(second).await,
                Err(error) => Err(error),
            };
            let Err(error) = given else { break };
            tokio::select! {
                () = trying.failed(error) => {}
                () = &mut stop => return,
            }
        }
        trying.succeeded();
        stop.await;
    }
}
