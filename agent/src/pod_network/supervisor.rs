//! The supervisor: sets the pod's network up, with retries, and undoes it when the agent stops.

use std::future::Future;
use std::pin::pin;
use std::time::Duration;

use secure_comms_protocol::limits::POD_NETWORK_UNDO;
use secure_comms_tunnel::Backoff;
use tokio::sync::watch;
use tokio::time::timeout;

use super::error::PodNetworkError;
use super::secondary;
use super::setup::{PodNetwork, log_remarks};
use crate::os::log_limits::Repeated;

/// Time that a second interface on its way has after the undo's timeout. A move takes milliseconds, but every request to the
/// kernel may wait for others.
const SECONDARY_WAIT: Duration = Duration::from_secs(30);

/// Retries one step until it succeeds, with backoff, and reports its state.
struct RetryLoop<'a> {
    action: &'static str,
    failure: Repeated,
    backoff: Backoff,
    status: &'a watch::Sender<String>,
}

impl<'a> RetryLoop<'a> {
    fn new(action: &'static str, status: &'a watch::Sender<String>) -> Self {
        status.send_replace(action.to_owned());
        Self { action, failure: Repeated::new(action), backoff: Backoff::default(), status }
    }

    async fn failed(&mut self, error: PodNetworkError) {
        self.status.send_replace(format!("{}: {error}", self.action));
        self.failure.failed(&error);
        self.backoff.pause().await;
    }

    fn succeeded(mut self) {
        self.status.send_replace(String::new());
        self.failure.succeeded();
    }
}

impl PodNetwork {
    /// Sets the network up, with retries and without a limit, and undoes it when `stop` completes. `status` names the failing
    /// step; it is empty once the network is up. Failures are only reported: without a network the pod does not work, but the
    /// worker node still reaches the kata agent.
    pub(crate) async fn supervise(self, status: watch::Sender<String>, stop: impl Future<Output = ()>) {
        let mut stop = pin!(stop);
        log_remarks(&self.spec.remarks);
        tokio::select! {
            () = self.set_up_with_retries(&status) => {
                if self.spec.external {
                    self.attach_secondary(&status, stop.as_mut()).await;
                } else {
                    stop.await;
                }
            }
            () = stop.as_mut() => {}
        }
        match timeout(POD_NETWORK_UNDO, self.tear_down()).await {
            Ok(Ok(())) => log::info!("pod network: undone"),
            Ok(Err(error)) => log::warn!("pod network: {error}"),
            Err(_) => {
                log::warn!("pod network: undoing it timed out; the next start undoes the rest");
                // Except a second interface on its way: only this process knows its addresses.
                if timeout(SECONDARY_WAIT, self.secondary.lock()).await.is_err() {
                    log::warn!(
                        "pod network: the second interface still moves; see `ip address` for its addresses"
                    );
                }
            }
        }
    }

    async fn set_up_with_retries(&self, status: &watch::Sender<String>) {
        let mut attempts = RetryLoop::new("setting up the pod network", status);
        while let Err(error) = self.set_up().await {
            attempts.failed(error).await;
        }
        attempts.succeeded();
    }

    /// Moves the second interface, with retries. Returns when `stop` completes.
    async fn attach_secondary(
        &self,
        status: &watch::Sender<String>,
        mut stop: impl Future<Output = ()> + Unpin,
    ) {
        let mut attempts = RetryLoop::new("moving the VM's second interface to the pod", status);
        loop {
            let find = async {
                // An earlier attempt may have left it in the pod's namespace.
                self.reclaim_secondary().await?;
                secondary::find(self.host_interface.as_ref()).await
            };
            let found = tokio::select! {
                found = find => found,
                () = &mut stop => return,
            };
            // Not cancelled by `stop`: a move takes milliseconds.
            let moved = match found {
                Ok(second) => self.move_secondary(second).await,
                Err(error) => Err(error),
            };
            let Err(error) = moved else { break };
            tokio::select! {
                () = attempts.failed(error) => {}
                () = &mut stop => return,
            }
        }
        attempts.succeeded();
        stop.await;
    }
}
