//! What the store knows of the pods, whether they are served or not.

use std::time::SystemTime;

use secure_comms_protocol::PodId;

use super::shared::Shared;
use crate::store::{Labels, StoreError};

/// A pod's record in the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodRecord {
    /// The pod.
    pub id: PodId,
    /// What the caller named the pod with; empty if nothing.
    pub labels: Labels,
    /// When the record was made, if the file system says.
    pub made: Option<SystemTime>,
    /// Whether the pod was ever started: its VM may run.
    pub started: bool,
    /// Since when the pod is being ended; `None` if it is not.
    pub ending: Option<SystemTime>,
}

/// The pod's record; `None` if it has none.
pub(super) async fn read(shared: &Shared, id: PodId) -> Result<Option<PodRecord>, StoreError> {
    let store = &shared.store;
    let Some(made) = store.made(&id).await? else { return Ok(None) };
    let started = match store.addresses(&id).await {
        // There are some.
        Err(StoreError::BrokenAddresses(_)) => true,
        addresses => !addresses?.is_empty(),
    };
    let (labels, ending) = (store.labels(&id).await?, store.ending_since(&id).await?);
    Ok(Some(PodRecord { id, labels, made: Some(made), started, ending }))
}
