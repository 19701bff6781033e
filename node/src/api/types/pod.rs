//! A pod, and what clients order.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::secret::Secret;
use super::time::Time;

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
    /// Preparing or starting it failed. No connection is attempted until its launcher starts it again.
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
