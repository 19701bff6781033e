//! The pods of one worker node: prepared, started, watched, stopped and, after a restart, resumed.
//!
//! In: calls of the [`Adaptor`]'s owner. Out: [`Endpoint`]s for local clients, and each pod's state and events. Each
//! started pod has a driver ([`crate::pod`]) in a task of its own.

mod error;

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use secure_comms_protocol::limits::SHUTDOWN_DRAIN;
use secure_comms_protocol::{InboundTag, OutboundTag, PodId, TunnelName, resource};
use secure_comms_tunnel::Inbound;
use tokio::sync::{OwnedMutexGuard, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;

pub use self::error::AdaptorError;
use crate::address::Address;
use crate::kbs::KbsClient;
use crate::key_source::KeySource;
use crate::pod::{Driver, Entry, Observer, Plan, PodState, StatusReporter, Stop};
use crate::store::Store;
use crate::text::with_causes;
use crate::transport::routes::Routes;
use crate::transport::session::Tunnels;
use secure_comms_keys::{PodKey, PodPublic, WorkerNodeKey};

/// What all pods of an adaptor have in common.
#[derive(Clone)]
pub struct Config {
    /// Inbounds of each pod, KATAAGENT included. All pods share the list, so a fixed port or path serves one pod only.
    pub inbounds: Vec<InboundTag>,
    /// Outbounds of each pod, KBS included.
    pub outbounds: Vec<OutboundTag>,
    /// Bytes in one direction after which the session keys of a connection are renewed.
    pub rekey_bytes: usize,
    /// Receives every event of every pod.
    pub observer: Observer,
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Config")
            .field("inbounds", &self.inbounds)
            .field("outbounds", &self.outbounds)
            .finish_non_exhaustive()
    }
}

/// Where local clients of a tunnel connect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Name of the tunnel.
    pub name: TunnelName,
    /// `127.0.0.1:<port>`, or the path of a unix socket.
    pub local: String,
}

/// The worker node's end of any number of pods.
///
/// | method | keys | KBS | listeners | connection |
/// | --- | --- | --- | --- | --- |
/// | [`prepare`](Self::prepare) | finds or makes | publishes | opens | |
/// | [`start`](Self::start) | | | | opens, keeps up |
/// | [`suspend`](Self::suspend) | keeps | | closes | closes |
/// | [`stop`](Self::stop) | deletes | deletes | closes | closes |
/// | [`resume_all`](Self::resume_all) | finds | | opens | opens, keeps up |
/// | [`restore_listeners`](Self::restore_listeners) | finds | | opens | |
/// | [`publish_keys`](Self::publish_keys) | finds or makes | publishes | | |
///
/// The first four are a pod's life. The last three continue it in a new process.
///
/// # Concurrency
/// Methods of different pods run independently. `prepare`, `restore_listeners`, `suspend`, `stop` and `resume_all` of
/// one pod wait for each other. `start` and `publish_keys` do not wait: a `start` during a `stop` of the same pod may
/// wait for its whole deadline.
///
/// # Runtime
/// The async methods need a tokio runtime of either flavour, with I/O and time enabled, and spawn tasks on it.
///
/// # Cancellation
/// Each async method says what remains if its future is dropped. Dropping the `Adaptor` cuts every connection and
/// closes every listener; the store and the KBS keep what they have.
#[derive(Debug)]
pub struct Adaptor {
    store: Arc<dyn Store>,
    key_source: KeySource<KbsClient>,
    config: Config,
    pods: Mutex<HashMap<PodId, Pod>>,
    /// One lock per pod, for the operations on it. The KBS can be slow, and other pods must not wait for it.
    locks: Mutex<HashMap<PodId, Arc<PodLock>>>,
}

/// Serialises the operations on one pod.
type PodLock = tokio::sync::Mutex<()>;

/// A prepared pod. Dropping it closes its inbounds and cuts its connection.
#[derive(Debug)]
struct Pod {
    endpoints: Vec<Endpoint>,
    routes: Arc<Routes>,
    node_key: WorkerNodeKey,
    pod_key: PodPublic,
    status: StatusReporter,
    _inbounds: JoinSet<()>,
    driver: Option<RunningDriver>,
}

/// The task of a pod's driver. Dropping it cuts the pod's connection.
#[derive(Debug)]
struct RunningDriver {
    stop: watch::Sender<Option<Stop>>,
    task: JoinSet<()>,
}

impl RunningDriver {
    /// Orders the driver to stop, and waits until it has.
    async fn stop(mut self, stop: Stop) {
        self.stop.send_replace(Some(stop));
        while self.task.join_next().await.is_some() {}
    }
}

impl Adaptor {
    /// An adaptor without pods. Its VMs get their keys from `key_source`.
    pub fn new(store: Arc<dyn Store>, key_source: KeySource<KbsClient>, config: Config) -> Self {
        Self { store, key_source, config, pods: Mutex::default(), locks: Mutex::default() }
    }

    fn pods(&self) -> MutexGuard<'_, HashMap<PodId, Pod>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn lock_pod(&self, id: &PodId) -> OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
            // Locks that nothing holds or waits for are removed.
            locks.retain(|_, lock| Arc::strong_count(lock) > 1);
            Arc::clone(locks.entry(id.clone()).or_default())
        };
        lock.lock_owned().await
    }

    /// Finds or makes the pod's keys, publishes them, and listens for its local clients. The VM may then be started.
    /// A second call publishes the keys again and returns the same endpoints.
    ///
    /// # Errors
    /// The store, the KBS or an inbound failed. The listeners are closed again, and a key that this call made is
    /// deleted from the store; a resource that was published already stays in the KBS.
    ///
    /// # Cancellation
    /// Dropping the future closes the new listeners. A key that was made and a resource that was published stay; `stop`
    /// deletes both.
    pub async fn prepare(&self, id: &PodId) -> Result<Vec<Endpoint>, AdaptorError> {
        let _lock = self.lock_pod(id).await;
        let known = self.store.known_pod_key(id).await?.is_some();
        let prepared = self.prepare_locked(id).await;
        if prepared.is_err()
            && !known
            && let Err(error) = self.store.forget(id).await
        {
            tracing::error!("pod {id}: cleaning up after a failed prepare: {}", with_causes(&error));
        }
        prepared
    }

    async fn prepare_locked(&self, id: &PodId) -> Result<Vec<Endpoint>, AdaptorError> {
        let (node_key, pod_key) = (self.store.worker_node_key().await?, self.store.pod_key(id).await?);
        // Before anything is published, so that a port that is in use fails the call early.
        let prepared = match self.endpoints(id) {
            Some(_) => None,
            None => Some(self.listen(id, node_key.clone(), pod_key.public()?).await?),
        };
        self.publish(id, &node_key, &pod_key).await?;
        if let Some(pod) = prepared {
            self.pods().insert(id.clone(), pod);
        }
        Ok(self.endpoints(id).unwrap_or_default())
    }

    /// Listens again for the local clients of a pod that an earlier process started. `None` if the pod was never
    /// started.
    ///
    /// Its VM may be running and then needs nothing from the KBS, so the keys are not published here: a KBS that is
    /// down must not keep the pod down. See [`publish_keys`](Self::publish_keys).
    ///
    /// # Errors
    /// The store or an inbound failed.
    ///
    /// # Cancellation
    /// Dropping the future closes the new listeners.
    pub async fn restore_listeners(&self, id: &PodId) -> Result<Option<Vec<Endpoint>>, AdaptorError> {
        let _lock = self.lock_pod(id).await;
        let Some((pod_key, _)) = self.started_before(id).await? else { return Ok(None) };
        if self.endpoints(id).is_none() {
            self.listen_again(id, &pod_key).await?;
        }
        Ok(self.endpoints(id))
    }

    /// The key and the addresses of a pod that was started, in this process or an earlier one.
    async fn started_before(&self, id: &PodId) -> Result<Option<(PodKey, Vec<Address>)>, AdaptorError> {
        let Some(pod_key) = self.store.known_pod_key(id).await? else { return Ok(None) };
        // `start` saves the addresses.
        let addresses = self.store.addresses(id).await?;
        Ok((!addresses.is_empty()).then_some((pod_key, addresses)))
    }

    async fn listen_again(&self, id: &PodId, pod_key: &PodKey) -> Result<(), AdaptorError> {
        let node_key = self.store.worker_node_key().await?;
        let pod = self.listen(id, node_key, pod_key.public()?).await?;
        self.pods().insert(id.clone(), pod);
        Ok(())
    }

    /// Publishes the keys of a pod again: its VM may have to attest again, and the KBS may have lost them. Without a
    /// KBS there is nothing to publish.
    ///
    /// # Errors
    /// The store or the KBS failed, or the KBS did not answer in the time that its client has for a call.
    ///
    /// # Cancellation
    /// Dropping the future stops the retries. A request that was sent may still take effect.
    pub async fn publish_keys(&self, id: &PodId) -> Result<(), AdaptorError> {
        let (node_key, pod_key) = (self.store.worker_node_key().await?, self.store.pod_key(id).await?);
        self.publish(id, &node_key, &pod_key).await
    }

    async fn listen(
        &self,
        id: &PodId,
        node_key: WorkerNodeKey,
        pod_key: PodPublic,
    ) -> Result<Pod, AdaptorError> {
        let routes = Arc::new(Routes::default());
        let (mut endpoints, mut inbounds) = (Vec::new(), JoinSet::new());
        for tag in &self.config.inbounds {
            let inbound = Inbound::bind(tag).await?;
            endpoints.push(Endpoint { name: tag.name.clone(), local: inbound.local().to_owned() });
            inbounds.spawn(routes.serve(inbound));
        }
        let status = StatusReporter::new(id.clone(), Arc::clone(&self.config.observer));
        Ok(Pod { endpoints, routes, node_key, pod_key, status, _inbounds: inbounds, driver: None })
    }

    async fn publish(
        &self,
        id: &PodId,
        node_key: &WorkerNodeKey,
        pod_key: &PodKey,
    ) -> Result<(), AdaptorError> {
        let KeySource::Kbs(kbs) = &self.key_source else { return Ok(()) };
        let line = node_key.public()?.authorized_keys_line()? + "\n";
        kbs.publish(resource::WORKER_NODE_PUBLIC_KEY, line.as_bytes()).await?;
        Ok(kbs.publish(&resource::pod_private_key(id), pod_key.to_pem()?.as_bytes()).await?)
    }

    /// Connects to the pod's VM, and returns once the Kubernetes phase is up, for at most `deadline`. From then on the
    /// connection is kept up until `suspend` or `stop`.
    ///
    /// # Errors
    /// The pod is not prepared, is started already, or did not come up. After an error connecting is not retried, and
    /// the pod can be started again.
    ///
    /// # Cancellation
    /// Dropping the future drops the wait only. Once the addresses are saved, the driver goes on without a deadline and
    /// another `start` fails with [`AdaptorError::AlreadyStarted`]; `suspend` and `stop` end the driver.
    pub async fn start(
        &self,
        id: &PodId,
        addresses: &[Address],
        deadline: Duration,
    ) -> Result<(), AdaptorError> {
        if addresses.is_empty() {
            return Err(AdaptorError::NoAddress(id.clone()));
        }
        self.store.save_addresses(id, addresses).await?;
        let status = self.spawn_driver(id, addresses, Entry::New)?;
        let mut state = status.subscribe();
        let settled = |state: &PodState| {
            matches!(state, PodState::Up { .. } | PodState::Failed { .. } | PodState::Stopped)
        };
        let settled =
            timeout(deadline, state.wait_for(settled)).await.map(|state| state.map(|state| state.clone()));
        let reason = match settled {
            Ok(Ok(PodState::Up { .. })) => return Ok(()),
            Ok(Ok(PodState::Failed { reason })) => reason,
            Ok(_) => "stopped while starting".to_owned(),
            Err(_) => {
                let (seconds, last_seen) = (deadline.as_secs(), status.last_seen());
                self.stop_driver(id, "the adaptor gave up").await;
                status.set_state(PodState::Failed { reason: last_seen.clone() });
                return Err(AdaptorError::Deadline { pod: id.clone(), seconds, last_seen });
            }
        };
        // So that the pod can be started again.
        self.stop_driver(id, "the start failed").await;
        Err(AdaptorError::StartFailed { pod: id.clone(), reason })
    }

    fn spawn_driver(
        &self,
        id: &PodId,
        addresses: &[Address],
        entry: Entry,
    ) -> Result<StatusReporter, AdaptorError> {
        let mut pods = self.pods();
        let pod = pods.get_mut(id).ok_or_else(|| AdaptorError::NotPrepared(id.clone()))?;
        if pod.driver.is_some() {
            return Err(AdaptorError::AlreadyStarted(id.clone()));
        }
        let (inbounds, outbounds) = (&self.config.inbounds, &self.config.outbounds);
        let plan = Plan {
            id: id.clone(),
            addresses: addresses.to_vec(),
            node_key: pod.node_key.clone(),
            pod_key: pod.pod_key,
            attestation: self.key_source.as_ref().map(|_| Tunnels::new(inbounds, outbounds)),
            kubernetes: Tunnels::new(inbounds, outbounds),
            rekey_bytes: self.config.rekey_bytes,
        };
        // Before the driver runs: a waiting `start` must not take the final state of an earlier start for its own.
        pod.status.begin();
        let (stop, order) = watch::channel(None);
        let driver = Driver::new(plan, Arc::clone(&pod.routes), pod.status.clone(), order);
        let mut task = JoinSet::new();
        task.spawn(driver.run(entry));
        pod.driver = Some(RunningDriver { stop, task });
        Ok(pod.status.clone())
    }

    /// Stops the pod's driver, if it has one. The pod stays prepared.
    async fn stop_driver(&self, id: &PodId, reason: &'static str) {
        let driver = self.pods().get_mut(id).and_then(|pod| pod.driver.take());
        if let Some(driver) = driver {
            driver.stop(Stop { reason, drain: SHUTDOWN_DRAIN }).await;
        }
    }

    /// The pod's state and its changes; `None` if the pod is not prepared. The channel closes with `suspend` and `stop`.
    pub fn watch(&self, id: &PodId) -> Option<watch::Receiver<PodState>> {
        self.pods().get(id).map(|pod| pod.status.subscribe())
    }

    /// Where the pod's local clients connect; `None` if the pod is not prepared.
    pub fn endpoints(&self, id: &PodId) -> Option<Vec<Endpoint>> {
        self.pods().get(id).map(|pod| pod.endpoints.clone())
    }

    /// Stops serving the pod, and keeps its keys and its KBS resource: a later process can resume it.
    ///
    /// Open streams get `SHUTDOWN_DRAIN` (3 s) to end, then the agent receives a bye. The listeners close shortly after
    /// the return.
    ///
    /// # Cancellation
    /// Dropping the future during the drain cuts the connection. The pod then stays prepared and its listeners stay
    /// open, but its state is not updated; another `suspend` or `stop` completes the work.
    pub async fn suspend(&self, id: &PodId) {
        let _lock = self.lock_pod(id).await;
        self.stop_driver(id, "the adaptor ends").await;
        self.pods().remove(id);
    }

    /// Ends the pod: stops serving it as [`suspend`](Self::suspend) does, deletes its resource from the KBS, and deletes
    /// its key from the store. It waits for a `prepare` of the same pod that is under way.
    ///
    /// # Errors
    /// The KBS or the store failed. The key is then still in the store, so that `stop` can be retried.
    ///
    /// # Cancellation
    /// As for `suspend` during the drain. After that the pod is no longer served; what was not deleted yet stays, and
    /// another `stop` deletes it.
    pub async fn stop(&self, id: &PodId) -> Result<(), AdaptorError> {
        let _lock = self.lock_pod(id).await;
        self.stop_driver(id, "the pod is being deleted").await;
        self.pods().remove(id);
        if let KeySource::Kbs(kbs) = &self.key_source {
            kbs.delete(&resource::pod_private_key(id)).await?;
        }
        Ok(self.store.forget(id).await?)
    }

    /// Listens and connects again for every pod that an earlier process started, Kubernetes phase first, and returns
    /// their ids without waiting for the connections. A pod that fails is logged and left out.
    ///
    /// # Errors
    /// The pods cannot be listed.
    ///
    /// # Cancellation
    /// Dropping the future leaves the pods that were resumed already running.
    pub async fn resume_all(&self) -> Result<Vec<PodId>, AdaptorError> {
        let mut resumed = Vec::new();
        for id in self.store.pods().await? {
            match self.resume(&id).await {
                Ok(true) => resumed.push(id),
                Ok(false) => {}
                Err(error) => {
                    tracing::error!("pod {id}: resume failed, the pod is left out: {}", with_causes(&error));
                }
            }
        }
        Ok(resumed)
    }

    /// False if the pod was never started, or is served already.
    async fn resume(&self, id: &PodId) -> Result<bool, AdaptorError> {
        let _lock = self.lock_pod(id).await;
        let Some((pod_key, addresses)) = self.started_before(id).await? else { return Ok(false) };
        if self.endpoints(id).is_some() {
            return Ok(false);
        }
        self.listen_again(id, &pod_key).await?;
        self.spawn_driver(id, &addresses, Entry::Restarted)?;
        Ok(true)
    }
}
