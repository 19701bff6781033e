//! The service itself.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::pod::Phase;
use super::time::Time;

/// The service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// Version of the program.
    pub version: String,
    /// Since when it runs.
    #[schema(value_type = String, format = DateTime)]
    pub since: Time,
    /// Whether all parts work.
    pub ready: bool,
    /// The parts of the service.
    pub parts: Vec<Part>,
    /// Number of pods.
    pub pods: u64,
    /// Number of pods in each phase; a phase without pods is left out.
    pub pods_by_phase: BTreeMap<Phase, u64>,
    /// What a stop of the service would cost now.
    pub stop_cost: StopCost,
}

/// A part of the service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Part {
    /// Its name.
    pub name: String,
    /// Whether it works.
    pub works: bool,
    /// What is wrong, and what to do. One line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub reason: Option<String>,
}

/// What a stop of the service would cost.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct StopCost {
    /// Pods that end: the runtime ends a pod when its connection to the kata agent closes.
    pub pods_lost: u64,
    /// Other pods that are up. They end if a runtime is connected to their endpoints, which this service cannot see.
    pub pods_at_risk: u64,
    /// Pods whose runtime waits until they can be used. It connects again, and their starts go on with the next process.
    pub starts_interrupted: u64,
}
