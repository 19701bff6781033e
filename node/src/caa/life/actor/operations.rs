//! What a sandbox's task has under way.

use std::future::Future;

use tokio::task::{AbortHandle, JoinError, JoinSet};

use super::super::machine::{DialNo, ReleaseFailure, Slot, StartFailure};
use super::super::world::{Failed, World};

/// What a task of the sandbox has done.
pub(super) enum Done<W: World> {
    Slot { slot: Slot, number: u64, outcome: Outcome<W> },
    DialClosed(DialNo, String),
    DialTaken,
    RelayEnded(DialNo, String),
}

/// The outcome of an operation, by kind.
pub(super) enum Outcome<W: World> {
    Prepared(Result<(), String>),
    Started(Result<(), Failed<StartFailure>>),
    Halted,
    Stopped(Result<(), String>),
    Checked(Result<(), Failed<ReleaseFailure>>),
    Opened(Result<W::Stream, Failed<ReleaseFailure>>),
    Finished(DialNo, Result<W::Client, String>),
    Due,
}

/// An operation that a slot has under way.
struct Operation {
    number: u64,
    task: AbortHandle,
}

/// The tasks of one sandbox: an operation in each slot, and what watches its connections. Dropping it ends them.
pub(super) struct Operations<W: World> {
    tasks: JoinSet<Done<W>>,
    /// Of the last operation: one that was replaced may have ended before.
    number: u64,
    channel: Option<Operation>,
    release: Option<Operation>,
}

impl<W: World> Operations<W> {
    pub(super) fn new() -> Self {
        Self { tasks: JoinSet::new(), number: 0, channel: None, release: None }
    }

    /// Puts an operation into its slot, in place of an earlier one.
    pub(super) fn begin(&mut self, slot: Slot, operation: impl Future<Output = Outcome<W>> + Send + 'static) {
        self.number += 1;
        let number = self.number;
        let task = self.tasks.spawn(async move { Done::Slot { slot, number, outcome: operation.await } });
        if let Some(earlier) = self.slot(slot).replace(Operation { number, task }) {
            earlier.task.abort();
        }
    }

    /// Empties a slot.
    pub(super) fn abort(&mut self, slot: Slot) {
        if let Some(operation) = self.slot(slot).take() {
            operation.task.abort();
        }
    }

    /// Empties the slot of an operation that has ended. False: another one has its place, so its outcome does not count.
    pub(super) fn has_ended(&mut self, slot: Slot, number: u64) -> bool {
        self.slot(slot).take_if(|operation| operation.number == number).is_some()
    }

    /// Runs what needs no slot.
    pub(super) fn spawn(&mut self, task: impl Future<Output = Done<W>> + Send + 'static) -> AbortHandle {
        self.tasks.spawn(task)
    }

    /// The next task that has ended. May be cancelled at any time. Returns `None` at once while there are no tasks.
    pub(super) async fn next(&mut self) -> Option<Result<Done<W>, JoinError>> {
        self.tasks.join_next().await
    }

    fn slot(&mut self, slot: Slot) -> &mut Option<Operation> {
        match slot {
            Slot::Channel => &mut self.channel,
            Slot::Release => &mut self.release,
        }
    }
}
