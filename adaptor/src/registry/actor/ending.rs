//! `suspend` and `stop`.

use std::sync::Arc;

use super::{Actor, Ending, Teardown};
use crate::deadline::Deadline;
use crate::pod::PodState;
use crate::registry::error::AdaptorError;
use crate::registry::operation::{Deletion, KBS_DELETE, KBS_DELETE_SILENT, close, delete};

impl Actor {
    /// Cancels all that a `suspend` or `stop` overtakes.
    pub(super) fn end(&mut self, reason: &'static str) -> &mut Ending {
        for command in std::mem::take(&mut self.queue) {
            self.refuse(command);
        }
        if let Some(operation) = &self.operation {
            operation.cancel.send_replace(true);
        }
        if let Some(publishing) = self.publishing.take() {
            self.kbs_is_silent = true;
            if let Some(reply) = publishing.reply {
                let error = self.stopped();
                self.answer(reply, Err(error));
            }
        }
        if let Some(channel) = &mut self.channel {
            if let Some(reply) = channel.take_waiter() {
                let error = AdaptorError::Stopped(self.id.clone());
                self.answers.push(Box::new(move || drop(reply.send(Err(error)))));
            }
            channel.stop(reason);
        }
        self.ending.get_or_insert_default()
    }

    pub(super) fn advance_ending(&mut self) {
        let Some(ending) = &mut self.ending else { return };
        let closing = matches!(ending.teardown, Some(Teardown::Closing(_)));
        if self.operation.is_some() || self.channel.is_some() || closing {
            return;
        }
        if let Some(served) = self.served.take() {
            ending.teardown = Some(Teardown::Closing(Box::pin(close(Some(served)))));
            return;
        }
        // They do not wait for the KBS.
        let suspends = std::mem::take(&mut ending.suspends);
        if ending.stops.is_empty() {
            self.ending = None;
        } else if ending.teardown.is_none() {
            let (id, shared) = (self.id.clone(), Arc::clone(&self.shared));
            let deadline = Deadline::after(if self.kbs_is_silent { KBS_DELETE_SILENT } else { KBS_DELETE });
            let deletion = Deletion { locked: self.lock.is_some(), untouched: self.untouched, deadline };
            let work = Box::pin(delete(id, shared, self.publication.clone(), deletion));
            ending.teardown = Some(Teardown::Deleting { work, deadline });
        }
        suspends.into_iter().for_each(|reply| self.answer(reply, Ok(())));
    }

    pub(super) fn on_closed(&mut self) {
        if let Some(ending) = &mut self.ending {
            ending.teardown = None;
        }
        // What a later command finds is in the store.
        self.publication = self.shared.publication(&self.id);
        self.status.status.closed();
        self.status.status.set_state(PodState::Stopped);
    }

    /// The other stops that wait need nothing more, or try again.
    pub(super) fn on_deleted(&mut self, result: Result<(), AdaptorError>) {
        let Some(ending) = &mut self.ending else { return };
        ending.teardown = None;
        let first = ending.stops.pop_front();
        self.publication = self.shared.publication(&self.id);
        if result.is_ok() {
            self.untouched = true;
            let stops = std::mem::take(&mut ending.stops);
            stops.into_iter().for_each(|reply| self.answer(reply, Ok(())));
        }
        if let Some(reply) = first {
            self.answer(reply, result);
        }
    }
}
