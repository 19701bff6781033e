//! Where the adaptor keeps what must outlive it: its own key, and a record of each pod.

mod directory;

use std::fmt::Debug;
use std::path::PathBuf;

use async_trait::async_trait;
use secure_comms_keys::{FileError, KeyError, PodKey, WorkerNodeKey};
use secure_comms_protocol::PodId;

use crate::address::Address;
pub use directory::DirectoryStore;

/// Keeps keys and pod records. Every method may be called by several adaptors at a time.
#[async_trait]
pub trait Store: Send + Sync + Debug {
    /// The worker node's own key: finds it, or makes it.
    async fn worker_node_key(&self) -> Result<WorkerNodeKey, StoreError>;

    /// The pod's key: finds it, or makes it. Of two that race both get the same.
    async fn pod_key(&self, pod: &PodId) -> Result<PodKey, StoreError>;

    /// The pod's key, if the pod is known.
    async fn known_pod_key(&self, pod: &PodId) -> Result<Option<PodKey>, StoreError>;

    /// The pods that are known, to resume them after a restart.
    async fn pods(&self) -> Result<Vec<PodId>, StoreError>;

    /// Forgets all about the pod; nothing to do if it is not known.
    async fn forget(&self, pod: &PodId) -> Result<(), StoreError>;

    /// Notes where the pod's agent is reached.
    async fn save_addresses(&self, pod: &PodId, addresses: &[Address]) -> Result<(), StoreError>;

    /// Where the pod's agent is reached; empty if that was never noted.
    async fn addresses(&self, pod: &PodId) -> Result<Vec<Address>, StoreError>;
}

/// Why the store has no answer.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A file is missing, open to others, or could not be written.
    #[error("key store")]
    File(#[from] FileError),
    /// A key file holds no key. A new one is never made in silence: the VM would no longer know us.
    #[error("key store: {}: no usable key: restore the file from a backup, or delete it to have a new key made", .path.display())]
    BrokenKey {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: KeyError,
    },
    /// A key could not be made or encoded.
    #[error("key store")]
    Key(#[source] KeyError),
    /// A file of addresses holds something else.
    #[error("key store: {}: not a JSON list of addresses: delete the file, and name the addresses with --address", .0.display())]
    BrokenAddresses(PathBuf),
    /// Addresses of a pod that has no key.
    #[error("key store: pod {0} is not known: prepare it first")]
    UnknownPod(PodId),
    /// The work on the disk was cut off: the process is ending.
    #[error("key store: cut off while the process ends")]
    CutOff,
}
