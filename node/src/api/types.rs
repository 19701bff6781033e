//! What the API and its clients say to each other. The OpenAPI document is made from these types, their comments included.

mod time;

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize, Serializer};
use utoipa::ToSchema;
use zeroize::Zeroizing;

pub use self::time::Time;

/// Addresses that a start may name at most.
pub(super) const ADDRESSES_MAX: usize = 16;
/// The longest deadline, in seconds: a day.
pub(super) const DEADLINE_MAX: u32 = 86_400;

/// What a pod should be: the body of `PUT /v1/pods/{id}`. What is left out is not set.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PodSpec {
    /// What Kubernetes calls the pod. Nothing proves it; it is shown with the pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod_ref: Option<PodRef>,
    /// Digest of the init-data that the VM is started with, in 64, 96 or 128 hex digits. The keys are published under a
    /// path that names it, which a resource policy can bind to the VM's evidence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(pattern = "^([0-9A-Fa-f]{64}|[0-9A-Fa-f]{96}|[0-9A-Fa-f]{128})$")]
    pub init_data_digest: Option<String>,
}

/// Namespace and name of a pod in Kubernetes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PodRef {
    /// Its namespace.
    #[schema(min_length = 1, max_length = 253, pattern = "^[a-z0-9.-]+$")]
    pub namespace: String,
    /// Its name.
    #[schema(min_length = 1, max_length = 253, pattern = "^[a-z0-9.-]+$")]
    pub name: String,
}

/// The body of `POST /v1/pods/{id}/start`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct StartOrder {
    /// Addresses of the VM's agent: an IP address or a name, with or without a port, as `10.0.0.7` or `[2001:db8::7]:22`.
    #[schema(min_items = 1, max_items = 16)]
    pub addresses: Vec<String>,
    /// Time until the pod must be up, in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 86400, default = 600)]
    pub deadline_seconds: Option<u32>,
    /// Whether the answer waits until the pod is up or the start has failed.
    #[serde(default)]
    pub wait: bool,
}

/// A pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Pod {
    /// The runtime's sandbox id.
    pub id: String,
    /// Who launched it. Not there: another command of this program, as `connect`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub launcher: Option<Launcher>,
    /// Its namespace in Kubernetes, as its launcher says it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub namespace: Option<String>,
    /// Its name in Kubernetes, as its launcher says it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub name: Option<String>,
    /// The state of its channel.
    pub phase: Phase,
    /// Why it is in this phase, or the last error in it. One line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub reason: Option<String>,
    /// Number of the agent's last attempt to get its keys, in the phase Attesting.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub attempt: Option<u64>,
    /// The id that the agent's process gave itself, in the phase Up. Another one means that the agent restarted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub instance: Option<String>,
    /// Since when it is in this phase.
    #[schema(value_type = String, format = DateTime)]
    pub since: Time,
    /// When it was first prepared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = String, format = DateTime, nullable = false)]
    pub created: Option<Time>,
    /// The addresses of its VM; empty before a start.
    pub addresses: Vec<String>,
    /// Where its local clients connect; empty while it is not served.
    pub endpoints: Vec<Endpoint>,
    /// The session with its agent, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub session: Option<Session>,
    /// The container runtime's connection to its kata agent.
    pub runtime: Runtime,
    /// First 64 hex digits of the digest of the init-data that its VM must show.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub init_data_digest: Option<String>,
}

/// Who launched a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Launcher {
    /// cloud-api-adaptor.
    Caa,
    /// A client of this API.
    Api,
}

/// The state of a pod's channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
pub enum Phase {
    /// Nothing of the pod is served.
    NotPrepared,
    /// Its keys are being published.
    Preparing,
    /// Its keys are published and its endpoints listen. No connection is attempted yet.
    Prepared,
    /// Connecting to its VM.
    Connecting,
    /// Connected; the VM gets its keys.
    Attesting,
    /// The VM has its keys. The adaptor reconnects for the Kubernetes phase.
    Upgrading,
    /// The pod can be used.
    Up,
    /// The pod was up. The adaptor retries until it is up again.
    Down,
    /// Preparing or starting it failed. No connection is attempted any more.
    Failed,
    /// It is being ended: its keys could not be deleted yet. That is retried until it is done.
    Ending,
    /// It was stopped.
    Stopped,
}

/// Where local clients of a tunnel connect.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Endpoint {
    /// Name of the tunnel.
    pub tunnel: String,
    /// `127.0.0.1:<port>`, or the path of a unix socket.
    pub local: String,
}

/// A session with a pod's agent. Its streams go on over all its connections.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Session {
    /// The lanes that are connected.
    pub lanes: Vec<String>,
    /// How often the main lane was connected again, and its streams went on.
    pub resumed: u64,
}

/// The container runtime's connection to a pod's kata agent, where this service carries it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Runtime {
    /// Its state.
    pub state: RuntimeState,
    /// Since when; not there for None.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = String, format = DateTime, nullable = false)]
    pub since: Option<Time>,
    /// Why it has ended. One line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub reason: Option<String>,
}

/// The state of the runtime's connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum RuntimeState {
    /// None has been seen, or the runtime connects to the pod's socket by itself.
    None,
    /// It waits until the pod can be used.
    Held,
    /// It is connected.
    Connected,
    /// It has ended.
    Ended,
}

/// All pods of the node, by their ids.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct PodList {
    /// The pods.
    pub items: Vec<Pod>,
}

/// The answer to `PUT /v1/pods/{id}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Prepared {
    /// The pod.
    pub pod: Pod,
    /// Without Trustee: the text of the JSON object whose fields belong in the `apf.json` of the VM's user data. Secret:
    /// it holds the pod's private key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = String, nullable = false)]
    pub user_data: Option<Secret>,
}

/// A secret text. Wiped when it is dropped; its `Debug` shows nothing.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(from = "String")]
pub struct Secret(Zeroizing<String>);

impl Secret {
    /// The text becomes a secret.
    pub fn new(text: String) -> Self {
        Self(Zeroizing::new(text))
    }

    /// The text.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self::new(text)
    }
}

impl Serialize for Secret {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.expose())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

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

/// An error (RFC 9457), as `application/problem+json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Problem {
    /// URI of the kind of problem: a heading of docs/operations/API.md.
    #[serde(rename = "type")]
    #[schema(format = "uri")]
    pub kind: String,
    /// The kind of problem, in a few words.
    pub title: String,
    /// The status of the response.
    #[schema(minimum = 400, maximum = 599)]
    pub status: u16,
    /// What happened. One line.
    pub detail: String,
    /// Path of the request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub instance: Option<String>,
    /// Seconds after which the request may succeed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub retry_after: Option<u64>,
    /// What to do, where the detail does not say it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub advice: Option<String>,
    /// All faults of the request, where it has any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub faults: Vec<Fault>,
}

/// A fault of a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Fault {
    /// The field: of the body, of the query, or `id`.
    pub field: String,
    /// What is wrong with it.
    pub reason: String,
}
