//! The store in a directory: `worker-node.key`, earlier ones as `worker-node.<number>.key`, and `pods/<pod id>/` with `key`, `addresses.json`, `labels.json`,
//! `init-data`, `published.json`, `worker-nodes.json`, while an adaptor serves the pod `adaptor.pid`, and once the pod is being ended `ending`.
//!
//! Writers of all processes hold a lock, so an unfinished file that a lock holder finds was left by a crash.

mod worker_nodes;

use std::fs::{self, File, OpenOptions, TryLockError};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::SystemTime;

use async_trait::async_trait;
use secure_comms_keys::private_directory::own_directory;
use secure_comms_keys::private_file::{self, TEMP_PREFIX};
use secure_comms_keys::{FileError, KeyError, PodKey, WorkerNodeKey};
use secure_comms_protocol::limits::KEY_MAX;
use secure_comms_protocol::{InitDataDigest, PodId};
use zeroize::Zeroizing;

use super::{LABELS_MAX, Labels, PodLock, PodWorkerNodes, Pruned, Store, StoreError};
use crate::address::Address;
use crate::handover::pauses;
use crate::text::with_causes;

/// Name prefix of the directory of a pod that is being deleted.
const GONE_PREFIX: &str = ".gone-";
/// Name prefix of the directory of a pod whose record is being made.
const NEW_PREFIX: &str = ".new-";

const KEY: &str = "key";
const PUBLISHED: &str = "published.json";
/// Holds the process that serves the pod, in the pod's directory.
const PID_FILE: &str = "adaptor.pid";

/// The store in a directory that only the adaptor's user may access. Needs a tokio runtime for its async methods.
#[derive(Clone, Debug)]
pub struct DirectoryStore {
    root: PathBuf,
}

/// The lock for changing the store, held until dropped.
struct Locked {
    _file: File,
}

impl DirectoryStore {
    /// Opens the store, makes its directories if they are missing, and removes what a crash left behind. On a read-only
    /// disk the existing keys can still be read.
    ///
    /// Blocks on the disk and on the lock of the store.
    ///
    /// # Errors
    /// The directory cannot be made, or others may access it.
    pub fn open(root: impl Into<PathBuf>) -> Result<Self, StoreError> {
        let store = Self { root: root.into() };
        own_directory(&store.root)?;
        own_directory(&store.pods_directory())?;
        match store.lock().and_then(|_locked| store.tidy()) {
            Err(error) if error.is_read_only() => tracing::warn!(
                "key store: {}: the disk is read-only: existing keys can be used, new ones can't be made",
                store.root.display()
            ),
            tidied => tidied?,
        }
        Ok(store)
    }

    /// Whether there is a worker-node key, usable or not.
    pub fn has_worker_node_key(&self) -> bool {
        self.worker_node_key_file().exists()
    }

    fn worker_node_key_file(&self) -> PathBuf {
        self.root.join("worker-node.key")
    }

    fn pods_directory(&self) -> PathBuf {
        self.root.join("pods")
    }

    fn pod_directory(&self, pod: &PodId) -> PathBuf {
        self.pods_directory().join(pod.as_str())
    }

    fn key_file(&self, pod: &PodId) -> PathBuf {
        self.pod_directory(pod).join(KEY)
    }

    fn addresses_file(&self, pod: &PodId) -> PathBuf {
        self.pod_directory(pod).join("addresses.json")
    }

    /// Missing if the pod has none.
    fn labels_file(&self, pod: &PodId) -> PathBuf {
        self.pod_directory(pod).join("labels.json")
    }

    /// The digest of the init-data that the pod's VM must show; missing if none is expected.
    fn init_data_file(&self, pod: &PodId) -> PathBuf {
        self.pod_directory(pod).join("init-data")
    }

    /// The paths of the KBS under which the pod's private key may be. Missing in a record of a version before 0.2.
    fn published_file(&self, pod: &PodId) -> PathBuf {
        self.pod_directory(pod).join(PUBLISHED)
    }

    /// Empty: making it needs no space, so that a pod can be ended on a full disk. Its age is that of the mark.
    fn ending_file(&self, pod: &PodId) -> PathBuf {
        self.pod_directory(pod).join("ending")
    }

    /// For changes that no other change may cross.
    fn lock(&self) -> Result<Locked, FileError> {
        self.lock_by(File::lock)
    }

    /// For changes within one pod's record: those of different pods wait for the disk side by side.
    fn lock_shared(&self) -> Result<Locked, FileError> {
        self.lock_by(File::lock_shared)
    }

    fn lock_by(&self, lock: fn(&File) -> std::io::Result<()>) -> Result<Locked, FileError> {
        let path = self.root.join(".lock");
        let failed = || FileError::io("locking", &path);
        let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
        let file = file.map_err(failed())?;
        lock(&file).map_err(failed())?;
        Ok(Locked { _file: file })
    }

    /// Locks the pod's directory: no file has to be made for it, so it works on a read-only disk.
    fn try_lock_pod(&self, pod: &PodId) -> Result<Result<Option<PodLock>, Option<u32>>, FileError> {
        let path = self.pod_directory(pod);
        let failed = || FileError::io("locking", &path);
        let opened = match File::open(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Ok(None)),
            opened => opened.map_err(failed())?,
        };
        let pid_file = path.join(PID_FILE);
        match opened.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let pid = private_file::read(&pid_file, KEY_MAX).ok();
                let pid = pid.and_then(|pid| std::str::from_utf8(&pid).ok()?.trim().parse().ok());
                return Ok(Err(pid));
            }
            Err(TryLockError::Error(error)) => return Err(failed()(error)),
        }
        // The pod may have been deleted before we had the lock, and made again.
        let there = fs::metadata(&path).map(|there| (there.dev(), there.ino()));
        let ours = opened.metadata().map(|ours| (ours.dev(), ours.ino())).map_err(failed())?;
        if there.ok() != Some(ours) {
            return Ok(Err(None));
        }
        // Only for the message of the other adaptor: the lock holds without it, as on a full or read-only disk.
        if let Err(error) = private_file::replace(&pid_file, std::process::id().to_string().as_bytes()) {
            tracing::debug!("pod {pod}: {}", with_causes(&error));
        }
        Ok(Ok(Some(PodLock::new(opened))))
    }

    fn lock_pod_soon(&self, pod: &PodId) -> Result<Option<PodLock>, StoreError> {
        let mut pauses = pauses();
        loop {
            match (self.try_lock_pod(pod)?, pauses.next()) {
                (Ok(lock), _) => return Ok(lock),
                (Err(_), Some(pause)) => sleep(pause),
                (Err(pid), None) => return Err(StoreError::Locked { pod: pod.clone(), pid }),
            }
        }
    }

    fn tidy(&self) -> Result<(), FileError> {
        let pods = self.pods_directory();
        remove_leftovers(&self.root)?;
        remove_leftovers(&pods)?;
        for name in names(&pods)? {
            let path = pods.join(&name);
            // A stray file, or a link out of the store, is no record.
            let is_record = name.parse::<PodId>().is_ok()
                && fs::symlink_metadata(&path).is_ok_and(|entry| entry.is_dir());
            if let Some(Err(error)) = is_record.then(|| remove_leftovers(&path)) {
                // One record must not keep the pods of all others down.
                tracing::warn!("key store: {}: what a crash left there stays", with_causes(&error));
            }
        }
        Ok(())
    }

    /// The record is made in a directory of its own, which is then renamed: it is there as a whole or not at all.
    fn find_or_make_pod_key(&self, pod: &PodId) -> Result<PodKey, StoreError> {
        let path = self.key_file(pod);
        find_or_make(&path, PodKey::from_pem, || {
            // The lock is exclusive while it is made.
            let own = self.find_or_make_worker_node_key()?;
            let directory = self.pod_directory(pod);
            if directory.exists() {
                return self.complete_record(&directory, &own);
            }
            let locked = self.lock_shared()?;
            let new = self.pods_directory().join(format!("{NEW_PREFIX}{:032x}", rand::random::<u128>()));
            let made = self.make_record(&new, &own, &locked).and_then(|()| self.place_record(&new, pod));
            if !matches!(made, Ok(true)) {
                // The first error is what the caller needs; what remains is removed at the next start.
                let _ = fs::remove_dir_all(&new);
            }
            made
        })
    }

    /// The key file was removed, as the advice for an unusable one says. What else the record says is kept: the earlier key
    /// may be in the KBS.
    fn complete_record(&self, directory: &Path, own: &WorkerNodeKey) -> Result<bool, StoreError> {
        let locked = self.lock()?;
        self.make_record(directory, own, &locked)?;
        Ok(true)
    }

    /// Makes the files that are missing.
    fn make_record(&self, new: &Path, own: &WorkerNodeKey, locked: &Locked) -> Result<(), StoreError> {
        own_directory(new)?;
        let pem = PodKey::generate().and_then(|key| key.to_pem()).map_err(StoreError::Key)?;
        // A new key is nowhere in the KBS.
        private_file::create_unsynced(&new.join(PUBLISHED), b"[]")?;
        self.assign_worker_nodes(new, own, locked)?;
        private_file::create_unsynced(&new.join(KEY), pem.as_bytes())?;
        Ok(private_file::sync_directory(new)?)
    }

    /// False if another caller has made a record of the pod.
    fn place_record(&self, new: &Path, pod: &PodId) -> Result<bool, StoreError> {
        let path = self.pod_directory(pod);
        match fs::rename(new, &path) {
            Err(error) if error.kind() == std::io::ErrorKind::DirectoryNotEmpty => Ok(false),
            renamed => {
                renamed.map_err(FileError::io("making", &path))?;
                private_file::sync_directory(&self.pods_directory())?;
                Ok(true)
            }
        }
    }

    fn list_pods(&self) -> Result<Vec<PodId>, StoreError> {
        // A record that cannot be looked at counts: who reads it reports why.
        let has_key = |pod: &PodId| match self.key_file(pod).try_exists() {
            Err(error) => error.kind() != std::io::ErrorKind::NotADirectory,
            Ok(exists) => exists,
        };
        let known = |name: String| name.parse().ok().filter(has_key);
        let mut pods: Vec<PodId> = names(&self.pods_directory())?.into_iter().filter_map(known).collect();
        pods.sort();
        Ok(pods)
    }

    /// Renames the pod's directory, which deletes its record atomically, and then removes the files. A crash in between
    /// leaves no pod behind.
    fn forget_pod(&self, pod: &PodId) -> Result<(), StoreError> {
        let _locked = self.lock()?;
        let pods = self.pods_directory();
        let gone = pods.join(format!("{GONE_PREFIX}{:032x}", rand::random::<u128>()));
        match fs::rename(self.pod_directory(pod), &gone) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            renamed => renamed.map_err(FileError::io("forgetting", &self.pod_directory(pod)))?,
        }
        private_file::sync_directory(&pods)?;
        Ok(fs::remove_dir_all(&gone).map_err(FileError::io("removing", &gone))?)
    }

    /// Writes a file of the pod's record.
    fn write_record(&self, pod: &PodId, path: &Path, content: &[u8]) -> Result<(), StoreError> {
        let _locked = self.lock_shared()?;
        if !self.key_file(pod).exists() {
            return Err(StoreError::UnknownPod(pod.clone()));
        }
        Ok(private_file::replace(path, content)?)
    }

    fn write_init_data(&self, pod: &PodId, digest: Option<&InitDataDigest>) -> Result<(), StoreError> {
        if self.read_init_data(pod).is_ok_and(|there| there.as_ref() == digest) && self.key_file(pod).exists()
        {
            return Ok(());
        }
        // An empty file is no digest: so it is replaced atomically, and never removed.
        let text = digest.map_or("", InitDataDigest::as_str);
        self.write_record(pod, &self.init_data_file(pod), text.as_bytes())
    }

    fn read_init_data(&self, pod: &PodId) -> Result<Option<InitDataDigest>, StoreError> {
        let path = self.init_data_file(pod);
        let digest = match private_file::read(&path, KEY_MAX) {
            Err(error) if error.is_not_found() => return Ok(None),
            digest => digest?,
        };
        if digest.is_empty() {
            return Ok(None);
        }
        let digest = std::str::from_utf8(&digest).ok().and_then(|digest| digest.parse().ok());
        digest.map(Some).ok_or(StoreError::BrokenRecord(path))
    }

    fn write_published(&self, pod: &PodId, paths: &[String]) -> Result<(), StoreError> {
        let there = self.read_published(pod);
        if there.is_ok_and(|there| there.as_deref() == Some(paths)) && self.key_file(pod).exists() {
            return Ok(());
        }
        let json = serde_json::Value::from(paths).to_string();
        self.write_record(pod, &self.published_file(pod), json.as_bytes())
    }

    fn read_published(&self, pod: &PodId) -> Result<Option<Vec<String>>, StoreError> {
        let path = self.published_file(pod);
        let json = match private_file::read(&path, KEY_MAX) {
            Err(error) if error.is_not_found() => return Ok(None),
            json => json?,
        };
        serde_json::from_slice(&json).map(Some).map_err(|_| StoreError::BrokenRecord(path))
    }

    fn write_addresses(&self, pod: &PodId, addresses: &[Address]) -> Result<(), StoreError> {
        // A restart saves the same addresses: that must work on a full or read-only disk.
        if self.read_addresses(pod).is_ok_and(|there| there == addresses) && self.key_file(pod).exists() {
            return Ok(());
        }
        let texts: Vec<String> = addresses.iter().map(ToString::to_string).collect();
        let json = serde_json::Value::from(texts).to_string();
        self.write_record(pod, &self.addresses_file(pod), json.as_bytes())
    }

    fn read_addresses(&self, pod: &PodId) -> Result<Vec<Address>, StoreError> {
        let path = self.addresses_file(pod);
        let json = match private_file::read(&path, KEY_MAX) {
            Err(error) if error.is_not_found() => return Ok(Vec::new()),
            json => json?,
        };
        let texts: Option<Vec<String>> = serde_json::from_slice(&json).ok();
        let addresses = texts.and_then(|texts| texts.iter().map(|text| text.parse().ok()).collect());
        addresses.ok_or(StoreError::BrokenAddresses(path))
    }

    fn write_labels(&self, pod: &PodId, labels: &Labels) -> Result<(), StoreError> {
        if self.read_labels(pod).is_ok_and(|there| there == *labels) && self.key_file(pod).exists() {
            return Ok(());
        }
        let json = serde_json::json!(labels).to_string();
        if json.len() > LABELS_MAX {
            return Err(StoreError::LongLabels { pod: pod.clone(), len: json.len() });
        }
        self.write_record(pod, &self.labels_file(pod), json.as_bytes())
    }

    fn read_labels(&self, pod: &PodId) -> Result<Labels, StoreError> {
        let path = self.labels_file(pod);
        let json = match private_file::read(&path, LABELS_MAX) {
            Err(error) if error.is_not_found() => return Ok(Labels::new()),
            json => json?,
        };
        Ok(serde_json::from_slice(&json).unwrap_or_else(|error| {
            tracing::warn!("key store: {}: {error}: the pod's labels are lost", path.display());
            Labels::new()
        }))
    }

    fn write_ending(&self, pod: &PodId) -> Result<bool, StoreError> {
        let path = self.ending_file(pod);
        if path.exists() {
            return Ok(true);
        }
        let _locked = self.lock_shared()?;
        if !self.key_file(pod).exists() {
            return Ok(false);
        }
        private_file::create(&path, b"")?;
        Ok(true)
    }

    /// When a file was last written; `None` if it is missing.
    fn written(path: &Path) -> Result<Option<SystemTime>, StoreError> {
        let failed = || FileError::io("reading", path);
        match fs::symlink_metadata(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            metadata => Ok(Some(metadata.and_then(|metadata| metadata.modified()).map_err(failed())?)),
        }
    }

    /// Runs blocking work on tokio's blocking threads: a slow disk must not delay the tasks of other pods.
    async fn on_disk<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let store = self.clone();
        tokio::task::spawn_blocking(move || work(&store)).await.unwrap_or(Err(StoreError::CutOff))
    }
}

/// Reads the key. If there is none, makes one and reads it back, so that all callers get the key that is on the disk.
fn find_or_make<K>(
    path: &Path,
    decode: fn(&[u8]) -> Result<K, KeyError>,
    make: impl FnOnce() -> Result<bool, StoreError>,
) -> Result<K, StoreError> {
    let pem = match private_file::read(path, KEY_MAX) {
        Err(error) if error.is_not_found() => {
            make()?;
            private_file::read(path, KEY_MAX)?
        }
        pem => pem?,
    };
    decoded(path, decode, &pem)
}

fn decoded<K>(
    path: &Path,
    decode: fn(&[u8]) -> Result<K, KeyError>,
    pem: &Zeroizing<Vec<u8>>,
) -> Result<K, StoreError> {
    decode(pem).map_err(|source| StoreError::BrokenKey { path: path.to_owned(), source })
}

fn names(directory: &Path) -> Result<Vec<String>, FileError> {
    let failed = || FileError::io("listing", directory);
    let mut names = Vec::new();
    for entry in fs::read_dir(directory).map_err(failed())? {
        // The store makes no names that are not UTF-8.
        names.extend(entry.map_err(failed())?.file_name().into_string());
    }
    Ok(names)
}

fn remove_leftovers(directory: &Path) -> Result<(), FileError> {
    for name in names(directory)? {
        let path = directory.join(&name);
        if name.starts_with(GONE_PREFIX) || name.starts_with(NEW_PREFIX) {
            fs::remove_dir_all(&path).map_err(FileError::io("removing", &path))?;
        } else if name.starts_with(TEMP_PREFIX) {
            fs::remove_file(&path).map_err(FileError::io("removing", &path))?;
        }
    }
    Ok(())
}

#[async_trait]
impl Store for DirectoryStore {
    async fn worker_node_key(&self) -> Result<WorkerNodeKey, StoreError> {
        self.on_disk(Self::find_or_make_worker_node_key).await
    }

    async fn worker_node_keys(&self) -> Result<Vec<WorkerNodeKey>, StoreError> {
        self.on_disk(Self::read_worker_node_keys).await
    }

    async fn rotate_worker_node_key(&self) -> Result<WorkerNodeKey, StoreError> {
        self.on_disk(Self::rotate).await
    }

    async fn prune(&self) -> Result<Pruned, StoreError> {
        self.on_disk(Self::prune_worker_node_keys).await
    }

    async fn pod_worker_nodes(&self, pod: &PodId) -> Result<PodWorkerNodes, StoreError> {
        let pod = pod.clone();
        self.on_disk(move |store| store.read_pod_worker_nodes(&pod)).await
    }

    async fn save_given(&self, pod: &PodId, fingerprints: &[String]) -> Result<(), StoreError> {
        let (pod, fingerprints) = (pod.clone(), fingerprints.to_vec());
        self.on_disk(move |store| store.write_given(&pod, &fingerprints)).await
    }

    async fn pod_key(&self, pod: &PodId) -> Result<PodKey, StoreError> {
        let pod = pod.clone();
        self.on_disk(move |store| store.find_or_make_pod_key(&pod)).await
    }

    async fn known_pod_key(&self, pod: &PodId) -> Result<Option<PodKey>, StoreError> {
        let pod = pod.clone();
        self.on_disk(move |store| {
            let path = store.key_file(&pod);
            match private_file::read(&path, KEY_MAX) {
                Err(error) if error.is_not_found() => Ok(None),
                pem => decoded(&path, PodKey::from_pem, &pem?).map(Some),
            }
        })
        .await
    }

    async fn pods(&self) -> Result<Vec<PodId>, StoreError> {
        self.on_disk(Self::list_pods).await
    }

    async fn forget(&self, pod: &PodId) -> Result<(), StoreError> {
        let pod = pod.clone();
        self.on_disk(move |store| store.forget_pod(&pod)).await
    }

    async fn save_addresses(&self, pod: &PodId, addresses: &[Address]) -> Result<(), StoreError> {
        let (pod, addresses) = (pod.clone(), addresses.to_vec());
        self.on_disk(move |store| store.write_addresses(&pod, &addresses)).await
    }

    async fn addresses(&self, pod: &PodId) -> Result<Vec<Address>, StoreError> {
        let pod = pod.clone();
        self.on_disk(move |store| store.read_addresses(&pod)).await
    }

    async fn labels(&self, pod: &PodId) -> Result<Labels, StoreError> {
        let pod = pod.clone();
        self.on_disk(move |store| store.read_labels(&pod)).await
    }

    async fn save_labels(&self, pod: &PodId, labels: &Labels) -> Result<(), StoreError> {
        let (pod, labels) = (pod.clone(), labels.clone());
        self.on_disk(move |store| store.write_labels(&pod, &labels)).await
    }

    async fn init_data(&self, pod: &PodId) -> Result<Option<InitDataDigest>, StoreError> {
        let pod = pod.clone();
        self.on_disk(move |store| store.read_init_data(&pod)).await
    }

    async fn save_init_data(&self, pod: &PodId, digest: Option<&InitDataDigest>) -> Result<(), StoreError> {
        let (pod, digest) = (pod.clone(), digest.cloned());
        self.on_disk(move |store| store.write_init_data(&pod, digest.as_ref())).await
    }

    async fn published(&self, pod: &PodId) -> Result<Option<Vec<String>>, StoreError> {
        let pod = pod.clone();
        self.on_disk(move |store| store.read_published(&pod)).await
    }

    async fn save_published(&self, pod: &PodId, paths: &[String]) -> Result<(), StoreError> {
        let (pod, paths) = (pod.clone(), paths.to_vec());
        self.on_disk(move |store| store.write_published(&pod, &paths)).await
    }

    async fn mark_ending(&self, pod: &PodId) -> Result<bool, StoreError> {
        let pod = pod.clone();
        self.on_disk(move |store| store.write_ending(&pod)).await
    }

    async fn ending_since(&self, pod: &PodId) -> Result<Option<SystemTime>, StoreError> {
        let pod = pod.clone();
        self.on_disk(move |store| Self::written(&store.ending_file(&pod))).await
    }

    async fn made(&self, pod: &PodId) -> Result<Option<SystemTime>, StoreError> {
        let pod = pod.clone();
        self.on_disk(move |store| Self::written(&store.key_file(&pod))).await
    }

    async fn lock_pod(&self, pod: &PodId) -> Result<Option<PodLock>, StoreError> {
        let pod = pod.clone();
        self.on_disk(move |store| store.lock_pod_soon(&pod)).await
    }
}
