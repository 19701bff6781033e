//! Deletes the pod's key from the KBS once the VM has it, before the first local client is served: from the first
//! container on, every process in the VM could read it there.

use std::time::Duration;

use secure_comms_protocol::{Kubernetes, PhaseName};
use secure_comms_tunnel::Backoff;

use super::connect::Connected;
use super::driver::{Driver, Stop, stopped};
use super::failover::await_failover;
use crate::kbs::KbsError;
use crate::publication::{Publication, PublicationError};
use crate::text::with_causes;
use crate::transport::session::Session;
use crate::transport::ssh::AuthLock;

/// The time for one deletion, its retries included. After it the operator learns why there is no end yet.
const WITHDRAW: Duration = Duration::from_secs(10);

/// How a deletion ended.
pub(super) enum Withdrawal {
    /// The key is not in the KBS.
    Done,
    /// The pod is stopped.
    Stopped(Stop),
    /// The connection ended first.
    Ended(String),
    /// A failover replaced the connection first.
    Replaced(Box<Connected>),
}

impl Driver {
    /// Deletes the key from the KBS, and retries until it is gone or the connection ends. Without a wait if it is gone.
    pub(super) async fn withdraw_key(&mut self, session: &mut Session<Kubernetes>) -> Withdrawal {
        let Some(publication) = self.plan.publication.clone() else { return Withdrawal::Done };
        let (plan, liveness, mut stop) = (self.plan.clone(), session.liveness(), self.stop.clone());
        let lock = AuthLock::default();
        tokio::select! {
            biased;
            () = self.until_gone(&publication) => Withdrawal::Done,
            stop = stopped(&mut stop) => Withdrawal::Stopped(stop),
            why = session.ended() => Withdrawal::Ended(why.to_string()),
            connected = await_failover(&plan, &liveness, PhaseName::Kubernetes, &lock) => Withdrawal::Replaced(Box::new(connected)),
        }
    }

    async fn until_gone(&self, publication: &Publication) {
        let mut backoff = Backoff::default();
        loop {
            match publication.withdraw(WITHDRAW).await {
                Ok(was_there) => {
                    if was_there {
                        self.status.withdrawn();
                    }
                    return;
                }
                Err(error) => {
                    let why = format!("the pod's key could not be deleted from the KBS: {}", cause(&error));
                    self.status.withdraw_failed(&why);
                    self.set_degraded(why);
                }
            }
            backoff.pause().await;
        }
    }
}

/// Without the number of tries, so that a failure that repeats is reported once.
fn cause(error: &PublicationError) -> String {
    match error {
        PublicationError::Kbs(KbsError::Unreachable { url, last, advice, .. }) => {
            format!("KBS at {url}: {last}{advice}; no client is served until it is")
        }
        error => format!("{}; no client is served until it is", with_causes(error)),
    }
}
