//! The adaptor as a library: pods are prepared, started, watched, stopped and resumed.

mod error;

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use secure_comms_keys::{PodKey, PodPublic, WorkerNodeKey};
use secure_comms_protocol::limits::SHUTDOWN_DRAIN;
use secure_comms_protocol::{InboundTag, OutboundTag, PodId, TunnelName, resource};
use secure_comms_tunnel::Inbound;
use tokio::sync::{OwnedMutexGuard, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;

pub use self::error::AdaptorError;
use crate::address::Address;
use crate::kbs::KbsClient;
use crate::pod::{Driver, Observer, Plan, PodState, Report, Stop, Way};
use crate::routes::Routes;
use crate::session::Tunnels;
use crate::store::Store;

/// How the VMs come to their keys.
#[derive(Debug)]
pub enum KeySource {
    /// From the KBS, where they are published.
    Kbs(Box<KbsClient>),
    /// By their user data; there is no Attestation phase.
    UserData,
}

/// What all pods of an adaptor have in common.
#[derive(Clone)]
pub struct Config {
    /// Our inbounds, KATAAGENT included.
    pub inbounds: Vec<InboundTag>,
    /// Our outbounds, KBS included.
    pub outbounds: Vec<OutboundTag>,
    /// Data in a direction after which new session keys are made, in bytes.
    pub rekey_bytes: usize,
    /// Who is told of every event.
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
    /// The tunnel.
    pub name: TunnelName,
    /// `127.0.0.1:<port>`, or the path of a unix socket.
    pub local: String,
}

/// The worker node's end, for any number of pods. Dropping it cuts every connection.
#[derive(Debug)]
pub struct Adaptor {
    store: Arc<dyn Store>,
    keys: KeySource,
    config: Config,
    pods: Mutex<HashMap<PodId, Pod>>,
    /// For each pod, one at a time prepares, stops or resumes it; the KBS can be slow, and other pods must not wait.
    changing: Mutex<HashMap<PodId, Arc<Turn>>>,
}

/// Whose turn it is to change a pod.
type Turn = tokio::sync::Mutex<()>;

/// A pod that is prepared. Dropping it closes its inbounds and cuts its connection.
#[derive(Debug)]
struct Pod {
    endpoints: Vec<Endpoint>,
    routes: Arc<Routes>,
    node_key: WorkerNodeKey,
    pod_key: PodPublic,
    report: Report,
    _inbounds: JoinSet<()>,
    driver: Option<Running>,
}

/// A pod's driver at work.
#[derive(Debug)]
struct Running {
    stop: watch::Sender<Option<Stop>>,
    task: JoinSet<()>,
}

impl Running {
    /// Ends in good order.
    async fn stop(mut self, stop: Stop) {
        self.stop.send_replace(Some(stop));
        while self.task.join_next().await.is_some() {}
    }
}

impl Adaptor {
    /// An adaptor that knows no pods yet.
    pub fn new(store: Arc<dyn Store>, keys: KeySource, config: Config) -> Self {
        Self { store, keys, config, pods: Mutex::default(), changing: Mutex::default() }
    }

    fn pods(&self) -> MutexGuard<'_, HashMap<PodId, Pod>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn turn(&self, id: &PodId) -> OwnedMutexGuard<()> {
        let turn = {
            let mut turns = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
            // Those that nobody holds or waits for.
            turns.retain(|_, turn| Arc::strong_count(turn) > 1);
            Arc::clone(turns.entry(id.clone()).or_default())
        };
        turn.lock_owned().await
    }

    /// Finds or makes the pod's keys, publishes them, and listens for its local clients; the VM may then be started.
    /// A second call changes nothing.
    ///
    /// # Errors
    /// The store, the KBS or an inbound failed. What was made for it is undone.
    pub async fn prepare(&self, id: &PodId) -> Result<Vec<Endpoint>, AdaptorError> {
        let _turn = self.turn(id).await;
        let known = self.store.known_pod_key(id).await?.is_some();
        let prepared = self.prepare_new(id).await;
        if prepared.is_err()
            && !known
            && let Err(error) = self.store.forget(id).await
        {
            tracing::error!("pod {id}: after a failure: {:#}", anyhow::Error::from(error));
        }
        prepared
    }

    /// Listens again for the clients of a pod that was started before this process was; none if it never was. Its VM may
    /// be running, and then needs nothing from the KBS: a KBS that is away must not keep the pod down. So its keys are
    /// not published here; see [`Adaptor::republish`].
    ///
    /// # Errors
    /// The store or an inbound failed.
    pub async fn reopen(&self, id: &PodId) -> Result<Option<Vec<Endpoint>>, AdaptorError> {
        let _turn = self.turn(id).await;
        let Some(pod_key) = self.store.known_pod_key(id).await? else { return Ok(None) };
        if self.store.addresses(id).await?.is_empty() {
            return Ok(None);
        }
        if self.endpoints(id).is_none() {
            let node_key = self.store.worker_node_key().await?;
            let pod = self.listen(id, node_key, pod_key.public()?).await?;
            self.pods().insert(id.clone(), pod);
        }
        Ok(self.endpoints(id))
    }

    /// Publishes the keys of a known pod once more, for a VM that attests anew and a KBS that has lost them.
    ///
    /// # Errors
    /// The store or the KBS failed.
    pub async fn republish(&self, id: &PodId) -> Result<(), AdaptorError> {
        let (node_key, pod_key) = (self.store.worker_node_key().await?, self.store.pod_key(id).await?);
        self.publish(id, &node_key, &pod_key).await
    }

    async fn prepare_new(&self, id: &PodId) -> Result<Vec<Endpoint>, AdaptorError> {
        let (node_key, pod_key) = (self.store.worker_node_key().await?, self.store.pod_key(id).await?);
        // Before anything is published: a port that is taken is found out at once.
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
        let report = Report::new(id.clone(), Arc::clone(&self.config.observer));
        Ok(Pod { endpoints, routes, node_key, pod_key, report, _inbounds: inbounds, driver: None })
    }

    async fn publish(
        &self,
        id: &PodId,
        node_key: &WorkerNodeKey,
        pod_key: &PodKey,
    ) -> Result<(), AdaptorError> {
        let KeySource::Kbs(kbs) = &self.keys else { return Ok(()) };
        let line = node_key.public()?.authorized_keys_line()? + "\n";
        kbs.publish(resource::WORKER_NODE_PUBLIC_KEY, line.as_bytes()).await?;
        Ok(kbs.publish(&resource::pod_private_key(id), pod_key.to_pem()?.as_bytes()).await?)
    }

    /// Connects to the pod's VM; returns once the Kubernetes phase is up. The channel is kept up from then on.
    ///
    /// # Errors
    /// It was not up when the deadline passed, or can't be: then nothing connects any more.
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
        let report = self.drive(id, addresses, Driver::start)?;
        let mut state = report.watch();
        let settled = |state: &PodState| {
            matches!(state, PodState::Up { .. } | PodState::Failed { .. } | PodState::Stopped)
        };
        let settled =
            timeout(deadline, state.wait_for(settled)).await.map(|state| state.map(|state| state.clone()));
        let reason = match settled {
            Ok(Ok(PodState::Up { .. })) => return Ok(()),
            Ok(Ok(PodState::Failed { reason })) => reason,
            Ok(_) => "it was stopped meanwhile".to_owned(),
            Err(_) => {
                let (seconds, last_seen) = (deadline.as_secs(), report.last_seen());
                self.halt(id, "the adaptor gave up").await;
                report.state(PodState::Failed { reason: last_seen.clone() });
                return Err(AdaptorError::Deadline { pod: id.clone(), seconds, last_seen });
            }
        };
        // So that it can be started again.
        self.halt(id, "the start failed").await;
        Err(AdaptorError::StartFailed { pod: id.clone(), reason })
    }

    fn drive<F: Future<Output = ()> + Send + 'static>(
        &self,
        id: &PodId,
        addresses: &[Address],
        how: impl FnOnce(Driver) -> F,
    ) -> Result<Report, AdaptorError> {
        let mut pods = self.pods();
        let pod = pods.get_mut(id).ok_or_else(|| AdaptorError::NotPrepared(id.clone()))?;
        if pod.driver.is_some() {
            return Err(AdaptorError::AlreadyStarted(id.clone()));
        }
        let tunnels = (&self.config.inbounds, &self.config.outbounds);
        let plan = Plan {
            id: id.clone(),
            addresses: addresses.to_vec(),
            node_key: pod.node_key.clone(),
            pod_key: pod.pod_key,
            way: match self.keys {
                KeySource::Kbs(_) => Way::Attests(Tunnels::new(tunnels.0, tunnels.1)),
                KeySource::UserData => Way::UserData,
            },
            kubernetes: Tunnels::new(tunnels.0, tunnels.1),
            rekey_bytes: self.config.rekey_bytes,
        };
        // Before the driver runs: whoever waits must not take the state of an earlier start for this one's.
        pod.report.begin();
        let (stop, order) = watch::channel(None);
        let mut task = JoinSet::new();
        task.spawn(how(Driver::new(plan, Arc::clone(&pod.routes), pod.report.clone(), order)));
        pod.driver = Some(Running { stop, task });
        Ok(pod.report.clone())
    }

    /// Ends the pod's driver; the pod stays prepared.
    async fn halt(&self, id: &PodId, reason: &'static str) {
        let running = self.pods().get_mut(id).and_then(|pod| pod.driver.take());
        if let Some(running) = running {
            running.stop(Stop { reason, drain: SHUTDOWN_DRAIN }).await;
        }
    }

    /// The pod's state, as it changes; none if the pod is not prepared.
    pub fn watch(&self, id: &PodId) -> Option<watch::Receiver<PodState>> {
        self.pods().get(id).map(|pod| pod.report.watch())
    }

    /// Where the pod's local clients connect; none if the pod is not prepared.
    pub fn endpoints(&self, id: &PodId) -> Option<Vec<Endpoint>> {
        self.pods().get(id).map(|pod| pod.endpoints.clone())
    }

    /// Lets open streams end (not for long), says bye, and closes the inbounds. The pod is known still, and can be
    /// resumed.
    pub async fn close(&self, id: &PodId) {
        let _turn = self.turn(id).await;
        self.halt(id, "the adaptor ends").await;
        self.pods().remove(id);
    }

    /// Closes the pod's channel, deletes its resource from the KBS, and forgets its key.
    ///
    /// # Errors
    /// The KBS or the store failed; the key is then still there, so that it can be tried again.
    pub async fn stop(&self, id: &PodId) -> Result<(), AdaptorError> {
        let _turn = self.turn(id).await;
        self.halt(id, "the pod is being deleted").await;
        self.pods().remove(id);
        if let KeySource::Kbs(kbs) = &self.keys {
            kbs.delete(&resource::pod_private_key(id)).await?;
        }
        Ok(self.store.forget(id).await?)
    }

    /// Takes up the pods that were started before this process was: with the keys they have, Kubernetes phase first.
    /// A pod that can't be taken up is logged and left.
    ///
    /// # Errors
    /// The pods can't be listed.
    pub async fn resume(&self) -> Result<Vec<PodId>, AdaptorError> {
        let mut resumed = Vec::new();
        for id in self.store.pods().await? {
            match self.resume_one(&id).await {
                Ok(true) => resumed.push(id),
                Ok(false) => {}
                Err(error) => tracing::error!("pod {id}: resume: {:#}", anyhow::Error::from(error)),
            }
        }
        Ok(resumed)
    }

    async fn resume_one(&self, id: &PodId) -> Result<bool, AdaptorError> {
        let _turn = self.turn(id).await;
        let addresses = self.store.addresses(id).await?;
        let Some(pod_key) = self.store.known_pod_key(id).await? else { return Ok(false) };
        // One without addresses was never started.
        if addresses.is_empty() || self.endpoints(id).is_some() {
            return Ok(false);
        }
        let pod = self.listen(id, self.store.worker_node_key().await?, pod_key.public()?).await?;
        self.pods().insert(id.clone(), pod);
        self.drive(id, &addresses, Driver::resume)?;
        Ok(true)
    }
}
