//! What happens to pods.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::time::Time;

/// Something that happened to a pod: the data of a `pod` event in `GET /v1/events`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Event {
    /// When.
    #[schema(value_type = String, format = DateTime)]
    pub time: Time,
    /// The pod.
    pub pod: String,
    /// The pod's namespace in Kubernetes, where it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub namespace: Option<String>,
    /// The pod's name in Kubernetes, where it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub name: Option<String>,
    /// Whether it is a fault.
    #[serde(rename = "type")]
    pub kind: EventKind,
    /// What happened, as one word. docs/operations/API.md lists them.
    pub reason: String,
    /// What happened, in one line.
    pub message: String,
}

/// Whether an event is a fault, in the words of Kubernetes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum EventKind {
    /// The usual course.
    Normal,
    /// A fault.
    Warning,
}

/// The reader was too slow, or came too late for the events that it asked for: the data of a `lost` event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Lost {
    /// Events of all pods that were lost. Not there: unknown, because the service was restarted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub count: Option<u64>,
}
