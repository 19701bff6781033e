//! `keygen`: makes keys that are missing, and prints their public halves.

use secure_comms_adaptor::store::Store as _;

use super::open_store;
use super::screen::show;
use crate::settings::KeygenSettings;

/// Prints the worker node's public key, and the pod's if one is named, as `authorized_keys` lines. Makes the keys
/// that are missing, and logs which it made.
///
/// # Errors
/// The store failed, or standard output cannot be written.
pub async fn run(settings: KeygenSettings) -> anyhow::Result<()> {
    let store = open_store(&settings.store)?;
    let found = store.has_worker_node_key();
    let mut lines = store.worker_node_key().await?.public()?.authorized_keys_line()? + "\n";
    tracing::info!("worker node's key {} in {}", made_or_found(found), settings.store.display());
    if let Some(pod) = settings.pod {
        let found = store.known_pod_key(&pod).await?.is_some();
        lines += &(store.pod_key(&pod).await?.public()?.authorized_keys_line()? + "\n");
        tracing::info!("pod {pod}: key {} in {}", made_or_found(found), settings.store.display());
    }
    show(&lines).map(drop)
}

fn made_or_found(found: bool) -> &'static str {
    if found { "found" } else { "made" }
}
