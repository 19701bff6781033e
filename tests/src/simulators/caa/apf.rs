//! `apf.json`: what CAA writes of a sandbox, and what the VM gets by user data.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::tls::PodKeys;

/// The content for a pod. Its number makes its address and its VXLAN its own; the real one reads the address in the pod's
/// network namespace.
pub(super) fn json(namespace: &str, pod: &str, number: u32, keys: &PodKeys) -> Value {
    let [_, _, high, low] = number.to_be_bytes();
    let mut apf_json = json!({
        "pod-network": {
            "podip": format!("10.244.{high}.{low}/16"),
            "pod-hw-addr": "0a:58:0a:f4:00:05",
            "interface": "eth0",
            "worker-node-ip": "10.82.0.1/16",
            "tunnel-type": "vxlan",
            "routes": [{"dst": "::ffff:0.0.0.0/0", "gw": "10.244.0.1", "dev": "eth0"}],
            "neighbors": null,
            "mtu": 1450,
            "index": number,
            "vxlan-port": 4789,
            "vxlan-id": 555_000 + number,
            "dedicated": false,
            "external-net-via-pod-vm": false,
        },
        "pod-namespace": namespace,
        "pod-name": pod,
    });
    if let (Some(object), PodKeys::Made { key, certificate, client, .. }) = (apf_json.as_object_mut(), keys) {
        object.insert("tls-server-key".to_owned(), key.as_str().into());
        object.insert("tls-server-cert".to_owned(), certificate.as_str().into());
        object.insert("tls-client-ca".to_owned(), client.as_str().into());
    }
    apf_json
}

/// Writes a file as CAA does: created empty and filled, so that a reader may see a part of it.
///
/// # Errors
/// If it can't be written.
pub fn write(path: &Path, json: &Value) -> Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = std::fs::OpenOptions::new();
    let file = options.write(true).create(true).truncate(true).mode(0o644).open(path);
    let mut file = file.with_context(|| format!("CAA: writing {}", path.display()))?;
    let text = serde_json::to_vec_pretty(json)?;
    std::io::Write::write_all(&mut file, &text).with_context(|| format!("CAA: writing {}", path.display()))
}
