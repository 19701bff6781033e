//! `user-data`: the keys and tunnels of a pod VM that has no Trustee.

use secure_comms_adaptor::store::{DirectoryStore, Store};
use secure_comms_adaptor::user_data;
use secure_comms_keys::private_file;

use super::print;
use crate::settings::UserDataSettings;

/// Writes the fragment of `apf.json` to a file (mode 0600) or to standard output. Makes the keys that are missing.
///
/// # Errors
/// The store failed, or the fragment could not be written.
pub async fn run(settings: UserDataSettings) -> anyhow::Result<()> {
    let store = DirectoryStore::open(settings.store)?;
    let worker_node = store.worker_node_key().await?.public()?;
    let pod = store.pod_key(&settings.pod).await?;
    let json = user_data::fragment(&pod, &worker_node, &settings.inbounds, &settings.outbounds)?;
    match settings.output {
        Some(path) => Ok(private_file::replace(&path, &json)?),
        None => print(&json),
    }
}
