//! The pods of one worker node: prepared, started, watched, stopped and, after a restart, resumed.
//!
//! In: calls of the [`Adaptor`]'s owner. Out: [`Endpoint`]s for local clients, and each pod's state and events. Each pod
//! has a task of its own (`actor`), which owns all of the pod's state and takes commands from a queue.

mod actor;
mod channel;
mod command;
mod error;
mod listen_path;
mod operation;
mod pods;
mod records;
mod retry;
mod shared;

use std::collections::VecDeque;
use std::sync::Arc;

use secure_comms_protocol::{PodId, RefusalReason, TunnelName};
pub use secure_comms_tunnel::account::Traffic;
use secure_comms_tunnel::relay::{relay, report};
use secure_comms_tunnel::{Link as _, MemoryBudget, OpenError, Socket};
use tokio::net::UnixStream;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use self::actor::Actor;
use self::command::{Command, Reply, StartOrder};
pub use self::error::AdaptorError;
pub use self::listen_path::PathError;
use self::pods::{PodHandle, Pods};
pub use self::records::PodRecord;
use self::retry::Retries;
pub use self::retry::Stopped;
use self::shared::Shared;
pub use self::shared::{Config, MEMORY, PodSpec};
use crate::address::Address;
use crate::deadline::Deadline;
use crate::kbs::KbsClient;
use crate::key_source::KeySource;
pub use crate::pod::Endpoint;
use crate::pod::{PodSnapshot, StatusReporter};
use crate::store::{Store, StoreError};
use crate::text::with_causes;
use crate::transport::ssh::Admission;

/// Pods that are resumed at a time: each reads some files and opens its listeners.
const RESUMED_AT_A_TIME: usize = 32;

/// The worker node's end of any number of pods.
///
/// | method | keys | KBS | listeners | connection |
/// | --- | --- | --- | --- | --- |
/// | [`prepare`](Self::prepare) | finds or makes | publishes, unless the pod was up | opens | |
/// | [`start`](Self::start) | | deletes before the first client, publishes again if the VM attests again | | opens, keeps up |
/// | [`suspend`](Self::suspend) | keeps | | closes | closes |
/// | [`end`](Self::end), [`stop`](Self::stop) | deletes | deletes, until done | closes | closes |
/// | [`forget`](Self::forget) | deletes | | closes | closes |
/// | [`resume_all`](Self::resume_all) | finds | continues deletions | opens | opens, keeps up |
/// | [`restore_listeners`](Self::restore_listeners) | finds | | opens | |
/// | [`publish_keys`](Self::publish_keys) | finds | publishes, unless the pod is up | | |
///
/// Those up to `forget` are a pod's life. The last three continue it in a new process.
///
/// # Concurrency
/// Each pod has one task, which owns its keys, listeners, connection and state. A method sends it a command and waits
/// for the result. Methods of different pods run independently. The commands of one pod take effect in the order in
/// which their futures were first polled:
///
/// - `prepare`, `restore_listeners`, `resume_all`, `start` and `publish_keys` wait for earlier commands. A `start` does
///   not wait for a `publish_keys` of a pod that is served, and the next command does not wait for a start to be up: a
///   second `start` gets [`AdaptorError::AlreadyStarted`] at once, whether the first one is up or under way.
/// - `stop` and `suspend` come first. They cancel every earlier command that is under way or waits; its caller gets
///   [`AdaptorError::Stopped`] at once. They wait for no KBS that another command waits for.
/// - A `prepare` during a `stop` runs after it. A `start` during a `stop` gets [`AdaptorError::NotPrepared`] at once,
///   unless a `prepare` waits before it.
/// - A `prepare` of a pod whose deletion has failed deletes it first, within its own deadline, and then makes a new key.
/// - `end` and `forget` count as `stop` here.
/// - A `stop` during a `stop` shares its result if that succeeds, and else tries again. A `stop` during a `suspend`
///   completes it and then deletes; a `suspend` during a `stop` returns when the listeners are closed.
///
/// While an adaptor serves a pod, it holds the pod's lock in the store: another adaptor is refused
/// ([`StoreError::Locked`]).
///
/// # State
/// [`snapshot`](Self::snapshot) and [`subscribe`](Self::subscribe) show all there is. If a pod's task ends unexpectedly,
/// by a panic or because its runtime is gone, the state becomes [`PodState::Failed`](crate::pod::PodState::Failed), the
/// callers that wait get [`AdaptorError::TaskEnded`], and the next command gets a new task.
///
/// # Keys at the KBS
/// One resource holds the pod's key and the worker nodes that may log in. Whatever runs in the VM can read it there. So it
/// is deleted as soon as the VM has its keys, before a local client is served: no container exists before that. While the
/// KBS cannot delete it no client is served, the state and an event say why, and the deletion is retried. The store knows
/// where the key may be, so a new process deletes what a killed one has published; and for a pod whose key is gone the KBS
/// is asked for nothing, so that a KBS that is down does not keep a running pod's connection down.
///
/// When an agent attests whose keys are not there, they are published again at once. A KBS may also lose its resources:
/// while an agent reports failed attempts to get its keys, they are published again 5 s after the last publication at the
/// earliest, then after pauses that double up to 5 minutes.
///
/// A request to publish that was sent is never forgotten: a deletion waits for its answer, or deletes once more after it.
///
/// # Runtime
/// The async methods need a tokio runtime of either flavour, with I/O and time enabled. They spawn the pod's task on it, or
/// on the one that [`on`](Self::on) has named.
///
/// # Cancellation
/// Dropping a future of any method drops the wait, and nothing else: the command goes on, and its deadline still holds.
/// A future that was never polled has sent nothing. Dropping the `Adaptor` cuts every connection and closes every
/// listener; the store and the KBS keep what they have.
#[derive(Debug)]
pub struct Adaptor {
    shared: Arc<Shared>,
    pods: Arc<Pods>,
    /// None: that of the caller.
    runtime: Option<Handle>,
}

impl Adaptor {
    /// An adaptor without pods. Its VMs get their keys from `key_source`.
    pub fn new(store: Arc<dyn Store>, key_source: KeySource<KbsClient>, config: Config) -> Self {
        let memory = MemoryBudget::new(config.memory);
        let (retries, admission) = (Retries::default(), Admission::default());
        let shared = Shared { store, key_source, config, retries, admission, memory };
        Self { shared: Arc::new(shared), pods: Arc::default(), runtime: None }
    }

    /// Runs the tasks of all pods on this runtime, whichever runtime a method is called on.
    #[must_use]
    pub fn on(self, runtime: Handle) -> Self {
        Self { runtime: Some(runtime), ..self }
    }

    /// Completes once the runtime of the pods has run a task: not while its threads are busy or blocked.
    ///
    /// # Cancellation
    /// Dropping the future has no effect.
    pub async fn pulse(&self) {
        // An error: the runtime ends, and the caller with it.
        drop(self.spawn(async {}).await);
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) -> JoinHandle<()> {
        match &self.runtime {
            Some(runtime) => runtime.spawn(task),
            None => tokio::spawn(task),
        }
    }

    /// Sends the pod a command, and waits for its result. Starts the pod's task if it has none.
    async fn ask<T>(&self, id: &PodId, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, AdaptorError> {
        let (reply, result) = oneshot::channel();
        self.send(id, command(reply));
        result.await.unwrap_or_else(|_| Err(AdaptorError::TaskEnded(id.clone())))
    }

    /// The lock is held until the command is in the queue: a task leaves under the same lock, with an empty queue.
    fn send(&self, id: &PodId, command: Command) {
        let mut pods = self.pods.lock();
        let command = match pods.get(id) {
            // The error gives the command back: the task has ended unexpectedly.
            Some(pod) => match pod.commands.send(command) {
                Ok(()) => return,
                Err(error) => error.0,
            },
            None => command,
        };
        // Subscribers of the ended task stay subscribed.
        let status = pods.get(id).map(|pod| pod.status.clone());
        let status = status.unwrap_or_else(|| {
            StatusReporter::new(id.clone(), Arc::clone(&self.shared.config.observer))
                .charged_to(self.shared.memory.account())
        });
        let (commands, queue) = mpsc::unbounded_channel();
        let (shared, pods_of_task) = (Arc::clone(&self.shared), Arc::downgrade(&self.pods));
        let actor = Actor::new(id.clone(), shared, pods_of_task, queue, status.clone());
        // An error would mean that the queue's receiver is gone; it is in `actor`.
        drop(commands.send(command));
        pods.insert(id.clone(), PodHandle { commands, status });
        // Not joined: the task says itself how it ended, also after a panic.
        drop(self.spawn(actor.run()));
    }

    /// Finds or makes the pod's keys, publishes them, and listens for its local clients. The VM may then be started.
    /// A second call publishes the keys again and returns the same endpoints. `spec` is saved with the pod; if it differs
    /// from the saved one, what is published under the earlier path is deleted first, and the next start expects the new
    /// one.
    ///
    /// The keys of a pod that was up are not published here: its VM may run, with containers that could read them. They are
    /// published when an agent of the pod attests.
    ///
    /// # Errors
    /// The store, the KBS or an inbound failed, or the deadline passed; another adaptor serves the pod; the keys come
    /// from the user data, and the store has none ([`AdaptorError::NoKey`]); a `stop` or `suspend` came. The listeners
    /// are closed again. A key that this call made is deleted from the store, unless it may be in the KBS: then the pod
    /// stays known, and a `stop` deletes both.
    ///
    /// # Cancellation
    /// Dropping the future drops the wait only.
    pub async fn prepare(
        &self,
        id: &PodId,
        spec: PodSpec,
        deadline: Deadline,
    ) -> Result<Vec<Endpoint>, AdaptorError> {
        self.ask(id, |reply| Command::Prepare { spec, deadline, reply }).await
    }

    /// Listens again for the local clients of a pod that an earlier process started. `None` if the pod was never
    /// started.
    ///
    /// Its VM may be running and then needs nothing from the KBS, so the keys are not published here: a KBS that is
    /// down must not keep the pod down. They are published if the agent attests again.
    ///
    /// # Errors
    /// The store or an inbound failed, another adaptor serves the pod, or a `stop` or `suspend` came.
    ///
    /// # Cancellation
    /// Dropping the future drops the wait only.
    pub async fn restore_listeners(&self, id: &PodId) -> Result<Option<Vec<Endpoint>>, AdaptorError> {
        self.ask(id, |reply| Command::RestoreListeners { reply }).await
    }

    /// Publishes the keys of a known pod again: the KBS may have lost them. Nothing is published while the pod is up, and
    /// without a KBS. There is no need to call it for a VM that attests again: then they are published without it.
    ///
    /// # Errors
    /// The pod has no key, the store or the KBS failed, the KBS did not answer in the time that its client has for a
    /// call, another adaptor serves the pod, or a `stop` or `suspend` came.
    ///
    /// # Cancellation
    /// Dropping the future drops the wait only.
    pub async fn publish_keys(&self, id: &PodId) -> Result<(), AdaptorError> {
        self.ask(id, |reply| Command::PublishKeys { reply }).await
    }

    /// Connects to the pod's VM, and returns once the Kubernetes phase is up. From then on the connection is kept up
    /// until `suspend` or `stop`. While it waits for longer than a second, the observer learns what for
    /// ([`PodEvent::Waiting`](crate::pod::PodEvent::Waiting)), then every 15 s.
    ///
    /// # Errors
    /// The pod is not prepared, is started already, or did not come up; a `stop` or `suspend` came. After an error
    /// connecting is not retried, and the pod can be started again. Its keys stay where they are.
    ///
    /// A VM that is lost fails the start before its deadline: if every address of the pod, those that its names resolve to
    /// included, shows nothing else in at least 3 rounds over at least 10 s and a third of the deadline. None of this is
    /// proven, and one address that cannot be reached, or answers anything else, keeps the start going. Until then the
    /// state shows it ([`PodState::Connecting`](crate::pod::PodState::Connecting)).
    ///
    /// # Cancellation
    /// Dropping the future drops the wait only: the start goes on until it is up or its deadline passes.
    pub async fn start(
        &self,
        id: &PodId,
        addresses: &[Address],
        deadline: Deadline,
    ) -> Result<(), AdaptorError> {
        if addresses.is_empty() {
            return Err(AdaptorError::NoAddress(id.clone()));
        }
        let addresses = addresses.to_vec();
        self.ask(id, |reply| Command::Start(StartOrder { addresses, deadline, reply })).await
    }

    /// Opens a stream of a tunnel of the Kubernetes phase, as a local client of an inbound of that name would, and returns
    /// the client's end once the agent has confirmed the stream. So its server in the VM has accepted.
    ///
    /// The stream survives the loss of the pod's connections, as every stream of a session does. It ends with the pod.
    ///
    /// # Errors
    /// The pod is not up, the agent refused the stream, all places for streams of this tunnel are taken, or the connection
    /// was lost before the answer
    /// ([`AdaptorError::NotOpened`]).
    ///
    /// # Cancellation
    /// Dropping the future closes the stream.
    pub async fn open(&self, id: &PodId, tunnel: &TunnelName) -> Result<UnixStream, AdaptorError> {
        let failed = |reason| AdaptorError::NotOpened { pod: id.clone(), tunnel: tunnel.clone(), reason };
        if self.snapshot(id).is_none() {
            return Err(AdaptorError::NotPrepared(id.clone()));
        }
        let link = self.ask(id, |reply| Command::Open { name: tunnel.clone(), reply }).await?;
        let stream = link.open(tunnel).await.map_err(|error| {
            failed(match error {
                OpenError::Refused(reason) => format!("the agent refused: {reason}"),
                OpenError::Full => RefusalReason::TooManyStreams.to_string(),
                OpenError::LinkGone => "the connection was lost".to_owned(),
            })
        })?;
        let (ours, theirs) = UnixStream::pair().map_err(|error| failed(error.to_string()))?;
        let name = tunnel.clone();
        // It ends when either end does. Not joined: what it has to say is logged.
        drop(tokio::spawn(async move { report(&name, relay(Socket::Unix(ours), stream).await) }));
        Ok(theirs)
    }

    /// The pod now; `None` if it has no task.
    pub fn snapshot(&self, id: &PodId) -> Option<PodSnapshot> {
        self.pods.lock().get(id).map(|pod| pod.status.snapshot())
    }

    /// Whether an SSH server has answered at an address of the pod since its task began. Then its VM may have its keys,
    /// or be about to get them, whatever became of a start: deleting them could end a pod that is coming up.
    ///
    /// False if the pod has no task.
    pub fn was_answered(&self, id: &PodId) -> bool {
        self.pods.lock().get(id).is_some_and(|pod| pod.status.answered().get())
    }

    /// All pods now, in no order.
    pub fn snapshots(&self) -> Vec<(PodId, PodSnapshot)> {
        self.pods.lock().iter().map(|(id, pod)| (id.clone(), pod.status.snapshot())).collect()
    }

    /// The pod's changes; `None` if it has no task. The channel closes with `suspend` and `stop`.
    pub fn subscribe(&self, id: &PodId) -> Option<watch::Receiver<PodSnapshot>> {
        self.pods.lock().get(id).map(|pod| pod.status.subscribe())
    }

    /// What the streams of all pods have moved since the adaptor was made, also of pods that have ended. Nothing that the
    /// transport adds is counted, and what was sent again after a cut once.
    pub fn traffic(&self) -> Traffic {
        self.shared.memory.traffic()
    }

    /// What the streams of the pod have moved since its task began; `None` if it has no task.
    pub fn traffic_of(&self, id: &PodId) -> Option<Traffic> {
        self.pods.lock().get(id).map(|pod| pod.status.account().traffic())
    }

    /// Bytes of [`Config::memory`] that the streams of all pods hold now.
    pub fn memory_used(&self) -> usize {
        self.shared.memory.used()
    }

    /// Stops serving the pod, and keeps its keys and its KBS resource: a later process can resume it. A pod that is not
    /// served is left as it is.
    ///
    /// Open streams get `SHUTDOWN_DRAIN` (3 s) to end, then the agent receives a bye. The listeners are closed when it
    /// returns.
    ///
    /// # Cancellation
    /// Dropping the future drops the wait only.
    pub async fn suspend(&self, id: &PodId) {
        let served = self.pods.lock().contains_key(id);
        if served && let Err(error) = self.ask(id, |reply| Command::Suspend { reply }).await {
            // The pod is not served any more in this case either.
            tracing::error!("pod {id}: suspend: {}", with_causes(&error));
        }
    }

    /// Ends the pod: marks it in the store as one that is being ended, stops serving it as [`suspend`](Self::suspend) does,
    /// deletes its resource from the KBS, and deletes its key from the store.
    ///
    /// It returns at once if the pod's key has never left this process. Else the KBS gets 10 s to delete the resource, and
    /// 4 s if the stop interrupted a wait for it. What fails is retried ([`Stopped::Retried`]): the pod stays among the
    /// [`snapshots`](Self::snapshots), in the state [`PodState::Ending`](crate::pod::PodState::Ending), until it is deleted.
    /// The pauses double from 5 s to 5 minutes; a deletion of another pod that succeeds ends them.
    ///
    /// A mark that cannot be saved, as on a full disk, is logged, and the pod is ended all the same: a new process would
    /// resume it then.
    ///
    /// # Errors
    /// Another adaptor holds the pod, or the pod has no record and its usual resource could not be deleted. This is not
    /// retried.
    ///
    /// # Cancellation
    /// Dropping the future drops the wait only.
    pub async fn end(&self, id: &PodId) -> Result<Stopped, AdaptorError> {
        self.ask(id, |reply| Command::Stop { reply }).await
    }

    /// As [`end`](Self::end), for a caller that has to know whether the pod's keys are deleted.
    ///
    /// # Errors
    /// As [`end`](Self::end); and the KBS or the store failed, or the KBS has not answered an earlier request to publish,
    /// which it may still carry out. Then the deletion is retried as long as this adaptor or a later one runs. The pod is not
    /// served any more.
    ///
    /// # Cancellation
    /// Dropping the future drops the wait only.
    pub async fn stop(&self, id: &PodId) -> Result<(), AdaptorError> {
        match self.end(id).await? {
            Stopped::Done => Ok(()),
            Stopped::Retried(error) => Err(error),
        }
    }

    /// Ends the pod without the KBS: stops serving it, and deletes its record from the store. Returns the paths of the KBS
    /// under which its key may stay: nothing deletes them any more.
    ///
    /// # Errors
    /// The store failed, or another adaptor holds the pod.
    ///
    /// # Cancellation
    /// Dropping the future drops the wait only.
    pub async fn forget(&self, id: &PodId) -> Result<Vec<String>, AdaptorError> {
        self.ask(id, |reply| Command::Forget { reply }).await
    }

    /// What the store knows of all pods, in a stable order, whether they are served or not. A record that cannot be read is
    /// logged and left out: it is one pod's fault, as in [`resume_all`](Self::resume_all).
    ///
    /// # Errors
    /// The pods cannot be listed.
    ///
    /// # Cancellation
    /// Dropping the future has no effect.
    pub async fn records(&self) -> Result<Vec<PodRecord>, StoreError> {
        let mut all = Vec::new();
        for id in self.shared.store.pods().await? {
            match records::read(&self.shared, id.clone()).await {
                Ok(record) => all.extend(record),
                Err(error) => tracing::warn!("pod {id}: its record is left out: {}", with_causes(&error)),
            }
        }
        Ok(all)
    }

    /// What the store knows of the pod; `None` if it has no record.
    ///
    /// # Errors
    /// The store cannot be read.
    ///
    /// # Cancellation
    /// Dropping the future has no effect.
    pub async fn record(&self, id: &PodId) -> Result<Option<PodRecord>, StoreError> {
        records::read(&self.shared, id.clone()).await
    }

    /// Whether another adaptor holds the pod, as a `connect` with the same store does.
    ///
    /// # Errors
    /// The store cannot be read.
    ///
    /// # Cancellation
    /// Dropping the future has no effect.
    pub async fn is_held_elsewhere(&self, id: &PodId) -> Result<bool, StoreError> {
        if self.snapshot(id).is_some() {
            return Ok(false);
        }
        match self.shared.store.lock_pod(id).await {
            Err(StoreError::Locked { .. }) => Ok(true),
            // The lock is released at once.
            locked => locked.map(|_| false),
        }
    }

    /// Listens and connects again for every pod that an earlier process started, Kubernetes phase first, and returns
    /// their ids without waiting for the connections. A pod that fails, as one that another adaptor serves, is logged and
    /// left out. A pod that is being ended is never resumed: its deletion is continued.
    ///
    /// # Errors
    /// The pods cannot be listed.
    ///
    /// # Cancellation
    /// Dropping the future leaves the pods that were resumed already running.
    pub async fn resume_all(&self) -> Result<Vec<PodId>, AdaptorError> {
        let (mut resumed, mut under_way) = (Vec::new(), VecDeque::new());
        let mut ids = self.shared.store.pods().await?.into_iter();
        loop {
            while under_way.len() < RESUMED_AT_A_TIME
                && let Some(id) = ids.next()
            {
                let (reply, result) = oneshot::channel();
                self.send(&id, Command::Resume { reply });
                under_way.push_back((id, result));
            }
            let Some((id, result)) = under_way.pop_front() else { return Ok(resumed) };
            match result.await.unwrap_or_else(|_| Err(AdaptorError::TaskEnded(id.clone()))) {
                Ok(true) => resumed.push(id),
                Ok(false) => {}
                Err(error) => {
                    tracing::error!("pod {id}: resume failed, the pod is left out: {}", with_causes(&error));
                }
            }
        }
    }
}
