//! What the commands do that `suspend` and `stop` do not overtake.

use super::{Actor, Publishing};
use crate::pod::{PodEvent, PodState};
use crate::registry::command::Command;
use crate::registry::error::AdaptorError;
use crate::registry::operation::{Acquired, Operation, Then, Work};
use crate::registry::retry::Undone;
use crate::text::with_causes;

impl Actor {
    pub(super) fn accept(&mut self, command: Command) {
        match command {
            Command::Open { name, reply } => self.open_stream(name, reply),
            Command::Suspend { reply } => self.end().suspends.push(reply),
            Command::Stop { reply } => self.end().stops.push_back(reply),
            Command::Forget { reply } => self.end().forgets.push(reply),
            // It cannot succeed, and must not wait for the KBS.
            Command::Start(order) if self.ending.is_some() && self.queue.is_empty() => {
                let error = AdaptorError::NotPrepared(self.id.clone());
                self.answer(order.reply, Err(error));
            }
            command => self.queue.push_back(command),
        }
    }

    pub(super) fn refuse(&mut self, command: Command) {
        let error = self.stopped();
        match command {
            Command::Prepare { reply, .. } => self.answer(reply, Err(error)),
            Command::RestoreListeners { reply } => self.answer(reply, Err(error)),
            Command::Resume { reply } => self.answer(reply, Err(error)),
            Command::PublishKeys { reply } | Command::Suspend { reply } => self.answer(reply, Err(error)),
            Command::Stop { reply } => self.answer(reply, Err(error)),
            Command::Forget { reply } => self.answer(reply, Err(error)),
            Command::Start(order) => self.answer(order.reply, Err(error)),
            Command::Open { reply, .. } => self.answer(reply, Err(error)),
        }
    }

    /// Begins whatever can begin.
    pub(super) fn advance(&mut self) {
        if self.ending.is_some() {
            self.advance_ending();
        }
        while self.ending.is_none() && self.operation.is_none() {
            // A publication of a pod that is served has its own place; the others follow it in the queue.
            let waits =
                matches!(self.queue.front(), Some(Command::PublishKeys { .. })) && self.publishing.is_some();
            match self.queue.pop_front() {
                Some(command) if waits => {
                    self.queue.push_front(command);
                    break;
                }
                Some(command) => self.begin(command),
                None => break,
            }
        }
    }

    pub(super) fn begin(&mut self, command: Command) {
        let (context, (cancel, step)) = self.context();
        let (then, work, deadline): (_, Work<_>, _) = match command {
            Command::Prepare { spec, deadline, reply } => {
                if self.served.is_none() {
                    self.status.status.set_state(PodState::Preparing);
                }
                self.untouched = false;
                (Then::Prepared(reply), Box::pin(context.prepare(spec, deadline)), Some(deadline))
            }
            Command::RestoreListeners { reply } => (Then::Restored(reply), Box::pin(context.restore()), None),
            Command::Resume { reply } => (Then::Resumed(reply), Box::pin(context.restore()), None),
            Command::PublishKeys { reply } if self.served.is_some() => {
                let work = Box::pin(context.publish_keys());
                self.publishing = Some(Publishing { work, reply: Some(reply) });
                return;
            }
            Command::PublishKeys { reply } => {
                (Then::Published(reply), Box::pin(context.publish_keys()), None)
            }
            Command::Start(order) => {
                let refused = match (&self.served, &self.channel) {
                    (None, _) => AdaptorError::NotPrepared(self.id.clone()),
                    (_, Some(_)) => AdaptorError::AlreadyStarted(self.id.clone()),
                    _ => {
                        let (addresses, deadline) = (order.addresses.clone(), order.deadline);
                        let work = Box::pin(context.save_addresses(addresses));
                        let then = Then::Start(order);
                        let deadline = Some(deadline);
                        self.operation = Some(Operation { then, work, cancel, step, deadline });
                        return;
                    }
                };
                return self.answer(order.reply, Err(refused));
            }
            // They do not wait in the queue.
            command @ (Command::Suspend { .. }
            | Command::Stop { .. }
            | Command::Forget { .. }
            | Command::Open { .. }) => {
                return self.accept(command);
            }
        };
        self.operation = Some(Operation { then, work, cancel, step, deadline });
    }

    pub(super) fn on_operated(&mut self, acquired: Acquired, result: Result<(), AdaptorError>) {
        let Some(operation) = self.operation.take() else { return };
        self.untouched |= acquired.untouched;
        self.kbs_is_silent = matches!(result, Err(AdaptorError::Stopped(_)));
        if acquired.published {
            self.republish.published();
            self.status.status.emit(&PodEvent::Published);
        }
        if acquired.ended {
            self.undone = None;
            self.lock = None;
            self.status.status.emit(&PodEvent::Deleted);
        }
        // A failed operation keeps what an earlier one has acquired, and nothing else.
        if result.is_ok() {
            self.lock = acquired.lock.or(self.lock.take());
            if let Some(served) = acquired.served {
                self.status.status.prepared(served.endpoints.clone());
                self.served = Some(served);
            }
            if let Some(labels) = acquired.labels {
                self.status.status.labelled(labels);
            }
            if let (Some(served), Some(init_data)) = (&mut self.served, acquired.init_data) {
                self.status.status.bound(init_data.clone());
                served.init_data = init_data;
            }
        } else if self.served.is_none() && acquired.ending && !acquired.ended {
            self.lock = acquired.lock.or(self.lock.take());
            self.deletion_failed(&result);
        } else if self.served.is_none() {
            self.failed(&result);
        }
        let endpoints = || self.served.as_ref().map(|served| served.endpoints.clone());
        match operation.then {
            Then::Prepared(reply) => {
                let result = result.map(|()| endpoints().unwrap_or_default());
                self.answer(reply, result);
            }
            Then::Restored(reply) => {
                let result = result.map(|()| endpoints());
                self.answer(reply, result);
            }
            Then::Published(reply) => self.answer(reply, result),
            Then::Resumed(reply) if acquired.ending => {
                if result.is_ok() {
                    self.undone = Some(Undone::of_before(&self.shared.retries));
                    self.status.status.set_state(PodState::Ending { last_error: None });
                }
                self.answer(reply, result.map(|()| false));
            }
            Then::Resumed(reply) => {
                let resumes = result.is_ok() && !acquired.addresses.is_empty() && self.ending.is_none();
                if resumes {
                    self.open_channel(acquired.addresses, None);
                }
                self.answer(reply, result.map(|()| resumes));
            }
            Then::Start(order) => match result {
                Ok(()) if self.ending.is_none() => {
                    self.open_channel(order.addresses.clone(), Some(order));
                }
                Ok(()) => {
                    let error = self.stopped();
                    self.answer(order.reply, Err(error));
                }
                Err(error) => self.answer(order.reply, Err(error)),
            },
        }
    }

    pub(super) fn failed(&self, result: &Result<(), AdaptorError>) {
        if let Err(error) = result {
            self.status.status.set_state(match error {
                AdaptorError::Stopped(_) => PodState::Stopped,
                error => PodState::Failed { reason: with_causes(error) },
            });
        }
    }
}
