//! `keygen`: makes keys that are missing, and prints their public halves.

use secure_comms_adaptor::store::{DirectoryStore, Store};

use super::print;
use crate::settings::KeygenSettings;

/// Prints the worker node's public key, and the pod's if one is named, as `authorized_keys` lines. Makes the keys
/// that are missing.
///
/// # Errors
/// The store failed, or standard output is closed.
pub async fn run(settings: KeygenSettings) -> anyhow::Result<()> {
    let store = DirectoryStore::open(settings.store)?;
    let mut lines = store.worker_node_key().await?.public()?.authorized_keys_line()? + "\n";
    if let Some(pod) = settings.pod {
        lines += &(store.pod_key(&pod).await?.public()?.authorized_keys_line()? + "\n");
    }
    print(lines.as_bytes())
}
