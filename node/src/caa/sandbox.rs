//! A sandbox of cloud-api-adaptor: a pod, as its directory describes it.

use std::net::IpAddr;
use std::time::SystemTime;

use secure_comms_protocol::PodId;

use super::identity::TlsIdentity;
use crate::init_data::PodName;

/// A sandbox, as `apf.json` in its directory describes it.
#[derive(Debug)]
pub struct Sandbox {
    /// The sandbox id, which is the name of its directory.
    pub id: PodId,
    /// Namespace and name of its pod; `None` if the file has none that Kubernetes would accept.
    pub name: Option<PodName>,
    /// Address of the pod, from `pod-network`; `None` if it is not there.
    pub pod_ip: Option<IpAddr>,
    /// The VXLAN's network identifier, from `pod-network`; `None` if it is not there.
    pub vxlan_id: Option<u32>,
    /// The keys of the TLS connection; `None` in the strict variant, where cloud-api-adaptor has its own certificates.
    pub tls: Option<TlsIdentity>,
    /// When `apf.json` was written.
    pub written: SystemTime,
}
