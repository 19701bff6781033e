//! The steps of a pod that take time before it has a channel: its keys, its listeners, and the publication.
//!
//! An operation runs in the pod's task, one at a time. A cancellation interrupts the waits for the KBS and for an
//! inbound's namespace, and never the store in the middle of a change.

use std::future::pending;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use secure_comms_keys::{PodKey, PodPublic, WorkerNodeKey};
use secure_comms_protocol::{PodId, resource};
use secure_comms_tunnel::Inbound;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout_at;

use super::command::{Reply, StartOrder};
use super::error::AdaptorError;
use super::listen_path::{PodDirectories, for_pod, make_directories};
use super::shared::Shared;
use crate::address::Address;
use crate::deadline::Deadline;
use crate::key_source::KeySource;
use crate::pod::Endpoint;
use crate::store::{PodLock, StoreError};
use crate::text::with_causes;
use crate::transport::routes::Routes;

pub(super) type Work<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// The time limit for deleting the resource of a pod that is stopped. A KBS that does not answer must not hold up the
/// stop: its caller gets an error and can stop the pod again.
pub(super) const KBS_DELETE: Duration = Duration::from_secs(10);
/// The same where the stop interrupted a wait for the KBS: that it does not answer is known.
pub(super) const KBS_DELETE_SILENT: Duration = Duration::from_secs(2);

/// What serves a prepared pod's local clients. Dropping it closes the inbounds.
#[derive(Debug)]
pub(super) struct Served {
    pub(super) endpoints: Vec<Endpoint>,
    pub(super) routes: Arc<Routes>,
    pub(super) node_key: WorkerNodeKey,
    pub(super) pod_key: PodPublic,
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
    /// Whether nothing of the pod can be in the KBS: the key was made by this operation, never left it, and is deleted.
    pub(super) untouched: bool,
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
    cancel: watch::Receiver<bool>,
    step: watch::Sender<String>,
}

/// The ends of a context that the pod's task keeps.
pub(super) type Controls = (watch::Sender<bool>, watch::Receiver<String>);

impl Context {
    pub(super) fn new(id: PodId, shared: Arc<Shared>, locked: bool, served: bool) -> (Self, Controls) {
        let (cancel, cancelled) = watch::channel(false);
        let (step, steps) = watch::channel("the store".to_owned());
        (Self { id, shared, locked, served, cancel: cancelled, step }, (cancel, steps))
    }

    /// Finds or makes the keys, listens, and publishes. On an error the key that it made is deleted.
    pub(super) async fn prepare(self, deadline: Deadline) -> (Acquired, Result<(), AdaptorError>) {
        let mut acquired = Acquired::default();
        let known = match self.shared.store.known_pod_key(&self.id).await {
            Ok(key) => key.is_some(),
            Err(error) => return (acquired, Err(error.into())),
        };
        if !known && !self.shared.key_source.attests() {
            return (acquired, Err(AdaptorError::NoKey(self.id.clone())));
        }
        let mut sent = false;
        let result = self.prepare_with(&mut acquired, deadline, &mut sent).await;
        if let Err(error) = &result {
            // Before the record is deleted, so that the ports are free when the caller hears of the error.
            close(acquired.served.take()).await;
            // The record of a pod that another adaptor drives is that adaptor's.
            let ours = !matches!(error, AdaptorError::Store(StoreError::Locked { .. }));
            if !known && ours {
                match self.shared.store.forget(&self.id).await {
                    Ok(()) => acquired.untouched = !sent,
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

    async fn prepare_with(
        &self,
        acquired: &mut Acquired,
        deadline: Deadline,
        sent: &mut bool,
    ) -> Result<(), AdaptorError> {
        let store = &self.shared.store;
        let (node_key, pod_key) = (store.worker_node_key().await?, store.pod_key(&self.id).await?);
        acquired.lock = self.lock().await?;
        // Before anything is published, so that a port that is in use fails the call early.
        if !self.served {
            let listening = self.listen(node_key.clone(), pod_key.public()?);
            let served = self.unless_cancelled(timeout_at(deadline.at(), listening)).await?;
            acquired.served = Some(served.map_err(|_| AdaptorError::PrepareDeadline {
                pod: self.id.clone(),
                seconds: deadline.total_seconds(),
                waiting_for: self.step.borrow().clone(),
            })??);
        }
        self.unless_cancelled(self.publish(&node_key, &pod_key, Some(deadline), sent)).await??;
        acquired.published = true;
        Ok(())
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
        // `start` saves the addresses.
        let addresses = store.addresses(&self.id).await?;
        if addresses.is_empty() || self.served {
            return Ok(());
        }
        acquired.lock = self.lock().await?;
        let node_key = store.worker_node_key().await?;
        let listening = self.listen(node_key, pod_key.public()?);
        acquired.served = Some(self.unless_cancelled(listening).await??);
        acquired.addresses = addresses;
        Ok(())
    }

    /// Publishes the keys, which must be there.
    pub(super) async fn publish_keys(self) -> (Acquired, Result<(), AdaptorError>) {
        let mut acquired = Acquired::default();
        let result = self.publish_keys_with(&mut acquired).await;
        acquired.published = result.is_ok();
        (acquired, result)
    }

    async fn publish_keys_with(&self, acquired: &mut Acquired) -> Result<(), AdaptorError> {
        let store = &self.shared.store;
        let Some(pod_key) = store.known_pod_key(&self.id).await? else {
            return Err(AdaptorError::NotPrepared(self.id.clone()));
        };
        acquired.lock = self.lock().await?;
        let node_key = store.worker_node_key().await?;
        self.unless_cancelled(self.publish(&node_key, &pod_key, None, &mut false)).await?
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

    async fn listen(&self, node_key: WorkerNodeKey, pod_key: PodPublic) -> Result<Served, AdaptorError> {
        let mut served = Served {
            endpoints: Vec::new(),
            routes: Arc::default(),
            node_key,
            pod_key,
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
            let inbound = Inbound::bind(&tag).await?;
            served.endpoints.push(Endpoint { name: tag.name, local: inbound.local().to_owned() });
            served.inbounds.spawn(served.routes.serve(inbound));
        }
        Ok(())
    }

    /// `sent` becomes true before the pod's key can leave this process.
    async fn publish(
        &self,
        node_key: &WorkerNodeKey,
        pod_key: &PodKey,
        deadline: Option<Deadline>,
        sent: &mut bool,
    ) -> Result<(), AdaptorError> {
        let KeySource::Kbs(kbs) = &self.shared.key_source else { return Ok(()) };
        let within = || deadline.map_or_else(|| kbs.clone(), |deadline| kbs.within(deadline.left()));
        self.step.send_replace(format!("the KBS at {} to take the keys", kbs.url()));
        let line = node_key.public()?.authorized_keys_line()? + "\n";
        within().publish(resource::separate::WORKER_NODE_PUBLIC_KEY, line.as_bytes()).await?;
        *sent = true;
        Ok(within()
            .publish(&resource::separate::pod_private_key(&self.id), pod_key.to_pem()?.as_bytes())
            .await?)
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
    /// Whether the pod's task holds the pod's lock already.
    pub(super) locked: bool,
    /// Whether nothing of the pod can be in the KBS.
    pub(super) untouched: bool,
    pub(super) deadline: Deadline,
}

/// Deletes the pod from the KBS, unless nothing of it can be there, and then from the store.
pub(super) async fn delete(id: PodId, shared: Arc<Shared>, deletion: Deletion) -> Result<(), AdaptorError> {
    let _lock = if deletion.locked { None } else { shared.store.lock_pod(&id).await? };
    if let KeySource::Kbs(kbs) = &shared.key_source
        && !deletion.untouched
    {
        let resource = resource::separate::pod_private_key(&id);
        let deleted = kbs.within(deletion.deadline.left()).delete(&resource).await;
        deleted.map_err(|error| {
            let cause = Box::new(error);
            AdaptorError::NotDeleted { pod: id.clone(), resource, cause }
        })?;
    }
    Ok(shared.store.forget(&id).await?)
}
