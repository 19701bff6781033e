//! The user data of pod VMs without Trustee: their keys, as a field of the answer.

use std::sync::Arc;

use secure_comms_adaptor::store::{Store, StoreError};
use secure_comms_adaptor::user_data::{self, UserDataError};
use secure_comms_keys::{KeyError, WorkerNodeKey};
use secure_comms_protocol::{InboundTag, OutboundTag, PodId};
use zeroize::Zeroizing;

use super::problem::{Kind, with_causes};
use super::types::Problem;
use secure_comms_adaptor::AdaptorError;

/// The tunnels of pod VMs that get their keys from their user data, and where the keys are.
#[derive(Clone, Debug)]
pub struct VmTunnels {
    /// The store of the adaptor.
    pub store: Arc<dyn Store>,
    /// Inbounds of the VM's agent.
    pub inbounds: Vec<InboundTag>,
    /// Outbounds of the VM's agent.
    pub outbounds: Vec<OutboundTag>,
}

/// The fragment of `apf.json` for the pod. Makes the keys that are missing. Secret.
pub(super) async fn fragment(tunnels: &VmTunnels, id: &PodId) -> Result<Zeroizing<String>, Problem> {
    let store = |error: StoreError| Problem::from(AdaptorError::from(error));
    let key = |error: KeyError| Problem::from(AdaptorError::from(error));
    let pod = tunnels.store.pod_key(id).await.map_err(store)?;
    let nodes = tunnels.store.pod_worker_nodes(id).await.map_err(store)?;
    let given: Vec<String> = nodes.all().map(WorkerNodeKey::fingerprint).collect();
    tunnels.store.save_given(id, &given).await.map_err(store)?;
    let nodes: Result<Vec<_>, _> = nodes.all().map(WorkerNodeKey::public).collect();
    let json = user_data::fragment(&pod, &nodes.map_err(key)?, &tunnels.inbounds, &tunnels.outbounds);
    let json = json.map_err(|error: UserDataError| Kind::Internal.problem(with_causes(&error)))?;
    let text = std::str::from_utf8(&json).map_err(|error| Kind::Internal.problem(error.to_string()))?;
    Ok(Zeroizing::new(text.to_owned()))
}
