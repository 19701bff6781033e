//! What a caller waits for, for the operator.

use secure_comms_protocol::limits::{WAIT_REPEAT, WAIT_REPORT};
use tokio::time::Instant;

use super::{Actor, Ending, Teardown};
use crate::deadline::Deadline;
use crate::key_source::KeySource;
use crate::pod::PodEvent;
use crate::registry::channel::Channel;

impl Actor {
    /// What a caller waits for now, and until when.
    pub(super) fn waits_for(&self) -> Option<(String, Option<Deadline>)> {
        if let Some(Ending { teardown: Some(Teardown::Deleting { deadline, .. }), stops, .. }) = &self.ending
            && !stops.is_empty()
        {
            let KeySource::Kbs(kbs) = &self.shared.key_source else { return None };
            return Some((format!("the KBS at {} to delete the pod's key", kbs.url()), Some(*deadline)));
        }
        if let Some(operation) = &self.operation {
            return Some((operation.step.borrow().clone(), operation.deadline));
        }
        let deadline = self.channel.as_ref().and_then(Channel::waiting_until)?;
        Some((format!("the VM: {}", self.status.status.last_seen()), Some(deadline)))
    }

    pub(super) fn schedule_report(&mut self) {
        self.next_report = match (self.waits_for(), self.next_report) {
            (None, _) => None,
            (Some(_), None) => Some(Instant::now() + WAIT_REPORT),
            (Some(_), at) => at,
        };
    }

    pub(super) fn report(&mut self) {
        self.next_report = Some(Instant::now() + WAIT_REPEAT);
        if let Some((what, deadline)) = self.waits_for() {
            let left = deadline.map(|deadline| deadline.left());
            self.status.status.emit(&PodEvent::Waiting { what, left });
        }
    }
}
