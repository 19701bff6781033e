//! A sandbox of cloud-api-adaptor: a pod, as its directory describes it.

use std::fmt;
use std::net::IpAddr;
use std::time::SystemTime;

use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use secure_comms_protocol::PodId;

use crate::init_data::rules::PodName;

/// A sandbox, as `apf.json` in its directory describes it.
#[derive(Debug)]
pub struct Sandbox {
    /// The sandbox id, which is the name of its directory.
    pub id: PodId,
    /// Namespace and name of its pod; `None` if the file has none that Kubernetes would accept.
    pub name: Option<PodName>,
    /// Address of the pod, from `pod-network`; `None` if it is not there.
    pub pod_ip: Option<IpAddr>,
    /// The keys of the TLS connection; `None` in the strict variant, where cloud-api-adaptor has its own certificates.
    pub tls: Option<TlsIdentity>,
    /// When `apf.json` was written.
    pub written: SystemTime,
}

/// What the server of a TLS connection of cloud-api-adaptor's needs.
pub struct TlsIdentity {
    /// The name that cloud-api-adaptor asks for (SNI).
    pub server_name: String,
    /// The server's private key.
    pub key: PrivateKeyDer<'static>,
    /// The server's certificate.
    pub certificate: CertificateDer<'static>,
    /// The client's certificate, which must be presented byte for byte.
    pub client: CertificateDer<'static>,
}

impl fmt::Debug for TlsIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsIdentity").field("server_name", &self.server_name).finish_non_exhaustive()
    }
}
