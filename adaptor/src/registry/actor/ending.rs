//! `suspend`, `stop` and `forget`, and the retries of a deletion.

use std::sync::Arc;

use tokio::sync::OwnedSemaphorePermit;

use super::{Actor, Ending, Teardown};
use crate::deadline::Deadline;
use crate::pod::{PodEvent, PodState};
use crate::registry::error::AdaptorError;
use crate::registry::operation::{
    Deletion, KBS_DELETE, KBS_DELETE_SILENT, Marked, close, delete, deletion_cause, forget, mark_ending,
};
use crate::registry::retry::{Stopped, Undone};
use crate::store::PodLock;
use crate::text::with_causes;

impl Ending {
    /// Whether the pod's record is to be deleted.
    fn deletes(&self) -> bool {
        !self.stops.is_empty() || !self.forgets.is_empty() || self.retry.is_some()
    }
}

impl Actor {
    /// Cancels all that a `suspend`, `stop` or `forget` overtakes.
    pub(super) fn end(&mut self) -> &mut Ending {
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
        if let Some(reply) = self.channel.as_mut().and_then(super::Channel::take_waiter) {
            let error = self.stopped();
            self.answer(reply, Err(error));
        }
        self.ending.get_or_insert_default()
    }

    pub(super) fn advance_ending(&mut self) {
        let Some(ending) = &mut self.ending else { return };
        let deletes = ending.deletes();
        if let Some(teardown) = &ending.teardown {
            // A suspend does not wait for the KBS.
            if matches!(teardown, Teardown::Deleting { .. } | Teardown::Forgetting(_)) {
                self.answer_suspends();
            }
            return;
        }
        if self.operation.is_some() {
            return;
        }
        // Before anything else: a process that is killed from now on leaves a pod that is ended, not resumed.
        if deletes && !ending.marked {
            let work = mark_ending(self.id.clone(), Arc::clone(&self.shared), self.lock.is_some());
            ending.teardown = Some(Teardown::Marking(Box::pin(work)));
            return;
        }
        if let Some(channel) = &self.channel {
            channel.stop(if deletes { "the pod is being deleted" } else { "the adaptor ends" });
            return;
        }
        if let Some(served) = self.served.take() {
            ending.teardown = Some(Teardown::Closing(Box::pin(close(Some(served)))));
            return;
        }
        if deletes {
            self.begin_deletion();
            return self.answer_suspends();
        }
        let suspended = !ending.suspends.is_empty();
        self.answer_suspends();
        self.ending = None;
        if suspended {
            // A later process continues the deletion of a pod that was ended before.
            self.undone = None;
        }
    }

    fn answer_suspends(&mut self) {
        let Some(ending) = &mut self.ending else { return };
        let suspends = std::mem::take(&mut ending.suspends);
        suspends.into_iter().for_each(|reply| self.answer(reply, Ok(())));
    }

    fn begin_deletion(&mut self) {
        let Some(ending) = &mut self.ending else { return };
        let (id, shared, publication) = (self.id.clone(), Arc::clone(&self.shared), self.publication.clone());
        if !ending.forgets.is_empty() {
            ending.teardown = Some(Teardown::Forgetting(Box::pin(forget(id, shared, publication))));
            return;
        }
        let deadline = Deadline::after(if self.kbs_is_silent { KBS_DELETE_SILENT } else { KBS_DELETE });
        let deletion = Deletion { untouched: self.untouched, deadline };
        let work = Box::pin(delete(id, shared, publication, deletion));
        ending.teardown = Some(Teardown::Deleting { work, deadline });
        let last_error = self.undone.as_ref().and_then(|undone| undone.last_error.clone());
        self.status.status.set_state(PodState::Ending { last_error });
    }

    pub(super) fn on_marked(&mut self, lock: Option<PodLock>, marked: Marked) {
        self.lock = lock.or(self.lock.take());
        let Some(ending) = &mut self.ending else { return };
        ending.teardown = None;
        ending.marked = true;
        ending.has_record = !matches!(marked, Marked::NoRecord) || self.undone.is_some();
        match marked {
            Marked::Saved | Marked::NoRecord => {}
            Marked::NotSaved(error) => tracing::error!(
                "pod {}: it is being ended, and that cannot be saved: {}: the end goes on, but if the process restarts \
                 before it is done the pod is resumed: make the store writable",
                self.id,
                with_causes(&error)
            ),
            Marked::NotOurs(error) => {
                ending.marked = false;
                ending.retry = None;
                if self.undone.is_some() {
                    self.undo(with_causes(&error));
                }
                let Some(ending) = &mut self.ending else { return };
                if let Some(reply) = ending.stops.pop_front() {
                    self.answer(reply, Err(error.into()));
                } else if let Some(reply) = ending.forgets.pop() {
                    self.answer(reply, Err(error.into()));
                }
            }
        }
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
        ending.retry = None;
        self.publication = self.shared.publication(&self.id);
        match result {
            Ok(()) => {
                let stops = std::mem::take(&mut ending.stops);
                self.untouched = true;
                self.deleted();
                stops.into_iter().for_each(|reply| self.answer(reply, Ok(Stopped::Done)));
            }
            Err(error) if ending.has_record => {
                let first = ending.stops.pop_front();
                self.undo(deletion_cause(&error));
                if let Some(reply) = first {
                    self.answer(reply, Ok(Stopped::Retried(error)));
                }
            }
            Err(error) => {
                let first = ending.stops.pop_front();
                self.status.status.set_state(PodState::Stopped);
                if let Some(reply) = first {
                    self.answer(reply, Err(error));
                }
            }
        }
    }

    pub(super) fn on_forgotten(&mut self, result: Result<Vec<String>, AdaptorError>) {
        let Some(ending) = &mut self.ending else { return };
        ending.teardown = None;
        // A stop that waits finds no record any more.
        ending.marked = false;
        let first = ending.forgets.pop();
        self.publication = self.shared.publication(&self.id);
        if result.is_ok() {
            self.deleted();
        } else if let Err(error) = &result {
            self.undo(deletion_cause(error));
        }
        if let Some(reply) = first {
            self.answer(reply, result);
        }
    }

    fn deleted(&mut self) {
        // It was that of the record that is gone.
        self.lock = None;
        self.status.status.set_state(PodState::Stopped);
        if self.undone.take().is_some_and(|undone| undone.last_error.is_some()) {
            self.status.status.emit(&PodEvent::Deleted);
        }
    }

    /// The deletion has failed, and is retried.
    fn undo(&mut self, cause: String) {
        let undone = self.undone.get_or_insert_with(|| Undone::of_before(&self.shared.retries));
        let differs = undone.failed(cause.clone());
        if differs {
            self.status.status.emit(&PodEvent::DeleteFailed(cause.clone()));
        }
        self.status.status.set_state(PodState::Ending { last_error: Some(cause) });
    }

    /// A `prepare` could not complete the deletion of an earlier pod of this id.
    pub(super) fn deletion_failed(&mut self, result: &Result<(), AdaptorError>) {
        match result {
            Err(AdaptorError::Ending { cause, .. }) => self.undo(cause.clone()),
            _ if self.undone.is_some() => {
                let last_error = self.undone.as_ref().and_then(|undone| undone.last_error.clone());
                self.status.status.set_state(PodState::Ending { last_error });
            }
            result => self.failed(result),
        }
    }

    pub(super) fn retry_deletion(&mut self, permit: OwnedSemaphorePermit) {
        self.ending = Some(Ending { retry: Some(permit), ..Ending::default() });
    }
}
