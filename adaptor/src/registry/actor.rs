//! A pod's task: it owns the pod's state, and does what the commands in its queue ask.
//!
//! ```text
//! commands --> queue --> operation (keys, listeners, KBS) --> channel (the driver) --> teardown (listeners, KBS, store)
//!                  \---- stop, suspend, forget: cancel what is under way, and come first ----/
//! ```
//! Nothing else changes the state, and all of it is dropped with the task. Every wait is one branch of one `select`, so
//! the task accepts a command at any time.

mod commands;
mod connection;
mod ending;
mod report;

use std::collections::VecDeque;
use std::future::pending;
use std::sync::{Arc, Weak};

use secure_comms_protocol::PodId;
use tokio::sync::{OwnedSemaphorePermit, mpsc, watch};
use tokio::time::{Instant, sleep_until};

use super::channel::{Channel, Republish};
use super::command::{Command, Reply};
use super::error::AdaptorError;
use super::operation::{Acquired, Context, Controls, Marked, Operation, Pod, Served, Work};
use super::pods::Pods;
use super::retry::{Stopped, Undone};
use super::shared::Shared;
use crate::deadline::Deadline;
use crate::pod::{Ended, PodSnapshot, PodState, StatusReporter};
use crate::publication::Publication;
use crate::store::PodLock;

/// One pod's task.
pub(super) struct Actor {
    /// First, so that it is dropped first: callers that wait for a result find the state up to date.
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
    /// None if the VMs have their keys from user data.
    publication: Option<Arc<Publication>>,
    served: Option<Served>,
    operation: Option<Operation>,
    /// Publishes the keys of a pod that is served, while its channel goes on.
    publishing: Option<Publishing>,
    channel: Option<Channel>,
    republish: Republish,
    ending: Option<Ending>,
    /// The pod's deletion, which has failed and is retried.
    undone: Option<Undone>,
    /// Whether nothing of the pod can be in the KBS.
    untouched: bool,
    /// Whether the stop interrupted a wait that was, as a rule, for the KBS.
    kbs_is_silent: bool,
    next_report: Option<Instant>,
}

/// The publication of a pod that is served, and the caller that waits for it.
struct Publishing {
    work: Work<(Acquired, Result<(), AdaptorError>)>,
    reply: Option<Reply<()>>,
}

/// A `suspend`, `stop` or `forget` that is under way, or the retry of a deletion.
#[derive(Default)]
struct Ending {
    suspends: Vec<Reply<()>>,
    stops: VecDeque<Reply<Stopped>>,
    forgets: Vec<Reply<Vec<String>>>,
    /// For a retry without a caller.
    retry: Option<OwnedSemaphorePermit>,
    /// Whether the pod's mark is written, or cannot be.
    marked: bool,
    /// Whether the pod has a record: only then its deletion is retried.
    has_record: bool,
    teardown: Option<Teardown>,
}

enum Teardown {
    /// The pod is marked in the store as one that is being ended.
    Marking(Work<(Option<PodLock>, Marked)>),
    /// The inbounds close.
    Closing(Work<()>),
    /// The KBS's and the store's record are deleted.
    Deleting { work: Work<Result<(), AdaptorError>>, deadline: Deadline },
    /// The store's record is deleted.
    Forgetting(Work<Result<Vec<String>, AdaptorError>>),
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
    Marked(Option<PodLock>, Marked),
    Closed,
    Deleted(Result<(), AdaptorError>),
    Forgotten(Result<Vec<String>, AdaptorError>),
    Retry(OwnedSemaphorePermit),
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
        let publication = shared.publication(&id);
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
            publication,
            served: None,
            operation: None,
            publishing: None,
            channel: None,
            republish: Republish::default(),
            ending: None,
            undone: None,
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
                Woken::Marked(lock, marked) => self.on_marked(lock, marked),
                Woken::Closed => self.on_closed(),
                Woken::Deleted(result) => self.on_deleted(result),
                Woken::Forgotten(result) => self.on_forgotten(result),
                Woken::Retry(permit) => self.retry_deletion(permit),
                Woken::Republish => self.publish_again(),
                Woken::Report => self.report(),
            }
        }
        self.status.done = true;
    }

    /// Waits for the next thing to do. Dropping the future loses nothing.
    async fn next(&mut self) -> Woken {
        let start_deadline = self.channel.as_ref().and_then(Channel::start_deadline);
        let waits_to_retry = self.operation.is_none() && self.ending.is_none();
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
            permit = retry_due(self.undone.as_mut().filter(|_| waits_to_retry)) => Woken::Retry(permit),
            () = until(start_deadline) => Woken::StartDeadline,
            () = until(republish_at) => Woken::Republish,
            () = until(self.next_report) => Woken::Report,
        }
    }

    fn context(&self) -> (Context, Controls) {
        Context::new(Pod {
            id: self.id.clone(),
            shared: Arc::clone(&self.shared),
            publication: self.publication.clone(),
            locked: self.lock.is_some(),
            served: self.served.is_some(),
        })
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
            && self.undone.is_none()
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

/// The result of work that is under way. Pending if there is none.
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

async fn retry_due(undone: Option<&mut Undone>) -> OwnedSemaphorePermit {
    match undone {
        Some(undone) => undone.due().await,
        None => pending().await,
    }
}

async fn tear_down(teardown: Option<&mut Teardown>) -> Woken {
    match teardown {
        Some(Teardown::Marking(work)) => {
            let (lock, marked) = work.await;
            Woken::Marked(lock, marked)
        }
        Some(Teardown::Forgetting(work)) => Woken::Forgotten(work.await),
        Some(Teardown::Closing(work)) => {
            work.await;
            Woken::Closed
        }
        Some(Teardown::Deleting { work, .. }) => Woken::Deleted(work.await),
        None => pending().await,
    }
}
