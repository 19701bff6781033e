//! The KBS resources that carry the keys: `<repository>/<type>/<tag>`.

use alloc::format;
use alloc::string::String;

use crate::{InitDataDigest, PodId};

/// Tag of the keys of a pod whose VM is bound to no init-data.
pub const UNBOUND: &str = "keys";

/// Path of a pod's keys: its SSH host key in PEM, then the `authorized_keys` lines of its worker nodes, as one text.
///
/// The last part names the init-data of the VM that may read them: a resource policy can compare it with the evidence.
pub fn pod_keys(pod: &PodId, init_data: Option<&InitDataDigest>) -> String {
    format!("default/pp-{pod}/{}", init_data.map_or(UNBOUND, InitDataDigest::as_str))
}

/// The two resources of agents before version 0.2, which nothing binds to one another.
pub mod separate {
    use alloc::format;
    use alloc::string::String;

    use crate::PodId;

    /// Path of the worker node's public keys: `authorized_keys` lines.
    pub const WORKER_NODE_PUBLIC_KEY: &str = "default/sshclient/publicKey";

    /// Path of a pod's SSH host key: an OpenSSH or PKCS#8 private key in PEM.
    pub fn pod_private_key(pod: &PodId) -> String {
        format!("default/pp-{pod}/privateKey")
    }
}
