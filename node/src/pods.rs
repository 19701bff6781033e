//! The pods of the node, whatever launches them: cloud-api-adaptor (`caa`) or a client of the API (`api`).
//!
//! In: orders of the launchers. Out: the state of each pod, and what happens to it. Everything that shows pods reads
//! [`Pods::list`], [`Pods::get`] and [`Pods::events`]; the work is the adaptor's.

mod events;
mod launch;
mod obstacles;
mod orders;
mod orphans;
mod runtime;
mod stop_cost;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::SystemTime;

use secure_comms_adaptor::address::Address;
use secure_comms_adaptor::pod::{PodSnapshot, PodState};
use secure_comms_adaptor::store::StoreError;
use secure_comms_adaptor::{Adaptor, AdaptorError, Deadline, Endpoint, PodSpec, Stopped};
use secure_comms_protocol::{InitDataDigest, PodId, TunnelName};
use tokio::net::UnixStream;
use tokio::sync::{broadcast, mpsc, watch};

use self::orders::Orders;
use crate::logging::names;

pub use self::events::{Events, Happening};
pub use self::launch::{Launch, Launcher};
use self::obstacles::Obstacles;
pub use self::orders::Order;
pub use self::orphans::{CollectError, Orphan, OrphanReason};
pub use self::runtime::Runtime;
pub use self::stop_cost::StopCost;

/// All that is shown of a pod.
#[derive(Clone, Debug)]
pub struct PodView {
    /// Its id: the runtime's sandbox id.
    pub id: PodId,
    /// Who launched it, and its name in Kubernetes.
    pub launch: Launch,
    /// Its channel.
    pub snapshot: PodSnapshot,
    /// The runtime's connection to its kata agent.
    pub runtime: Runtime,
    /// What its launcher says keeps it from being used, in one line; `None`: nothing does.
    pub obstacle: Option<String>,
}

/// The pods of the node. A clone is the same pods.
#[derive(Clone, Debug)]
pub struct Pods(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    adaptor: Adaptor,
    events: Events,
    runtimes: Mutex<HashMap<PodId, Runtime>>,
    obstacles: Obstacles,
    orders: Orders,
    taken_away: OnceLock<mpsc::UnboundedSender<PodId>>,
}

impl Pods {
    /// The pods of `adaptor`, whose observer is that of `events`.
    pub fn new(adaptor: Adaptor, events: Events) -> Self {
        Self(Arc::new(Inner {
            adaptor,
            events,
            runtimes: Mutex::default(),
            obstacles: Obstacles::default(),
            orders: Orders::default(),
            taken_away: OnceLock::new(),
        }))
    }

    /// Has the observer learn of every order and its result, in the task of who orders: it must not block. A second one is
    /// ignored.
    pub fn observe_orders(&self, observer: impl Fn(&PodId, &Order<'_>) + Send + Sync + 'static) {
        self.0.orders.observe(Box::new(observer));
    }

    /// The pods of cloud-api-adaptor that another ends: see [`take_away`](Self::take_away). Only the first receiver gets any.
    pub fn taken_away(&self) -> mpsc::UnboundedReceiver<PodId> {
        let (sender, receiver) = mpsc::unbounded_channel();
        // The error gives the sender back.
        drop(self.0.taken_away.set(sender));
        receiver
    }

    /// Has the launcher give up a pod of cloud-api-adaptor's: it would prepare one again that was only ended. For those who end
    /// it, before they do.
    pub fn take_away(&self, id: &PodId) {
        if self.get(id).is_some_and(|pod| pod.launch.launcher == Some(Launcher::Caa))
            && let Some(launcher) = self.0.taken_away.get()
        {
            // An error means that the service ends.
            drop(launcher.send(id.clone()));
        }
    }

    /// The adaptor, for what this type does not offer.
    pub fn adaptor(&self) -> &Adaptor {
        &self.0.adaptor
    }

    /// Finds or makes the pod's keys, publishes them, and listens for its local clients: see [`Adaptor::prepare`]. Calling
    /// it again changes what differs.
    ///
    /// # Errors
    /// As [`Adaptor::prepare`].
    ///
    /// # Cancellation
    /// Dropping the future drops the wait only.
    pub async fn prepare(
        &self,
        id: &PodId,
        launch: &Launch,
        init_data: Option<InitDataDigest>,
        deadline: Deadline,
    ) -> Result<Vec<Endpoint>, AdaptorError> {
        let name = launch.name.clone();
        if let Some(name) = &name {
            names::insert(id, name);
        }
        let state = self.0.adaptor.snapshot(id).map(|pod| pod.state);
        if matches!(state, None | Some(PodState::NotPrepared | PodState::Failed { .. } | PodState::Stopped)) {
            self.0.orders.happened(id, &Order::Prepare);
        }
        let spec = PodSpec::bound_to(init_data).labelled(launch.to_labels());
        let (pods, pod) = (self.clone(), id.clone());
        orders::seen_through(id, async move {
            let prepared = pods.0.adaptor.prepare(&pod, spec, deadline).await;
            pods.0.orders.happened(&pod, &Order::Prepared(prepared.as_ref().map(|_| ())));
            match &name {
                // Without a task, no other order may come for it.
                _ if pods.0.adaptor.snapshot(&pod).is_none() => names::remove(&pod),
                // The end of an earlier pod of this id, which came in between, has removed it.
                Some(name) => names::insert(&pod, name),
                None => {}
            }
            prepared
        })
        .await
    }

    /// Connects to the pod's VM, and returns once the Kubernetes phase is up: see [`Adaptor::start`].
    ///
    /// # Errors
    /// As [`Adaptor::start`].
    ///
    /// # Cancellation
    /// Dropping the future drops the wait only.
    pub async fn start(
        &self,
        id: &PodId,
        addresses: &[Address],
        deadline: Deadline,
    ) -> Result<(), AdaptorError> {
        let (pods, pod, addresses) = (self.clone(), id.clone(), addresses.to_vec());
        orders::seen_through(id, async move {
            let started = pods.0.adaptor.start(&pod, &addresses, deadline).await;
            pods.0.orders.happened(&pod, &Order::Started(started.as_ref().copied()));
            started
        })
        .await
    }

    /// Ends the pod, and deletes its keys here and at the KBS: see [`Adaptor::end`]. While that fails and is retried, the pod
    /// stays in the list.
    ///
    /// # Errors
    /// As [`Adaptor::end`].
    ///
    /// # Cancellation
    /// Dropping the future drops the wait only.
    pub async fn stop(&self, id: &PodId) -> Result<Stopped, AdaptorError> {
        let stopped = self.0.adaptor.end(id).await;
        self.ended(id);
        stopped
    }

    /// Ends the pod without the KBS, and returns which resources may stay there: see [`Adaptor::forget`].
    ///
    /// # Errors
    /// As [`Adaptor::forget`].
    ///
    /// # Cancellation
    /// Dropping the future drops the wait only.
    pub async fn forget(&self, id: &PodId) -> Result<Vec<String>, AdaptorError> {
        let left = self.0.adaptor.forget(id).await;
        self.ended(id);
        left
    }

    /// The records of the store that no launcher will end, by their ids.
    ///
    /// # Errors
    /// The store cannot be read.
    ///
    /// # Cancellation
    /// Dropping the future has no effect.
    pub async fn orphans(&self) -> Result<Vec<Orphan>, StoreError> {
        orphans::list(&self.0.adaptor, SystemTime::now()).await
    }

    /// Ends an orphan, as [`stop`](Self::stop) ends a pod.
    ///
    /// # Errors
    /// The pod is no orphan, or as [`stop`](Self::stop).
    ///
    /// # Cancellation
    /// Dropping the future drops the wait only.
    pub async fn collect(&self, id: &PodId) -> Result<Stopped, CollectError> {
        if orphans::find(&self.0.adaptor, id, SystemTime::now()).await?.is_none() {
            return Err(CollectError::NoOrphan(id.clone()));
        }
        Ok(self.stop(id).await?)
    }

    /// Opens a stream of a tunnel of the Kubernetes phase: see [`Adaptor::open`].
    ///
    /// # Errors
    /// As [`Adaptor::open`].
    ///
    /// # Cancellation
    /// Dropping the future closes the stream.
    pub async fn open(&self, id: &PodId, tunnel: &TunnelName) -> Result<UnixStream, AdaptorError> {
        self.0.adaptor.open(id, tunnel).await
    }

    /// The pod now; `None` if it is not served, and nothing is known to keep it from that.
    pub fn get(&self, id: &PodId) -> Option<PodView> {
        let refused = || Some(self.0.obstacles.get(id)?.snapshot());
        Some(self.view(id.clone(), self.0.adaptor.snapshot(id).or_else(refused)?))
    }

    /// All pods now, by their ids.
    pub fn list(&self) -> Vec<PodView> {
        let mut snapshots: HashMap<PodId, PodSnapshot> = self.0.adaptor.snapshots().into_iter().collect();
        for (id, obstacle) in self.0.obstacles.all() {
            snapshots.entry(id).or_insert_with(|| obstacle.snapshot());
        }
        let mut all: Vec<PodView> =
            snapshots.into_iter().map(|(id, snapshot)| self.view(id, snapshot)).collect();
        all.sort_by(|a, b| a.id.cmp(&b.id));
        all
    }

    /// The pod's changes; `None` if it is not served. The channel closes when the pod ends.
    pub fn subscribe(&self, id: &PodId) -> Option<watch::Receiver<PodSnapshot>> {
        self.0.adaptor.subscribe(id)
    }

    /// What happens to all pods from now on. A receiver that is too slow learns how much it has missed.
    pub fn events(&self) -> broadcast::Receiver<Happening> {
        self.0.events.subscribe()
    }

    /// Says what keeps a pod from being used; `None`: nothing does. For launchers.
    pub fn set_obstacle(&self, id: &PodId, launch: &Launch, reason: Option<String>) {
        self.0.obstacles.set(id, launch, reason);
    }

    /// Says how the runtime's connection to the pod's kata agent is. For launchers.
    pub fn set_runtime(&self, id: &PodId, runtime: Runtime) {
        match runtime {
            Runtime::None => self.runtimes().remove(id),
            runtime => self.runtimes().insert(id.clone(), runtime),
        };
    }

    fn ended(&self, id: &PodId) {
        self.runtimes().remove(id);
        self.0.orders.happened(id, &Order::Stopped);
        // One whose deletion is retried is still logged, until `PodEvent::Deleted`.
        if self.0.adaptor.snapshot(id).is_none() {
            names::remove(id);
        }
    }

    /// Listens and connects again for every pod that an earlier process started: see [`Adaptor::resume_all`].
    ///
    /// # Errors
    /// As [`Adaptor::resume_all`].
    ///
    /// # Cancellation
    /// Dropping the future leaves the pods that were resumed already running.
    pub async fn resume_all(&self) -> Result<Vec<PodId>, AdaptorError> {
        let resumed = self.0.adaptor.resume_all().await;
        for pod in self.list() {
            // Nothing may say that the last of one that is ending is gone.
            let is_ending = matches!(pod.snapshot.state, PodState::Ending { .. });
            if let Some(name) = pod.launch.name.filter(|_| !is_ending) {
                names::insert(&pod.id, &name);
            }
        }
        resumed
    }

    fn view(&self, id: PodId, snapshot: PodSnapshot) -> PodView {
        let launch = Launch::of_labels(&snapshot.labels);
        let runtime = self.runtimes().get(&id).cloned().unwrap_or_default();
        let obstacle = self.0.obstacles.get(&id).map(|obstacle| obstacle.reason);
        PodView { id, launch, snapshot, runtime, obstacle }
    }

    fn runtimes(&self) -> MutexGuard<'_, HashMap<PodId, Runtime>> {
        self.0.runtimes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
