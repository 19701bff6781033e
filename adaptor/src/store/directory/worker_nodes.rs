//! The worker-node keys: the current one, earlier ones that are still valid, and which of them each pod was given.
//!
//! A pod goes on with the key that its record names, because its VM lets in what it was given and nothing else. A record is
//! made under a lock that keeps keys from being pruned: so a key that a record names is never removed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use secure_comms_keys::{WorkerNodeKey, private_file};
use secure_comms_protocol::PodId;
use secure_comms_protocol::limits::KEY_MAX;
use serde::{Deserialize, Serialize};

use super::{DirectoryStore, Locked, decoded, find_or_make, names};
use crate::store::{PodWorkerNodes, Pruned, StoreError};

/// In the directory of a pod.
const RECORD: &str = "worker-nodes.json";
const PREFIX: &str = "worker-node.";
const SUFFIX: &str = ".key";
/// Longest record of the worker nodes of a pod, in bytes: some hundred fingerprints.
const RECORD_MAX: usize = 64 * 1024;

/// The worker nodes in a pod's record, by fingerprints.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    /// The key with which this node logs in.
    own: String,
    /// All keys that the pod's VM may have been given.
    given: Vec<String>,
}

impl DirectoryStore {
    fn earlier_key_file(&self, number: u64) -> PathBuf {
        self.root.join(format!("{PREFIX}{number}{SUFFIX}"))
    }

    /// Missing in a record of a version before 0.2.
    fn worker_nodes_file(&self, pod: &PodId) -> PathBuf {
        self.pod_directory(pod).join(RECORD)
    }

    pub(super) fn find_or_make_worker_node_key(&self) -> Result<WorkerNodeKey, StoreError> {
        let path = self.worker_node_key_file();
        find_or_make(&path, WorkerNodeKey::from_pem, || self.make_worker_node_key(&self.lock()?))
    }

    fn make_worker_node_key(&self, _locked: &Locked) -> Result<bool, StoreError> {
        let pem = WorkerNodeKey::generate().and_then(|key| key.to_pem()).map_err(StoreError::Key)?;
        Ok(private_file::create(&self.worker_node_key_file(), pem.as_bytes())?)
    }

    /// The numbers of the earlier keys, the newest first.
    fn earlier_numbers(&self) -> Result<Vec<u64>, StoreError> {
        let number = |name: String| name.strip_prefix(PREFIX)?.strip_suffix(SUFFIX)?.parse().ok();
        let mut numbers: Vec<u64> = names(&self.root)?.into_iter().filter_map(number).collect();
        numbers.sort_unstable_by(|a, b| b.cmp(a));
        Ok(numbers)
    }

    fn read_earlier(&self, number: u64) -> Result<WorkerNodeKey, StoreError> {
        let path = self.earlier_key_file(number);
        decoded(&path, WorkerNodeKey::from_pem, &private_file::read(&path, KEY_MAX)?)
    }

    pub(super) fn read_worker_node_keys(&self) -> Result<Vec<WorkerNodeKey>, StoreError> {
        let path = self.worker_node_key_file();
        let mut keys = match private_file::read(&path, KEY_MAX) {
            Err(error) if error.is_not_found() => Vec::new(),
            pem => vec![decoded(&path, WorkerNodeKey::from_pem, &pem?)?],
        };
        for number in self.earlier_numbers()? {
            let key = self.read_earlier(number)?;
            // A rotation that was interrupted leaves the current key as an earlier one, too.
            if keys.iter().all(|other| other.fingerprint() != key.fingerprint()) {
                keys.push(key);
            }
        }
        Ok(keys)
    }

    /// The earlier key is there before the current one is replaced: an interruption loses none.
    pub(super) fn rotate(&self) -> Result<WorkerNodeKey, StoreError> {
        let locked = self.lock()?;
        let path = self.worker_node_key_file();
        match private_file::read(&path, KEY_MAX) {
            Err(error) if error.is_not_found() => {
                self.make_worker_node_key(&locked)?;
            }
            pem => {
                let pem = pem?;
                decoded(&path, WorkerNodeKey::from_pem, &pem)?;
                let number = self.earlier_numbers()?.first().map_or(1, |newest| newest.saturating_add(1));
                private_file::create(&self.earlier_key_file(number), &pem)?;
                let pem = WorkerNodeKey::generate().and_then(|key| key.to_pem()).map_err(StoreError::Key)?;
                private_file::replace(&path, pem.as_bytes())?;
            }
        }
        decoded(&path, WorkerNodeKey::from_pem, &private_file::read(&path, KEY_MAX)?)
    }

    pub(super) fn prune_worker_node_keys(&self) -> Result<Pruned, StoreError> {
        let _locked = self.lock()?;
        let keys = self.read_worker_node_keys()?;
        let oldest = keys.last().map(WorkerNodeKey::fingerprint);
        let mut needs: BTreeMap<String, Vec<PodId>> = BTreeMap::new();
        for pod in self.list_pods()? {
            let own = self.read_worker_nodes(&pod)?.map(|record| record.own).or_else(|| oldest.clone());
            if let Some(own) = own {
                needs.entry(own).or_default().push(pod);
            }
        }
        let current = keys.first().map(WorkerNodeKey::fingerprint);
        let mut pruned = Pruned::default();
        for number in self.earlier_numbers()? {
            let fingerprint = self.read_earlier(number)?.fingerprint();
            if Some(&fingerprint) != current.as_ref()
                && let Some(pods) = needs.get(&fingerprint)
            {
                pruned.needed.push((fingerprint, pods.clone()));
                continue;
            }
            let path = self.earlier_key_file(number);
            std::fs::remove_file(&path).map_err(secure_comms_keys::FileError::io("removing", &path))?;
            pruned
                .removed
                .extend(Some(fingerprint).filter(|fingerprint| Some(fingerprint) != current.as_ref()));
        }
        private_file::sync_directory(&self.root)?;
        Ok(pruned)
    }

    /// A new pod gets the current key to be driven with, and may be given all that are valid. Its record is placed under
    /// the same lock.
    pub(super) fn assign_worker_nodes(
        &self,
        new: &Path,
        own: &WorkerNodeKey,
        _locked: &Locked,
    ) -> Result<(), StoreError> {
        // They may have been rotated and pruned before the lock was held.
        let keys = self.read_worker_node_keys()?;
        let given = keys.iter().map(WorkerNodeKey::fingerprint).collect();
        let record = Record { own: keys.first().unwrap_or(own).fingerprint(), given };
        private_file::create_unsynced(&new.join(RECORD), &json(&record))?;
        Ok(())
    }

    fn read_worker_nodes(&self, pod: &PodId) -> Result<Option<Record>, StoreError> {
        let path = self.worker_nodes_file(pod);
        let json = match private_file::read(&path, RECORD_MAX) {
            Err(error) if error.is_not_found() => return Ok(None),
            json => json?,
        };
        serde_json::from_slice(&json).map(Some).map_err(|_| StoreError::BrokenRecord(path))
    }

    pub(super) fn read_pod_worker_nodes(&self, pod: &PodId) -> Result<PodWorkerNodes, StoreError> {
        if !self.key_file(pod).exists() {
            return Err(StoreError::UnknownPod(pod.clone()));
        }
        let record = self.read_worker_nodes(pod)?;
        let mut others = self.read_worker_node_keys()?;
        if others.is_empty() {
            others.push(self.find_or_make_worker_node_key()?);
        }
        let own = match &record {
            Some(record) => others.iter().position(|key| key.fingerprint() == record.own),
            None => others.len().checked_sub(1),
        };
        let missing = || StoreError::MissingWorkerNodeKey {
            pod: pod.clone(),
            fingerprint: record.as_ref().map(|record| record.own.clone()).unwrap_or_default(),
        };
        let own = others.remove(own.ok_or_else(missing)?);
        let given = record.map(|record| record.given).unwrap_or_default();
        Ok(PodWorkerNodes { own, others, given })
    }

    pub(super) fn write_given(&self, pod: &PodId, fingerprints: &[String]) -> Result<(), StoreError> {
        let known = |record: Record| fingerprints.iter().all(|print| record.given.contains(print));
        if self.read_worker_nodes(pod)?.is_some_and(known) {
            return Ok(());
        }
        // Before the lock, which it takes.
        self.find_or_make_worker_node_key()?;
        // Exclusive: a record that another process adds to loses nothing.
        let _locked = self.lock()?;
        if !self.key_file(pod).exists() {
            return Err(StoreError::UnknownPod(pod.clone()));
        }
        let there = self.read_worker_nodes(pod)?;
        let mut record = match &there {
            Some(record) => record.clone(),
            None => {
                let own = self.read_pod_worker_nodes(pod)?.own.fingerprint();
                Record { own, given: Vec::new() }
            }
        };
        for fingerprint in fingerprints {
            if !record.given.contains(fingerprint) {
                record.given.push(fingerprint.clone());
            }
        }
        Ok(private_file::replace(&self.worker_nodes_file(pod), &json(&record))?)
    }
}

fn json(record: &Record) -> Vec<u8> {
    serde_json::json!(record).to_string().into_bytes()
}
