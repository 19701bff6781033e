//! The pods' tasks.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use secure_comms_protocol::PodId;
use tokio::sync::mpsc;

use super::command::Command;
use crate::pod::StatusReporter;

/// The queue and the status of each pod that has a task. Dropping it ends the tasks.
#[derive(Debug, Default)]
pub(super) struct Pods(Mutex<HashMap<PodId, PodHandle>>);

/// A pod's task, as the registry knows it.
#[derive(Debug)]
pub(super) struct PodHandle {
    pub(super) commands: mpsc::UnboundedSender<Command>,
    pub(super) status: StatusReporter,
}

impl Pods {
    pub(super) fn lock(&self) -> MutexGuard<'_, HashMap<PodId, PodHandle>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
