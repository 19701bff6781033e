//! The user data of pod VMs without Trustee: their keys, as a field of the answer.

use std::sync::Arc;

use secure_comms_adaptor::store::Store;
use secure_comms_adaptor::user_data::{self, UserDataError};
use secure_comms_protocol::{InboundTag, OutboundTag, PodId};
use zeroize::Zeroizing;

use super::problem::Kind;
use super::types::Problem;
use secure_comms_adaptor::AdaptorError;
use secure_comms_adaptor::with_causes;

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
pub(super) async fn fragment(tunnels: &VmTunnels, id: &PodId) -> Result<Zeroizing<String>, Box<Problem>> {
    let VmTunnels { store, inbounds, outbounds } = tunnels;
    let json = user_data::of_pod(&**store, id, inbounds, outbounds).await.map_err(|error| match error {
        UserDataError::Store(error) => Box::<Problem>::from(AdaptorError::from(error)),
        UserDataError::Key(error) => Box::<Problem>::from(AdaptorError::from(error)),
        error @ UserDataError::Json(_) => Kind::Internal.problem(with_causes(&error)),
    })?;
    let text = std::str::from_utf8(&json).map_err(|error| Kind::Internal.problem(error.to_string()))?;
    Ok(Zeroizing::new(text.to_owned()))
}
