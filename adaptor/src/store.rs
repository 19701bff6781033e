//! The store: keeps the worker-node key, the pod keys and the pods' addresses over restarts of the adaptor.

mod directory;

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::path::PathBuf;
use std::time::SystemTime;

use async_trait::async_trait;
use secure_comms_keys::{FileError, KeyError, PodKey, WorkerNodeKey};
use secure_comms_protocol::{InitDataDigest, PodId};

use crate::address::Address;
pub use directory::DirectoryStore;

/// What the adaptor's caller wants to find again with a pod, as its Kubernetes name. The adaptor does not read it.
pub type Labels = BTreeMap<String, String>;

/// The largest labels of a pod, in bytes of their JSON.
pub const LABELS_MAX: usize = 4096;

/// Keeps the worker-node key, and a record of each pod: its key, its addresses, its labels, the init-data that its VM must
/// show, and where in the KBS its key may be.
///
/// # Concurrency
/// Tasks, adaptors and processes may use one store at the same time. Each method is atomic: it takes effect as a whole or
/// not at all, also if its future is dropped or the process is killed. Callers that need an order of several calls for
/// one pod make it themselves; the [`Adaptor`](crate::registry::Adaptor) does.
///
/// # Cancellation
/// A dropped future may still take effect later, as a whole.
#[async_trait]
pub trait Store: Send + Sync + Debug {
    /// The worker-node key; makes it if there is none. Callers that race for it get the same key.
    ///
    /// # Errors
    /// The store cannot be read or written, or the stored key is unusable. An unusable key is never replaced.
    async fn worker_node_key(&self) -> Result<WorkerNodeKey, StoreError>;

    /// The worker-node keys that are valid: the current one first, then the earlier ones, the newest first. Empty if none was
    /// made.
    ///
    /// # Errors
    /// The store cannot be read, or a stored key is unusable.
    async fn worker_node_keys(&self) -> Result<Vec<WorkerNodeKey>, StoreError>;

    /// Makes a new worker-node key, which is the current one from now on. The earlier ones stay valid until [`prune`](Self::prune):
    /// each pod goes on with the key that its record names.
    ///
    /// # Errors
    /// As for [`worker_node_key`](Self::worker_node_key). The current key is then the same as before.
    async fn rotate_worker_node_key(&self) -> Result<WorkerNodeKey, StoreError>;

    /// Removes the earlier worker-node keys that no pod's record needs, and says which remain and for which pods.
    ///
    /// # Errors
    /// The store cannot be read or written, or a record is damaged: then nothing is removed.
    async fn prune(&self) -> Result<Pruned, StoreError>;

    /// The worker-node keys of a pod: the one with which this adaptor logs in to its VM, which its record names, and all
    /// that are valid. The record of a version before 0.2 names none: then it is the oldest.
    ///
    /// # Errors
    /// The pod has no record, the store cannot be read, or a key is unusable or missing.
    async fn pod_worker_nodes(&self, pod: &PodId) -> Result<PodWorkerNodes, StoreError>;

    /// Saves the fingerprints of worker-node keys that the pod's VM may get, in addition to those that it was given before.
    ///
    /// # Errors
    /// The pod has no record, or the store cannot be written. Saving what is stored already succeeds on a read-only store.
    async fn save_given(&self, pod: &PodId, fingerprints: &[String]) -> Result<(), StoreError>;

    /// The pod's key; makes it, and with it the pod's record, if there is none. Callers that race for it get the same key.
    ///
    /// # Errors
    /// As for [`worker_node_key`](Self::worker_node_key).
    async fn pod_key(&self, pod: &PodId) -> Result<PodKey, StoreError>;

    /// The pod's key; `None` if the pod has no record.
    ///
    /// # Errors
    /// The store cannot be read, or the stored key is unusable.
    async fn known_pod_key(&self, pod: &PodId) -> Result<Option<PodKey>, StoreError>;

    /// The pods that have a record, in a stable order.
    ///
    /// # Errors
    /// The store cannot be read.
    async fn pods(&self) -> Result<Vec<PodId>, StoreError>;

    /// Deletes the pod's record. A pod without a record is not an error.
    ///
    /// # Errors
    /// The store cannot be written.
    async fn forget(&self, pod: &PodId) -> Result<(), StoreError>;

    /// Saves the addresses of the pod's agent in place of earlier ones.
    ///
    /// # Errors
    /// The pod has no record, or the store cannot be written. Saving the addresses that are stored already succeeds on a
    /// read-only store.
    async fn save_addresses(&self, pod: &PodId, addresses: &[Address]) -> Result<(), StoreError>;

    /// The saved addresses of the pod's agent; empty if none were saved.
    ///
    /// # Errors
    /// The store cannot be read, or the stored addresses are damaged.
    async fn addresses(&self, pod: &PodId) -> Result<Vec<Address>, StoreError>;

    /// The pod's labels; empty if none were saved. Damaged ones are logged and count as none: they name things only.
    ///
    /// # Errors
    /// The store cannot be read.
    async fn labels(&self, pod: &PodId) -> Result<Labels, StoreError>;

    /// Saves the pod's labels in place of earlier ones.
    ///
    /// # Errors
    /// The labels are longer than [`LABELS_MAX`], the pod has no record, or the store cannot be written. Saving what is
    /// stored already succeeds on a read-only store.
    async fn save_labels(&self, pod: &PodId, labels: &Labels) -> Result<(), StoreError>;

    /// The digest of the init-data that the pod's VM must show; `None` if none is expected.
    ///
    /// # Errors
    /// The store cannot be read, or the stored digest is damaged.
    async fn init_data(&self, pod: &PodId) -> Result<Option<InitDataDigest>, StoreError>;

    /// Saves the digest of the init-data that the pod's VM must show, in place of an earlier one.
    ///
    /// # Errors
    /// The pod has no record, or the store cannot be written. Saving what is stored already succeeds on a read-only store.
    async fn save_init_data(&self, pod: &PodId, digest: Option<&InitDataDigest>) -> Result<(), StoreError>;

    /// Paths of the KBS under which the pod's private key may be. `None` if that was never recorded: the pod's record is
    /// of a version before 0.2.
    ///
    /// # Errors
    /// The store cannot be read, or the stored paths are damaged.
    async fn published(&self, pod: &PodId) -> Result<Option<Vec<String>>, StoreError>;

    /// Saves the paths of the KBS under which the pod's private key may be, in place of earlier ones.
    ///
    /// # Errors
    /// As for [`save_init_data`](Self::save_init_data).
    async fn save_published(&self, pod: &PodId, paths: &[String]) -> Result<(), StoreError>;

    /// Marks the pod as one that is being ended: it is never resumed, and its keys are deleted until that is done. Returns
    /// whether the pod has a record. An earlier mark stays as it is, and then this succeeds on a read-only store.
    ///
    /// # Errors
    /// The store cannot be written.
    async fn mark_ending(&self, pod: &PodId) -> Result<bool, StoreError>;

    /// When the pod was marked as one that is being ended; `None` if it was not.
    ///
    /// # Errors
    /// The store cannot be read.
    async fn ending_since(&self, pod: &PodId) -> Result<Option<SystemTime>, StoreError>;

    /// When the pod's record was made; `None` if it has none, or the file system does not say.
    ///
    /// # Errors
    /// The store cannot be read.
    async fn made(&self, pod: &PodId) -> Result<Option<SystemTime>, StoreError>;

    /// Locks a pod for the adaptor that serves it, until the lock is dropped or the process ends. `None` if the pod has no
    /// record: there is nothing to lock then. Other methods need no lock.
    ///
    /// # Errors
    /// Another adaptor holds the lock ([`StoreError::Locked`]), or the store cannot be read.
    async fn lock_pod(&self, pod: &PodId) -> Result<Option<PodLock>, StoreError>;
}

/// The worker-node keys of a pod.
#[derive(Clone, Debug)]
pub struct PodWorkerNodes {
    /// The key with which this adaptor logs in to the pod's VM.
    pub own: WorkerNodeKey,
    /// The other keys of the store that are valid.
    pub others: Vec<WorkerNodeKey>,
    /// Fingerprints of all worker-node keys that the pod's VM may have been given so far.
    pub given: Vec<String>,
}

impl PodWorkerNodes {
    /// All that are valid, the own one first.
    pub fn all(&self) -> impl Iterator<Item = &WorkerNodeKey> {
        std::iter::once(&self.own).chain(&self.others)
    }
}

/// What [`Store::prune`] did. Keys are named by their fingerprints.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pruned {
    /// The keys that were removed.
    pub removed: Vec<String>,
    /// The earlier keys that remain, and the pods that need each.
    pub needed: Vec<(String, Vec<PodId>)>,
}

/// The lock of a pod. Dropping it releases it.
#[derive(Debug)]
pub struct PodLock {
    _held: Box<dyn Debug + Send + Sync>,
}

impl PodLock {
    /// A lock that is released when `held` is dropped.
    pub fn new(held: impl Debug + Send + Sync + 'static) -> Self {
        Self { _held: Box::new(held) }
    }
}

/// Error of the store. Its text names the file and what to do.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A file cannot be read or written, or others may access it.
    #[error("key store")]
    File(#[from] FileError),
    /// A key file holds no usable key. It is never replaced silently, because the VM would reject the new key.
    #[error("key store: {}: no usable key: restore the file from a backup; without one, delete it: a new key is made, and running VMs are lost", .path.display())]
    BrokenKey {
        /// Path of the file.
        path: PathBuf,
        /// The fault of the key.
        #[source]
        source: KeyError,
    },
    /// A new key could not be made or encoded.
    #[error("key store")]
    Key(#[source] KeyError),
    /// A file of addresses is damaged.
    #[error("key store: {}: not a JSON list of addresses: delete the file, and name the addresses with --address", .0.display())]
    BrokenAddresses(PathBuf),
    /// A file that says where in the KBS the pod's key is, or which init-data its VM has, is damaged.
    #[error("key store: {}: damaged: restore the file from a backup; without one, delete it, and name the VM's init-data with --init-data", .0.display())]
    BrokenRecord(PathBuf),
    /// The worker-node key that the pod's record names is missing.
    #[error(
        "key store: pod {pod}: its worker-node key {fingerprint} is missing: restore the store's worker-node.*.key from a backup; without one, stop the pod"
    )]
    MissingWorkerNodeKey {
        /// The pod.
        pod: PodId,
        /// The key's fingerprint.
        fingerprint: String,
    },
    /// The labels of a pod are too long.
    #[error(
        "key store: pod {pod}: its labels have {len} bytes, and may have {LABELS_MAX}: give shorter ones"
    )]
    LongLabels {
        /// The pod.
        pod: PodId,
        /// Length of their JSON.
        len: usize,
    },
    /// The pod has no record.
    #[error("key store: pod {0} is not known: prepare it first")]
    UnknownPod(PodId),
    /// Another adaptor serves the pod, in this process or another one.
    #[error("another adaptor{} drives pod {pod}: end it first, or use another --store", holder(*.pid))]
    Locked {
        /// The pod.
        pod: PodId,
        /// The other adaptor's process, if it is known.
        pid: Option<u32>,
    },
    /// The access to the disk was interrupted, because the runtime shuts down.
    #[error("key store: interrupted while the process ends")]
    CutOff,
}

impl StoreError {
    /// Whether the disk is full or read-only: what is stored can be used, and nothing new be stored.
    pub fn is_unwritable(&self) -> bool {
        matches!(self, Self::File(error) if error.is_read_only() || error.is_full())
    }
}

fn holder(pid: Option<u32>) -> String {
    pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default()
}
