//! A pod's keys at the KBS: published under one path while its VM needs them, and deleted before a local client is served.
//!
//! In: the keys, the pod's record in the store, and orders to publish or to delete. Out: requests to the KBS. The record
//! names every path before a private key is sent there, and loses it only after a deletion that the KBS has confirmed:
//! so a later process knows what to delete.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use secure_comms_keys::{KeyError, PodKey, PodKeys, WorkerNodeKey, WorkerNodeKeys};
use secure_comms_protocol::{InitDataDigest, PodId, resource};
use tokio::sync::watch;
use zeroize::Zeroizing;

use crate::deadline::Deadline;
use crate::kbs::{KbsClient, KbsError};
use crate::store::{PodWorkerNodes, Store, StoreError};
use crate::text::with_causes;

/// Error of publishing or deleting a pod's keys.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PublicationError {
    /// The pod's record cannot be read or written.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The KBS failed.
    #[error(transparent)]
    Kbs(#[from] KbsError),
    /// A key cannot be encoded.
    #[error("use a key of the store")]
    Key(#[from] KeyError),
}

/// The keys that a pod's VM gets.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Keys<'a> {
    pub(crate) nodes: &'a PodWorkerNodes,
    pub(crate) pod: &'a PodKey,
}

/// Fingerprints of the worker-node keys that a pod's VM may have been given. It grows with each publication. A clone is the
/// same.
#[derive(Clone, Debug, Default)]
pub(crate) struct Given(Arc<Mutex<BTreeSet<String>>>);

impl Given {
    pub(crate) fn extend(&self, fingerprints: impl IntoIterator<Item = String>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend(fingerprints);
    }

    pub(crate) fn contains(&self, fingerprint: &str) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).contains(fingerprint)
    }
}

/// What is published of every pod.
#[derive(Clone, Debug)]
pub(crate) struct Policy {
    /// Worker nodes that may log in, besides this one.
    pub(crate) worker_nodes: Option<WorkerNodeKeys>,
    /// Whether the two separate resources are published as well.
    pub(crate) old_agents: bool,
}

/// A resource: its path, its content, and whether that is secret.
type Resource = (String, Zeroizing<Vec<u8>>, bool);

/// One pod's keys at the KBS.
pub(crate) struct Publication {
    id: PodId,
    store: Arc<dyn Store>,
    kbs: KbsClient,
    policy: Policy,
    /// Whether a VM may need the keys: false from the Kubernetes phase on, until an agent attests again.
    needed: watch::Sender<bool>,
    /// Lets one publication or deletion run at a time.
    exclusive: tokio::sync::Mutex<()>,
    /// The paths under which the private key may be; `None` until the record was read.
    recorded: Mutex<Option<Vec<String>>>,
    given: Given,
}

impl fmt::Debug for Publication {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Publication").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Publication {
    pub(crate) fn new(id: PodId, store: Arc<dyn Store>, kbs: KbsClient, policy: Policy) -> Self {
        let needed = watch::Sender::new(true);
        Self {
            id,
            store,
            kbs,
            policy,
            needed,
            exclusive: tokio::sync::Mutex::default(),
            recorded: Mutex::default(),
            given: Given::default(),
        }
    }

    /// What the pod's VM may have been given by this publication.
    pub(crate) fn given(&self) -> &Given {
        &self.given
    }

    /// The KBS's URL.
    pub(crate) fn url(&self) -> &str {
        self.kbs.url()
    }

    /// An agent attests, or will: it needs the keys. True if none was known to need them.
    pub(crate) fn need(&self) -> bool {
        !self.needed.send_replace(true)
    }

    /// Whether a VM may need the keys.
    pub(crate) fn is_needed(&self) -> bool {
        *self.needed.borrow()
    }

    /// Whether the private key is known not to be in the KBS.
    pub(crate) fn is_gone(&self) -> bool {
        self.cached().is_some_and(|paths| paths.is_empty())
    }

    /// Whether this process may have sent the private key to the KBS since its last confirmed deletion.
    pub(crate) fn has_left(&self) -> bool {
        self.cached().is_some_and(|paths| paths.iter().any(|path| self.kbs.may_hold(path)))
    }

    fn cached(&self) -> Option<Vec<String>> {
        self.recorded.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn cache(&self, paths: &[String]) {
        *self.recorded.lock().unwrap_or_else(PoisonError::into_inner) = Some(paths.to_vec());
    }

    /// The paths under which the private key may be.
    pub(crate) async fn recorded(&self) -> Result<Vec<String>, StoreError> {
        if let Some(paths) = self.cached() {
            return Ok(paths);
        }
        let paths = match self.store.published(&self.id).await {
            Ok(Some(paths)) => paths,
            // A version before 0.2 has published the pod's key there.
            Ok(None) => vec![resource::separate::pod_private_key(&self.id)],
            Err(error @ StoreError::BrokenRecord(_)) => {
                tracing::warn!(
                    "pod {}: {}; its key is deleted from the KBS wherever it may be",
                    self.id,
                    with_causes(&error)
                );
                self.possible_paths().await?
            }
            Err(error) => return Err(error),
        };
        self.cache(&paths);
        Ok(paths)
    }

    /// As [`recorded`](Self::recorded), also for a record that is damaged.
    pub(crate) async fn may_be_at(&self) -> Result<Vec<String>, StoreError> {
        match self.recorded().await {
            Err(StoreError::BrokenRecord(_)) => Ok(vec![resource::pod_keys(&self.id, None)]),
            recorded => recorded,
        }
    }

    /// Every path under which this version and older ones publish the private key.
    async fn possible_paths(&self) -> Result<Vec<String>, StoreError> {
        let init_data = self.store.init_data(&self.id).await?;
        let mut paths =
            vec![resource::pod_keys(&self.id, None), resource::separate::pod_private_key(&self.id)];
        paths.extend(init_data.map(|digest| resource::pod_keys(&self.id, Some(&digest))));
        Ok(paths)
    }

    /// Publishes the keys; false if no VM needs them, from the beginning or by now.
    ///
    /// What is published under other paths is deleted first.
    ///
    /// Cancellation: a request that was sent may still take effect; a later deletion waits for it.
    pub(crate) async fn publish(
        &self,
        keys: Keys<'_>,
        deadline: Option<Deadline>,
    ) -> Result<bool, PublicationError> {
        let mut needed = self.needed.subscribe();
        let publish = async {
            let _alone = self.exclusive.lock().await;
            self.publish_alone(keys, deadline).await
        };
        tokio::select! {
            biased;
            // The sender is in `self`.
            _ = needed.wait_for(|needed| !needed) => Ok(false),
            published = publish => published.map(|()| true),
        }
    }

    async fn publish_alone(
        &self,
        keys: Keys<'_>,
        deadline: Option<Deadline>,
    ) -> Result<(), PublicationError> {
        let within =
            || deadline.map_or_else(|| self.kbs.clone(), |deadline| self.kbs.within(deadline.left()));
        let resources = self.resources(keys).await?;
        let secret: Vec<String> =
            resources.iter().filter(|(_, _, secret)| *secret).map(|(path, ..)| path.clone()).collect();
        let before = self.recorded().await?;
        for path in before.iter().filter(|path| !secret.contains(path)) {
            within().delete(path).await?;
        }
        // Before the VM can get them: it says later which it has.
        let nodes = keys.nodes.all().map(WorkerNodeKey::fingerprint);
        let others = self.policy.worker_nodes.iter().flat_map(WorkerNodeKeys::fingerprints);
        let given: Vec<String> = nodes.chain(others).collect();
        self.store.save_given(&self.id, &given).await?;
        self.given.extend(given);
        self.cache(&secret);
        self.store.save_published(&self.id, &secret).await.inspect_err(|_| self.cache(&before))?;
        for (path, content, _) in &resources {
            if let Err(error) = within().publish(path, content).await {
                self.take_back(&before, &secret).await;
                return Err(error.into());
            }
        }
        Ok(())
    }

    /// After a publication that failed: the record is as before if nothing has left this process.
    async fn take_back(&self, before: &[String], secret: &[String]) {
        if before.is_empty() && !secret.iter().any(|path| self.kbs.may_hold(path)) {
            self.forget().await;
        }
    }

    /// Nothing is in the KBS any more. If that cannot be saved, a later process deletes once more.
    async fn forget(&self) {
        self.cache(&[]);
        if let Err(error) = self.store.save_published(&self.id, &[]).await {
            tracing::warn!(
                "pod {}: its key is not in the KBS, but that cannot be saved: {}; the next process deletes it again",
                self.id,
                with_causes(&error)
            );
        }
    }

    async fn resources(&self, keys: Keys<'_>) -> Result<Vec<Resource>, PublicationError> {
        let init_data = self.store.init_data(&self.id).await?;
        let mut lines = String::new();
        for node in keys.nodes.all() {
            lines += &node.public()?.authorized_keys_line()?;
            lines.push('\n');
        }
        lines +=
            &self.policy.worker_nodes.as_ref().map(WorkerNodeKeys::to_lines).transpose()?.unwrap_or_default();
        let pem = keys.pod.to_pem()?;
        let text = PodKeys::parse(pem.as_bytes(), lines.as_bytes())?.to_text()?;
        let bytes = |text: &str| Zeroizing::new(text.as_bytes().to_vec());
        let path = resource::pod_keys(&self.id, init_data.as_ref());
        let mut resources = vec![(path, bytes(&text), true)];
        if self.policy.old_agents {
            let public = resource::separate::WORKER_NODE_PUBLIC_KEY.to_owned();
            resources.push((public, bytes(&lines), false));
            resources.push((resource::separate::pod_private_key(&self.id), bytes(&pem), true));
        }
        Ok(resources)
    }

    /// Saves the init-data that the pod's VM must show. What is published under the path of another one is deleted first.
    pub(crate) async fn bind(
        &self,
        init_data: Option<&InitDataDigest>,
        deadline: Deadline,
    ) -> Result<(), PublicationError> {
        if self.store.init_data(&self.id).await?.as_ref() != init_data {
            let _alone = self.exclusive.lock().await;
            self.delete(|| deadline.left()).await?;
            self.store.save_init_data(&self.id, init_data).await?;
        }
        Ok(())
    }

    /// Deletes the keys because no VM needs them any more, and ends a publication that is under way. False if they were
    /// gone already: then neither the KBS nor the store is asked.
    ///
    /// Each request is retried for at most `limit`.
    ///
    /// Cancellation: the keys may still be there, and the record says so.
    pub(crate) async fn withdraw(&self, limit: Duration) -> Result<bool, PublicationError> {
        self.needed.send_replace(false);
        if self.is_gone() {
            return Ok(false);
        }
        let _alone = self.exclusive.lock().await;
        self.delete(|| limit).await
    }

    async fn delete(&self, limit: impl Fn() -> Duration) -> Result<bool, PublicationError> {
        let recorded = self.recorded().await?;
        for path in &recorded {
            self.kbs.within(limit()).delete(path).await?;
        }
        if recorded.is_empty() {
            return Ok(false);
        }
        self.forget().await;
        Ok(true)
    }

    /// Deletes the keys of a pod that ends, also those that are gone as far as is known. An error names the path.
    pub(crate) async fn end(&self, deadline: Deadline) -> Result<(), (String, PublicationError)> {
        self.needed.send_replace(false);
        let _alone = self.exclusive.lock().await;
        let path = resource::pod_keys(&self.id, None);
        let init_data = self.store.init_data(&self.id).await;
        let init_data = init_data.map_err(|error| (path.clone(), error.into()))?;
        let mut paths = self.recorded().await.map_err(|error| (path, error.into()))?;
        let usual = resource::pod_keys(&self.id, init_data.as_ref());
        if !paths.contains(&usual) {
            paths.push(usual);
        }
        for path in paths {
            let deleted = self.kbs.within(deadline.left()).delete(&path).await;
            deleted.map_err(|error| (path, error.into()))?;
        }
        self.forget().await;
        Ok(())
    }
}
