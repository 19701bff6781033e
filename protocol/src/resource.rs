//! The KBS resources that carry the keys: `<repository>/<type>/<tag>`.

use alloc::format;
use alloc::string::String;

use crate::PodId;

/// Path of the worker node's public keys: `authorized_keys` lines.
pub const WORKER_NODE_PUBLIC_KEY: &str = "default/sshclient/publicKey";

/// Path of a pod's SSH host key: an OpenSSH or PKCS#8 private key in PEM.
pub fn pod_private_key(pod: &PodId) -> String {
    format!("default/pp-{pod}/privateKey")
}
