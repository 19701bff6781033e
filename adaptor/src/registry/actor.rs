//! A pod's task: it owns the pod's state, and does what the commands in its queue ask.
//!
//! ```text
//! commands --> queue --> operation (keys, listeners, KBS) --> channel (the driver) --> teardown (listeners, KBS, store)
//!                  \---- stop, suspend: cancel what is under way, and come first ----/
//! ```
//! Nothing else changes the state, and all of it is dropped with the task. Every wait is one branch of one `select`, so
//! the task accepts a command at any time.

use std::collections::VecDeque;
use std::future::pending;
use std::sync::{Arc, Weak};
use std::time::Duration;

use secure_comms_protocol::PodId;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};

use super::channel::{Channel, Republish};
use super::command::{Command, Reply, StartOrder};
use super::error::AdaptorError;
use super::operation::{
    Acquired, Context, Deletion, KBS_DELETE, KBS_DELETE_SILENT, Operation, Served, Then, Work, close, delete,
};
use super::pods::Pods;
use super::shared::Shared;
use crate::address::Address;
use crate::deadline::Deadline;
use crate::key_source::KeySource;
use crate::pod::{Ended, Entry, LOST, PodEvent, PodSnapshot, PodState, StatusReporter};
use crate::store::PodLock;
use crate::text::with_causes;

/// Whoever waits for longer than this is shown what for.
const FIRST_REPORT: Duration = Duration::from_secs(1);
/// The interval of the reports after the first one.
const REPORT_INTERVAL: Duration = Duration::from_secs(15);

/// One pod's task.
pub(super) struct Actor {
    /// First, so that it is dropped first: those that wait for a command's result find the state up to date.
    status: EndGuard,
    id: PodId,
    shared: Arc<Shared>,
    pods: Weak<Pods>,
    commands: mpsc::UnboundedReceiver<Command>,
    states: watch::Receiver<PodSnapshot>,
    queue: VecDeque<Command>,
    /// Results that are sent once the state is up to date.
    answers: Vec<Box<dyn FnOnce() + Send>>,
    lock: Option<PodLock>,
    served: Option<Served>,
    operation: Option<Operation>,
    /// Publishes the keys of a pod that is served, while its channel goes on.
    publishing: Option<Publishing>,
    channel: Option<Channel>,
    republish: Republish,
    ending: Option<Ending>,
    /// Whether nothing of the pod can be in the KBS.
    untouched: bool,
    /// Whether the last operation was interrupted while it waited, as a rule for the KBS.
    kbs_is_silent: bool,
    next_report: Option<Instant>,
}

/// The publication of a pod that is served, and the caller that waits for it.
struct Publishing {
    work: Work<(Acquired, Result<(), AdaptorError>)>,
    reply: Option<Reply<()>>,
}

/// A `suspend` or `stop` that is under way.
#[derive(Default)]
struct Ending {
    suspends: Vec<Reply<()>>,
    stops: VecDeque<Reply<()>>,
    teardown: Option<Teardown>,
}

enum Teardown {
    /// The inbounds close.
    Closing(Work<()>),
    /// The KBS's and the store's record are deleted.
    Deleting { work: Work<Result<(), AdaptorError>>, deadline: Deadline },
}

/// What woke the task.
enum Woken {
    Command(Option<Command>),
    Operated(Acquired, Result<(), AdaptorError>),
    Published(Acquired, Result<(), AdaptorError>),
    State,
    StartDeadline,
    ChannelEnded(Ended),
    InboundEnded(String),
    Closed,
    Deleted(Result<(), AdaptorError>),
    Republish,
    Report,
}

impl Actor {
    pub(super) fn new(
        id: PodId,
        shared: Arc<Shared>,
        pods: Weak<Pods>,
        commands: mpsc::UnboundedReceiver<Command>,
        status: StatusReporter,
    ) -> Self {
        let states = status.subscribe();
        Self {
            status: EndGuard { id: id.clone(), status, done: false },
            id,
            shared,
            pods,
            commands,
            states,
            queue: VecDeque::new(),
            answers: Vec::new(),
            lock: None,
            served: None,
            operation: None,
            publishing: None,
            channel: None,
            republish: Republish::default(),
            ending: None,
            untouched: false,
            kbs_is_silent: false,
            next_report: None,
        }
    }

    /// Runs until the pod is stopped and no command is left, or the adaptor is gone.
    pub(super) async fn run(mut self) {
        loop {
            self.advance();
            let left = self.is_idle() && self.leave();
            self.answers.drain(..).for_each(|answer| answer());
            if left {
                break;
            }
            self.schedule_report();
            match self.next().await {
                Woken::Command(Some(command)) => self.accept(command),
                // The adaptor was dropped.
                Woken::Command(None) => {
                    self.status.status.closed();
                    self.status.status.set_state(PodState::Stopped);
                    break;
                }
                Woken::Operated(acquired, result) => self.on_operated(acquired, result),
                Woken::Published(acquired, result) => self.on_published(&acquired, result),
                Woken::State => self.on_state(),
                Woken::StartDeadline => self.on_start_deadline(),
                Woken::ChannelEnded(ended) => self.on_channel_ended(ended),
                Woken::InboundEnded(why) => {
                    self.status.fail(&format!("a listener's task ended: {why}"));
                    break;
                }
                Woken::Closed => self.on_closed(),
                Woken::Deleted(result) => self.on_deleted(result),
                Woken::Republish => self.publish_again(),
                Woken::Report => self.report(),
            }
        }
        self.status.done = true;
    }

    /// Waits for the next thing to do. Dropping the future loses nothing.
    async fn next(&mut self) -> Woken {
        let start_deadline = self.channel.as_ref().and_then(Channel::start_deadline);
        let republish_at = self.republish.due().filter(|_| self.can_publish_again());
        tokio::select! {
            command = self.commands.recv() => Woken::Command(command),
            (acquired, result) = poll(self.operation.as_mut().map(|operation| &mut operation.work)) => {
                Woken::Operated(acquired, result)
            }
            (acquired, result) = poll(self.publishing.as_mut().map(|publishing| &mut publishing.work)) => {
                Woken::Published(acquired, result)
            }
            ended = poll(self.channel.as_mut().map(Channel::work)) => Woken::ChannelEnded(ended),
            // The sender is in `status`.
            _ = self.states.changed() => Woken::State,
            why = inbound_ended(self.served.as_mut()) => Woken::InboundEnded(why),
            woken = tear_down(self.ending.as_mut().and_then(|ending| ending.teardown.as_mut())) => woken,
            () = until(start_deadline) => Woken::StartDeadline,
            () = until(republish_at) => Woken::Republish,
            () = until(self.next_report) => Woken::Report,
        }
    }

    /// Sends the result once the task has brought the state up to date.
    fn answer<T: Send + 'static>(&mut self, reply: Reply<T>, result: Result<T, AdaptorError>) {
        // A caller that dropped its future needs no result.
        self.answers.push(Box::new(move || drop(reply.send(result))));
    }

    fn stopped(&self) -> AdaptorError {
        AdaptorError::Stopped(self.id.clone())
    }

    fn is_idle(&self) -> bool {
        self.queue.is_empty()
            && self.served.is_none()
            && self.operation.is_none()
            && self.publishing.is_none()
            && self.ending.is_none()
    }

    /// Ends the task's entry among the pods, unless a command has arrived. Commands are sent under the same lock.
    fn leave(&mut self) -> bool {
        self.lock = None;
        let Some(pods) = self.pods.upgrade() else { return true };
        let mut pods = pods.lock();
        if !self.commands.is_empty() {
            return false;
        }
        pods.remove(&self.id);
        true
    }

    fn accept(&mut self, command: Command) {
        match command {
            Command::Suspend { reply } => self.end("the adaptor ends").suspends.push(reply),
            Command::Stop { reply } => self.end("the pod is being deleted").stops.push_back(reply),
            // It cannot succeed, and must not wait for the KBS.
            Command::Start(order) if self.ending.is_some() && self.queue.is_empty() => {
                let error = AdaptorError::NotPrepared(self.id.clone());
                self.answer(order.reply, Err(error));
            }
            command => self.queue.push_back(command),
        }
    }

    /// Cancels all that a `suspend` or `stop` overtakes.
    fn end(&mut self, reason: &'static str) -> &mut Ending {
        for command in std::mem::take(&mut self.queue) {
            self.refuse(command);
        }
        if let Some(operation) = &self.operation {
            operation.cancel.send_replace(true);
        }
        if let Some(publishing) = self.publishing.take()
            && let Some(reply) = publishing.reply
        {
            let error = self.stopped();
            self.answer(reply, Err(error));
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

    fn refuse(&mut self, command: Command) {
        let error = self.stopped();
        match command {
            Command::Prepare { reply, .. } => self.answer(reply, Err(error)),
            Command::RestoreListeners { reply } => self.answer(reply, Err(error)),
            Command::Resume { reply } => self.answer(reply, Err(error)),
            Command::PublishKeys { reply } | Command::Suspend { reply } | Command::Stop { reply } => {
                self.answer(reply, Err(error));
            }
            Command::Start(order) => self.answer(order.reply, Err(error)),
        }
    }

    /// Begins whatever can begin.
    fn advance(&mut self) {
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

    fn begin(&mut self, command: Command) {
        let locked = self.lock.is_some();
        let (context, (cancel, step)) =
            Context::new(self.id.clone(), Arc::clone(&self.shared), locked, self.served.is_some());
        let (then, work, deadline): (_, Work<_>, _) = match command {
            Command::Prepare { deadline, reply } => {
                if self.served.is_none() {
                    self.status.status.set_state(PodState::Preparing);
                }
                self.untouched = false;
                (Then::Prepared(reply), Box::pin(context.prepare(deadline)), Some(deadline))
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
            command @ (Command::Suspend { .. } | Command::Stop { .. }) => return self.accept(command),
        };
        self.operation = Some(Operation { then, work, cancel, step, deadline });
    }

    fn on_operated(&mut self, acquired: Acquired, result: Result<(), AdaptorError>) {
        let Some(operation) = self.operation.take() else { return };
        self.untouched |= acquired.untouched;
        self.kbs_is_silent = matches!(result, Err(AdaptorError::Stopped(_)));
        if acquired.published {
            self.republish.published();
        }
        // A failed operation keeps what an earlier one has acquired, and nothing else.
        if result.is_ok() {
            self.lock = acquired.lock.or(self.lock.take());
            if let Some(served) = acquired.served {
                self.status.status.prepared(served.endpoints.clone());
                self.served = Some(served);
            }
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

    fn failed(&self, result: &Result<(), AdaptorError>) {
        if let Err(error) = result {
            self.status.status.set_state(match error {
                AdaptorError::Stopped(_) => PodState::Stopped,
                error => PodState::Failed { reason: with_causes(error) },
            });
        }
    }

    /// Opens the channel: for a start, or again for a pod of an earlier process.
    fn open_channel(&mut self, addresses: Vec<Address>, start: Option<StartOrder>) {
        let Some(served) = &self.served else { return };
        let entry = if start.is_some() { Entry::New } else { Entry::Restarted };
        let plan = Channel::plan(&self.id, &self.shared, served, addresses);
        // Before the driver runs: a start must not take the final state of an earlier one for its own.
        self.status.status.begin();
        self.republish.begin(entry);
        self.channel =
            Some(Channel::open(plan, Arc::clone(&served.routes), self.status.status.clone(), start));
    }

    fn on_state(&mut self) {
        let state = self.states.borrow_and_update().state.clone();
        self.republish.on_state(&state);
        let up = matches!(state, PodState::Up { .. });
        if let Some(channel) = &mut self.channel
            && up
            && let Some(reply) = channel.take_waiter()
        {
            self.answer(reply, Ok(()));
        }
    }

    fn on_start_deadline(&mut self) {
        let last_seen = self.status.status.last_seen();
        if let Some(channel) = &mut self.channel {
            channel.give_up(&self.id, last_seen);
        }
    }

    fn on_channel_ended(&mut self, ended: Ended) {
        let Some(mut channel) = self.channel.take() else { return };
        self.republish.forget();
        if let Some((reply, error, reason)) = channel.take_verdict() {
            self.status.status.set_state(PodState::Failed { reason });
            return self.answer(reply, Err(error));
        }
        match ended {
            Ended::Stopped => {
                self.status.status.set_state(PodState::Stopped);
                self.status.status.emit(&PodEvent::Stopped);
            }
            Ended::VmLost => self.status.status.set_state(PodState::Failed { reason: LOST.into() }),
        }
        if let Some(reply) = channel.take_waiter() {
            let error = match ended {
                Ended::Stopped => self.stopped(),
                Ended::VmLost => AdaptorError::StartFailed { pod: self.id.clone(), reason: LOST.to_owned() },
            };
            self.answer(reply, Err(error));
        }
    }

    fn advance_ending(&mut self) {
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
            let work = Box::pin(delete(id, shared, deletion));
            ending.teardown = Some(Teardown::Deleting { work, deadline });
        }
        suspends.into_iter().for_each(|reply| self.answer(reply, Ok(())));
    }

    fn on_closed(&mut self) {
        if let Some(ending) = &mut self.ending {
            ending.teardown = None;
        }
        self.status.status.closed();
        self.status.status.set_state(PodState::Stopped);
    }

    /// The other stops that wait need nothing more, or try again.
    fn on_deleted(&mut self, result: Result<(), AdaptorError>) {
        let Some(ending) = &mut self.ending else { return };
        ending.teardown = None;
        let first = ending.stops.pop_front();
        if result.is_ok() {
            self.untouched = true;
            let stops = std::mem::take(&mut ending.stops);
            stops.into_iter().for_each(|reply| self.answer(reply, Ok(())));
        }
        if let Some(reply) = first {
            self.answer(reply, result);
        }
    }

    fn can_publish_again(&self) -> bool {
        self.publishing.is_none()
            && self.channel.is_some()
            && self.ending.is_none()
            && self.shared.key_source.attests()
    }

    fn publish_again(&mut self) {
        let locked = self.lock.is_some();
        let (context, _) = Context::new(self.id.clone(), Arc::clone(&self.shared), locked, true);
        self.republish.published();
        self.publishing = Some(Publishing { work: Box::pin(context.publish_keys()), reply: None });
    }

    fn on_published(&mut self, acquired: &Acquired, result: Result<(), AdaptorError>) {
        let Some(publishing) = self.publishing.take() else { return };
        if acquired.published {
            self.republish.published();
        }
        match (publishing.reply, result) {
            (Some(reply), result) => self.answer(reply, result),
            (None, Ok(())) => self.status.status.emit(&PodEvent::PublishedAgain),
            (None, Err(error)) => self.status.status.publish_failed(&with_causes(&error)),
        }
    }

    /// What a caller waits for now, and until when.
    fn waits_for(&self) -> Option<(String, Option<Deadline>)> {
        if let Some(Ending { teardown: Some(Teardown::Deleting { deadline, .. }), .. }) = &self.ending {
            let KeySource::Kbs(kbs) = &self.shared.key_source else { return None };
            return Some((format!("the KBS at {} to delete the pod's key", kbs.url()), Some(*deadline)));
        }
        if let Some(operation) = &self.operation {
            return Some((operation.step.borrow().clone(), operation.deadline));
        }
        let deadline = self.channel.as_ref().and_then(Channel::waiting_until)?;
        Some((format!("the VM: {}", self.status.status.last_seen()), Some(deadline)))
    }

    fn schedule_report(&mut self) {
        self.next_report = match (self.waits_for(), self.next_report) {
            (None, _) => None,
            (Some(_), None) => Some(Instant::now() + FIRST_REPORT),
            (Some(_), at) => at,
        };
    }

    fn report(&mut self) {
        self.next_report = Some(Instant::now() + REPORT_INTERVAL);
        if let Some((what, deadline)) = self.waits_for() {
            let left = deadline.map(|deadline| deadline.left());
            self.status.status.emit(&PodEvent::Waiting { what, left });
        }
    }
}

/// Sets the final state if the task ends without having done so: a panic, an abort, or a runtime that is gone.
struct EndGuard {
    id: PodId,
    status: StatusReporter,
    done: bool,
}

impl EndGuard {
    fn fail(&self, why: &str) {
        let reason = format!("the pod's task ended unexpectedly ({why}): prepare the pod again");
        tracing::error!("pod {}: {reason}", self.id);
        self.status.closed();
        self.status.set_state(PodState::Failed { reason });
    }
}

impl Drop for EndGuard {
    fn drop(&mut self) {
        if !self.done {
            self.fail("a panic, or the runtime is gone");
        }
    }
}

/// The result of work that is under way. Waits for ever if there is none.
async fn poll<T>(work: Option<&mut Work<T>>) -> T {
    match work {
        Some(work) => work.await,
        None => pending().await,
    }
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => pending().await,
    }
}

/// Inbounds serve until they are closed: one that ends has panicked.
async fn inbound_ended(served: Option<&mut Served>) -> String {
    let Some(served) = served else { return pending().await };
    match served.inbounds.join_next().await {
        Some(Ok(())) => "it returned".to_owned(),
        Some(Err(error)) => error.to_string(),
        // No inbound is configured.
        None => pending().await,
    }
}

async fn tear_down(teardown: Option<&mut Teardown>) -> Woken {
    match teardown {
        Some(Teardown::Closing(work)) => {
            work.await;
            Woken::Closed
        }
        Some(Teardown::Deleting { work, .. }) => Woken::Deleted(work.await),
        None => pending().await,
    }
}
