//! The steps of a pod that take time before it has a channel: its keys, its listeners, and the publication.
//!
//! An operation runs in the pod's task, one at a time. A cancellation interrupts the waits for the KBS and for an
//! inbound's namespace, and never the store in the middle of a change.

use std::future::pending;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use secure_comms_keys::{PodPublic, WorkerNodeKey, WorkerNodeKeys};
use secure_comms_protocol::{InboundTag, InitDataDigest, PodId};
use secure_comms_tunnel::Inbound;
use secure_comms_tunnel::inbound::BindError;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout_at};

use super::command::{Reply, StartOrder};
use super::error::AdaptorError;
use super::listen_path::{PodDirectories, for_pod, make_directories};
use super::shared::{PodSpec, Shared};
use crate::address::Address;
use crate::deadline::Deadline;
use crate::handover::pauses;
use crate::pod::Endpoint;
use crate::publication::{Given, Keys, Publication, PublicationError};
use crate::store::{Labels, PodLock, PodWorkerNodes, StoreError};
use crate::text::with_causes;
use crate::transport::routes::Routes;

pub(super) type Work<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// The time limit for deleting the resource of a pod that is stopped. A KBS that does not answer must not hold up the
/// stop: its caller gets an error and can stop the pod again.
pub(super) const KBS_DELETE: Duration = Duration::from_secs(10);
/// The same where the stop interrupted a wait for the KBS, which may not answer at all. Half of it is for the answer to a
/// publication that is under way.
pub(super) const KBS_DELETE_SILENT: Duration = Duration::from_secs(4);

/// What serves a prepared pod's local clients. Dropping it closes the inbounds.
#[derive(Debug)]
pub(super) struct Served {
    pub(super) endpoints: Vec<Endpoint>,
    pub(super) routes: Arc<Routes>,
    pub(super) node_key: WorkerNodeKey,
    /// The worker nodes that the pod's agent may let in.
    pub(super) given: Given,
    pub(super) pod_key: PodPublic,
    /// Digest of the init-data that the pod's VM must show.
    pub(super) init_data: Option<InitDataDigest>,
    pub(super) inbounds: JoinSet<()>,
    /// After the inbounds, whose sockets are in them.
    pub(super) directories: Vec<PodDirectories>,
}

/// What an operation acquired.
#[derive(Debug, Default)]
pub(super) struct Acquired {
    pub(super) lock: Option<PodLock>,
    pub(super) served: Option<Served>,
    /// The addresses of an earlier start.
    pub(super) addresses: Vec<Address>,
    /// Whether the keys were published.
    pub(super) published: bool,
    /// The init-data that the pod's VM must show from now on, if that is known.
    pub(super) init_data: Option<Option<InitDataDigest>>,
    /// The pod's labels, if they were read or saved.
    pub(super) labels: Option<Labels>,
    /// Whether nothing of the pod can be in the KBS: the key was made by this operation, never left it, and is deleted.
    pub(super) untouched: bool,
    /// Whether the pod was found to be one that is being ended.
    pub(super) ending: bool,
    /// Whether this operation has completed that.
    pub(super) ended: bool,
}

/// Who waits for an operation, and what follows it.
#[derive(Debug)]
pub(super) enum Then {
    Prepared(Reply<Vec<Endpoint>>),
    Restored(Reply<Option<Vec<Endpoint>>>),
    Resumed(Reply<bool>),
    Published(Reply<()>),
    Start(StartOrder),
}

/// An operation that is under way.
pub(super) struct Operation {
    pub(super) then: Then,
    pub(super) work: Work<(Acquired, Result<(), AdaptorError>)>,
    pub(super) cancel: watch::Sender<bool>,
    /// What it waits for, for the operator.
    pub(super) step: watch::Receiver<String>,
    pub(super) deadline: Option<Deadline>,
}

/// What an operation works with.
pub(super) struct Context {
    pub(super) id: PodId,
    pub(super) shared: Arc<Shared>,
    /// Whether the pod's task holds the pod's lock already.
    pub(super) locked: bool,
    /// Whether the pod is served already.
    pub(super) served: bool,
    /// The pod's keys at the KBS; none if the VMs have their keys from user data.
    pub(super) publication: Option<Arc<Publication>>,
    cancel: watch::Receiver<bool>,
    step: watch::Sender<String>,
}

/// A pod, as its task knows it.
pub(super) struct Pod {
    pub(super) id: PodId,
    pub(super) shared: Arc<Shared>,
    pub(super) publication: Option<Arc<Publication>>,
    pub(super) locked: bool,
    pub(super) served: bool,
}

/// The ends of a context that the pod's task keeps.
pub(super) type Controls = (watch::Sender<bool>, watch::Receiver<String>);

impl Context {
    pub(super) fn new(pod: Pod) -> (Self, Controls) {
        let (cancel, cancelled) = watch::channel(false);
        let (step, steps) = watch::channel("the store".to_owned());
        let Pod { id, shared, publication, locked, served } = pod;
        (Self { id, shared, locked, served, publication, cancel: cancelled, step }, (cancel, steps))
    }

    /// Finds or makes the keys, listens, and publishes. On an error a key that it made is deleted, unless it may be in the
    /// KBS: then the pod stays known, so that a later call can delete it there.
    pub(super) async fn prepare(
        self,
        spec: PodSpec,
        deadline: Deadline,
    ) -> (Acquired, Result<(), AdaptorError>) {
        let mut acquired = Acquired::default();
        let known = match self.shared.store.known_pod_key(&self.id).await {
            Ok(key) => key.is_some(),
            Err(error) => return (acquired, Err(error.into())),
        };
        if !known && !self.shared.key_source.attests() {
            return (acquired, Err(AdaptorError::NoKey(self.id.clone())));
        }
        let result = match self.complete_end(&mut acquired, deadline).await {
            Ok(()) => self.prepare_with(&mut acquired, &spec, deadline).await,
            Err(error) => return (acquired, Err(error)),
        };
        let known = known && !acquired.ended;
        if let Err(error) = &result {
            // Before the record is deleted, so that the ports are free when the caller hears of the error.
            close(acquired.served.take()).await;
            // The record of a pod that another adaptor drives is that adaptor's.
            let ours = !matches!(error, AdaptorError::Store(StoreError::Locked { .. }));
            let left = self.publication.as_ref().is_some_and(|publication| publication.has_left());
            if !known && ours && !left {
                match self.shared.store.forget(&self.id).await {
                    Ok(()) => acquired.untouched = true,
                    // A fault of the store has failed both, and the caller reports it; a launcher tries again and again.
                    Err(_) if matches!(error, AdaptorError::Store(_)) => {}
                    Err(error) => tracing::error!(
                        "pod {}: cleaning up after a failed prepare: {}",
                        self.id,
                        with_causes(&error)
                    ),
                }
            }
        }
        (acquired, result)
    }

    /// Deletes an earlier pod of this id whose end is not done.
    async fn complete_end(&self, acquired: &mut Acquired, deadline: Deadline) -> Result<(), AdaptorError> {
        if self.shared.store.ending_since(&self.id).await?.is_none() {
            return Ok(());
        }
        acquired.ending = true;
        let _lock = self.lock().await?;
        self.step.send_replace("the deletion of the pod's earlier keys".to_owned());
        let deletion = Deletion { untouched: false, deadline };
        let deleted = delete(self.id.clone(), Arc::clone(&self.shared), self.publication.clone(), deletion);
        let failed = |error| AdaptorError::Ending { pod: self.id.clone(), cause: deletion_cause(&error) };
        self.unless_cancelled(deleted).await?.map_err(failed)?;
        if let Some(publication) = &self.publication {
            // The new pod's VM does.
            publication.need();
        }
        acquired.ended = true;
        if self.shared.key_source.attests() { Ok(()) } else { Err(AdaptorError::NoKey(self.id.clone())) }
    }

    async fn prepare_with(
        &self,
        acquired: &mut Acquired,
        spec: &PodSpec,
        deadline: Deadline,
    ) -> Result<(), AdaptorError> {
        let store = &self.shared.store;
        store.worker_node_key().await?;
        let pod_key = store.pod_key(&self.id).await?;
        // The lock of a deleted record is none of the new one.
        acquired.lock = if acquired.ended { store.lock_pod(&self.id).await? } else { self.lock().await? };
        let nodes = store.pod_worker_nodes(&self.id).await?;
        acquired.labels = Some(match &spec.labels {
            Some(labels) => {
                store.save_labels(&self.id, labels).await?;
                labels.clone()
            }
            None => store.labels(&self.id).await?,
        });
        // Before anything is published, so that a port that is in use fails the call early.
        if !self.served {
            let listening = self.listen(&nodes, pod_key.public()?);
            let served = self.unless_cancelled(timeout_at(deadline.at(), listening)).await?;
            acquired.served = Some(served.map_err(|_| AdaptorError::PrepareDeadline {
                pod: self.id.clone(),
                seconds: deadline.total_seconds(),
                waiting_for: self.step.borrow().clone(),
            })??);
        }
        let init_data = spec.init_data.as_ref();
        match &self.publication {
            Some(publication) => {
                self.step.send_replace(format!("the KBS at {} to take the keys", publication.url()));
                let was_up = self.was_up(publication).await?;
                self.unless_cancelled(publication.bind(init_data, deadline)).await??;
                if !was_up {
                    let keys = Keys { nodes: &nodes, pod: &pod_key };
                    let publish = publication.publish(keys, Some(deadline));
                    acquired.published = self.unless_cancelled(publish).await??;
                }
            }
            None => store.save_init_data(&self.id, init_data).await?,
        }
        acquired.init_data = Some(spec.init_data.clone());
        Ok(())
    }

    /// Whether the pod was up, so that its key was deleted from the KBS. Its VM may run, with containers that could read
    /// the key there: it is published when an agent attests.
    async fn was_up(&self, publication: &Publication) -> Result<bool, AdaptorError> {
        Ok(publication.recorded().await?.is_empty()
            && !self.shared.store.addresses(&self.id).await?.is_empty())
    }

    /// Listens again for a pod that was started before. Acquires nothing if it was not, or is served already.
    pub(super) async fn restore(self) -> (Acquired, Result<(), AdaptorError>) {
        let mut acquired = Acquired::default();
        let result = self.restore_with(&mut acquired).await;
        (acquired, result)
    }

    async fn restore_with(&self, acquired: &mut Acquired) -> Result<(), AdaptorError> {
        let store = &self.shared.store;
        let Some(pod_key) = store.known_pod_key(&self.id).await? else { return Ok(()) };
        if store.ending_since(&self.id).await?.is_some() {
            acquired.lock = self.lock().await?;
            acquired.labels = Some(store.labels(&self.id).await?);
            acquired.ending = true;
            return Ok(());
        }
        // `start` saves the addresses.
        let addresses = store.addresses(&self.id).await?;
        if addresses.is_empty() || self.served {
            return Ok(());
        }
        acquired.lock = self.lock().await?;
        let nodes = store.pod_worker_nodes(&self.id).await?;
        let init_data = store.init_data(&self.id).await?;
        acquired.labels = Some(store.labels(&self.id).await?);
        if let Some(publication) = &self.publication {
            // The channel must know whether the key is there.
            publication.recorded().await?;
        }
        let listening = self.listen(&nodes, pod_key.public()?);
        acquired.served = Some(self.unless_cancelled(listening).await??);
        acquired.init_data = Some(init_data);
        acquired.addresses = addresses;
        Ok(())
    }

    /// Publishes the keys, which the store must have, unless the pod is up: then its VM has them.
    pub(super) async fn publish_keys(self) -> (Acquired, Result<(), AdaptorError>) {
        let mut acquired = Acquired::default();
        let result = self.publish_keys_with(&mut acquired).await;
        (acquired, result)
    }

    async fn publish_keys_with(&self, acquired: &mut Acquired) -> Result<(), AdaptorError> {
        let store = &self.shared.store;
        let Some(pod_key) = store.known_pod_key(&self.id).await? else {
            return Err(AdaptorError::NotPrepared(self.id.clone()));
        };
        acquired.lock = self.lock().await?;
        if store.ending_since(&self.id).await?.is_some() {
            let cause = "nothing is published for it".to_owned();
            return Err(AdaptorError::Ending { pod: self.id.clone(), cause });
        }
        let nodes = store.pod_worker_nodes(&self.id).await?;
        let Some(publication) = &self.publication else { return Ok(()) };
        self.step.send_replace(format!("the KBS at {} to take the keys", publication.url()));
        let publish = publication.publish(Keys { nodes: &nodes, pod: &pod_key }, None);
        acquired.published = self.unless_cancelled(publish).await??;
        Ok(())
    }

    /// Saves the addresses of a start.
    pub(super) async fn save_addresses(
        self,
        addresses: Vec<Address>,
    ) -> (Acquired, Result<(), AdaptorError>) {
        let saved = self.shared.store.save_addresses(&self.id, &addresses).await;
        (Acquired::default(), saved.map_err(Into::into))
    }

    async fn lock(&self) -> Result<Option<PodLock>, AdaptorError> {
        if self.locked {
            return Ok(None);
        }
        Ok(self.shared.store.lock_pod(&self.id).await?)
    }

    async fn unless_cancelled<T>(&self, work: impl Future<Output = T>) -> Result<T, AdaptorError> {
        let mut cancel = self.cancel.clone();
        let cancelled = async {
            // Nothing can cancel the operation any more: a republication is dropped instead.
            if cancel.wait_for(|cancelled| *cancelled).await.is_err() {
                pending().await
            }
        };
        tokio::select! {
            biased;
            () = cancelled => Err(AdaptorError::Stopped(self.id.clone())),
            done = work => Ok(done),
        }
    }

    async fn listen(&self, nodes: &PodWorkerNodes, pod_key: PodPublic) -> Result<Served, AdaptorError> {
        let given = self.publication.as_ref().map(|publication| publication.given().clone());
        let given = given.unwrap_or_default();
        given.extend(nodes.given.iter().cloned());
        given.extend(self.shared.config.worker_nodes.iter().flat_map(WorkerNodeKeys::fingerprints));
        let mut served = Served {
            endpoints: Vec::new(),
            routes: Arc::default(),
            node_key: nodes.own.clone(),
            given,
            pod_key,
            init_data: None,
            inbounds: JoinSet::new(),
            directories: Vec::new(),
        };
        match self.listen_with(&mut served).await {
            Ok(()) => Ok(served),
            Err(error) => {
                close(Some(served)).await;
                Err(error)
            }
        }
    }

    async fn listen_with(&self, served: &mut Served) -> Result<(), AdaptorError> {
        for template in &self.shared.config.inbounds {
            let tag = for_pod(template, &self.id)?;
            self.step.send_replace(format!("inbound {tag} to listen"));
            served.directories.push(make_directories(template, &self.id)?);
            let inbound = bind_soon(&tag).await?;
            served.endpoints.push(Endpoint { name: tag.name, local: inbound.local().to_owned() });
            served.inbounds.spawn(served.routes.serve(inbound));
        }
        Ok(())
    }
}

async fn bind_soon(tag: &InboundTag) -> Result<Inbound, BindError> {
    let mut pauses = pauses();
    loop {
        match (Inbound::bind(tag).await, pauses.next()) {
            (Err(error), Some(pause)) if error.is_in_use() => sleep(pause).await,
            (bound, _) => return bound,
        }
    }
}

/// Closes the inbounds; returns when they are closed.
pub(super) async fn close(served: Option<Served>) {
    let Some(mut served) = served else { return };
    served.inbounds.abort_all();
    // Aborted tasks end with an error that says so; a panic was logged by the hook.
    while served.inbounds.join_next().await.is_some() {}
    drop(served.directories);
}

/// How a pod is deleted.
pub(super) struct Deletion {
    /// Whether nothing of the pod can be in the KBS.
    pub(super) untouched: bool,
    pub(super) deadline: Deadline,
}

/// Deletes the pod from the KBS, unless nothing of it can be there, and then from the store. The caller has the pod's lock.
pub(super) async fn delete(
    id: PodId,
    shared: Arc<Shared>,
    publication: Option<Arc<Publication>>,
    deletion: Deletion,
) -> Result<(), AdaptorError> {
    if let Some(publication) = publication
        && !deletion.untouched
    {
        publication.end(deletion.deadline).await.map_err(|(resource, error)| match error {
            PublicationError::Kbs(cause) => {
                AdaptorError::NotDeleted { pod: id.clone(), resource, cause: Box::new(cause) }
            }
            error => error.into(),
        })?;
        shared.retries.succeeded();
    }
    Ok(shared.store.forget(&id).await?)
}

/// Deletes the pod from the store alone. Returns where in the KBS its key may be.
pub(super) async fn forget(
    id: PodId,
    shared: Arc<Shared>,
    publication: Option<Arc<Publication>>,
) -> Result<Vec<String>, AdaptorError> {
    let left = match publication {
        Some(publication) if shared.store.made(&id).await?.is_some() => publication.may_be_at().await?,
        _ => Vec::new(),
    };
    shared.store.forget(&id).await?;
    Ok(left)
}

/// Why a deletion failed, for the state of a pod that is being ended: its deletion is retried without the caller.
pub(super) fn deletion_cause(error: &AdaptorError) -> String {
    match error {
        AdaptorError::NotDeleted { resource, cause, .. } => {
            format!("{resource} may still be in the KBS: {}", with_causes(cause.as_ref()))
        }
        error => with_causes(error),
    }
}

/// What became of the mark of a pod that is being ended.
pub(super) enum Marked {
    /// It is saved.
    Saved,
    /// The pod has no record.
    NoRecord,
    /// It is not saved; the end goes on.
    NotSaved(StoreError),
    /// The pod is not this adaptor's to end.
    NotOurs(StoreError),
}

/// Locks the pod unless that is done, and marks it as one that is being ended.
pub(super) async fn mark_ending(id: PodId, shared: Arc<Shared>, locked: bool) -> (Option<PodLock>, Marked) {
    let lock = if locked { Ok(None) } else { shared.store.lock_pod(&id).await };
    let lock = match lock {
        Ok(lock) => lock,
        Err(error) => return (None, Marked::NotOurs(error)),
    };
    match shared.store.mark_ending(&id).await {
        Ok(true) => (lock, Marked::Saved),
        Ok(false) => (lock, Marked::NoRecord),
        Err(error) => (lock, Marked::NotSaved(error)),
    }
}
