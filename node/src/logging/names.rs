//! What Kubernetes calls the pods, for the lines that are about them.

use std::collections::HashMap;
use std::sync::{LazyLock, PoisonError, RwLock};

use secure_comms_protocol::PodId;

use crate::init_data::PodName;

/// The log is the process's, and so are the names. Those of the pods that are served.
static NAMES: LazyLock<RwLock<HashMap<PodId, PodName>>> = LazyLock::new(RwLock::default);

/// Names a pod from now on.
pub fn insert(pod: &PodId, name: &PodName) {
    NAMES.write().unwrap_or_else(PoisonError::into_inner).insert(pod.clone(), name.clone());
}

/// Forgets a pod that is gone.
pub fn remove(pod: &PodId) {
    NAMES.write().unwrap_or_else(PoisonError::into_inner).remove(pod);
}

/// What Kubernetes calls a pod, if that is known.
pub fn of(pod: &PodId) -> Option<PodName> {
    NAMES.read().unwrap_or_else(PoisonError::into_inner).get(pod).cloned()
}
