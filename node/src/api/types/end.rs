//! The ends of pods, and records that nothing will end.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::pod::Launcher;
use super::time::Time;

/// A pod that is stopped, and whose keys could not be deleted. That is retried until it is done, over restarts; until then
/// the pod is listed, in the phase Ending.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Deletion {
    /// The pod.
    pub id: String,
    /// The resource that may still be in the KBS. Not there: it is the store that failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub resource: Option<String>,
    /// Why the keys could not be deleted. One line.
    pub reason: String,
}

/// A pod that is forgotten.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Forgotten {
    /// The pod.
    pub id: String,
    /// The resources that may stay in the KBS: an admin of the KBS has to delete them. Empty: none stays.
    pub resources: Vec<String>,
}

/// All orphans of the store, by their ids.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct OrphanList {
    /// The orphans.
    pub items: Vec<Orphan>,
}

/// A record of the store that no launcher will end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Orphan {
    /// The pod.
    pub id: String,
    /// Who launched it, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub launcher: Option<Launcher>,
    /// Its namespace in Kubernetes, where it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub namespace: Option<String>,
    /// Its name in Kubernetes, where it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub name: Option<String>,
    /// Since when it is what the reason says.
    #[schema(value_type = String, format = DateTime)]
    pub since: Time,
    /// Why it is one, as one word: NoLauncher, NeverStarted or Ending.
    pub reason: String,
    /// The same in one line.
    pub message: String,
}
