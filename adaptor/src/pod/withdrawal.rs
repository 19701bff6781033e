//! Deletes the pod's key from the KBS once the VM has it, before the first local client is served: from the first
//! container on, every process in the VM could read it there.

use std::time::Duration;

use secure_comms_tunnel::Backoff;

use super::status::StatusReporter;
use crate::kbs::KbsError;
use crate::publication::{Publication, PublicationError};
use crate::text::with_causes;

/// The time for one deletion, its retries included. After it the operator learns why there is no end yet.
const WITHDRAW: Duration = Duration::from_secs(10);

/// What a key that can't be deleted costs before the first client of a session.
pub(super) const CLIENTS_WAIT: &str = "no client is served until it is";
/// The same while a session's streams go on: they are not held up.
pub(super) const READABLE: &str = "processes of the VM can read it until it is";

/// Deletes the key, and retries until it is gone; returns without a wait if it is. `failed` gets the cause of each failure,
/// with its `cost`.
///
/// Cancellation: the key may still be there, and the next call deletes it.
pub(super) async fn until_gone(
    publication: &Publication,
    status: &StatusReporter,
    cost: &str,
    failed: impl Fn(String),
) {
    let mut backoff = Backoff::default();
    loop {
        match publication.withdraw(WITHDRAW).await {
            Ok(was_there) => {
                if was_there {
                    status.withdrawn();
                }
                return;
            }
            Err(error) => {
                let why = format!("the pod's key could not be deleted from the KBS: {}", cause(&error, cost));
                status.withdraw_failed(&why);
                failed(why);
            }
        }
        backoff.pause().await;
    }
}

/// Without the number of tries, so that a failure that repeats is reported once.
fn cause(error: &PublicationError, cost: &str) -> String {
    match error {
        PublicationError::Kbs(KbsError::Unreachable { url, last, advice, .. }) => {
            format!("KBS at {url}: {last}{advice}; {cost}")
        }
        error => format!("{}; {cost}", with_causes(error)),
    }
}
