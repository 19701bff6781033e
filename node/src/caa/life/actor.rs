//! The task of one sandbox: carries out what its machine says, and gives it what happened.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use secure_comms_protocol::PodId;
use tokio::sync::{mpsc, oneshot};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep, sleep_until};

use super::super::Sandbox;
use super::machine::{
    Cause, Connection, DialNo, Effect, Input, Machine, ReleaseFailure, Slot, StartFailure, Times,
};
use super::world::{Dial, Failed, World};
use crate::metrics::Metrics;
use crate::pods::Runtime;

/// What the sandbox's task is asked for.
pub(super) enum Order<D> {
    /// Its directory describes a pod that begins or lives.
    Appeared(Arc<Sandbox>),
    /// What the directory says has changed.
    Changed(Arc<Sandbox>),
    /// The directory is gone.
    Gone,
    /// It was dialled. In a box: the queue of each sandbox has room for 32 orders from the start, and a dial of some kilobytes.
    Dial(Box<D>, Arc<Sandbox>),
    /// A younger sandbox has the address of its VM: this one.
    Superseded(PodId),
}

/// Nothing of the sandbox is left, after this number of orders.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) id: PodId,
    pub(super) orders: u64,
}

/// What others may know of a life.
#[derive(Clone, Debug, Default)]
pub(super) struct View(Arc<Mutex<Seen>>);

/// See [`View`].
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Seen {
    /// The address at which the pod is started.
    pub(super) vm: Option<IpAddr>,
    /// The runtime is connected.
    pub(super) relaying: bool,
    /// Dials that wait.
    pub(super) held: usize,
}

impl View {
    pub(super) fn get(&self) -> Seen {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, seen: Seen) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = seen;
    }
}

/// What all sandboxes have in common.
pub(super) struct Common<W: World> {
    pub(super) world: W,
    pub(super) times: Times,
    pub(super) metrics: Metrics,
    /// Dials that are to be kept open without use.
    pub(super) parked: mpsc::UnboundedSender<W::Dial>,
    pub(super) ended: mpsc::UnboundedSender<Ended>,
}

/// What a task of the sandbox has done.
enum Done<W: World> {
    Slot { slot: Slot, number: u64, outcome: Outcome<W> },
    DialClosed(DialNo, String),
    DialTaken,
    RelayEnded(DialNo, String),
}

/// The outcome of an operation, by kind.
enum Outcome<W: World> {
    Prepared(Result<(), String>),
    Started(Result<(), Failed<StartFailure>>),
    Halted,
    Stopped(Result<(), String>),
    Checked(Result<(), Failed<ReleaseFailure>>),
    Opened(Result<W::Stream, Failed<ReleaseFailure>>),
    Finished(DialNo, Result<W::Client, String>),
    Due,
}

/// An operation that a slot has under way.
struct Operation {
    number: u64,
    task: AbortHandle,
}

/// A held dial: its task watches it, and gives it back on demand.
struct HeldDial<D> {
    take: oneshot::Sender<oneshot::Sender<D>>,
    server_name: String,
}

/// The task of one sandbox.
pub(super) struct Actor<W: World> {
    id: PodId,
    common: Arc<Common<W>>,
    machine: Machine,
    sandbox: Option<Arc<Sandbox>>,
    view: View,
    received: u64,
    numbers: u64,
    tasks: JoinSet<Done<W>>,
    channel: Option<Operation>,
    release: Option<Operation>,
    dials: HashMap<DialNo, HeldDial<W::Dial>>,
    relays: HashMap<DialNo, AbortHandle>,
    client: Option<W::Client>,
    stream: Option<W::Stream>,
    expires: Option<Instant>,
    held_since: Option<SystemTime>,
    /// How the last connection ended, or which sandbox has the address.
    last_end: String,
    /// What keeps the pod from being used, as it was logged last.
    obstacle: Option<String>,
}

impl<W: World> Actor<W> {
    /// A sandbox of which nothing is served.
    pub(super) fn new(id: PodId, common: Arc<Common<W>>, view: View) -> Self {
        let machine = Machine::new(common.times);
        Self::with(id, common, view, machine)
    }

    /// A sandbox whose pod an earlier process has begun. `vm`: the adaptor has resumed it there.
    pub(super) fn resumed(id: PodId, vm: Option<IpAddr>, common: Arc<Common<W>>, view: View) -> Self {
        let (machine, effects) = Machine::resumed(common.times, vm);
        let mut actor = Self::with(id, common, view, machine);
        actor.perform(effects);
        actor
    }

    fn with(id: PodId, common: Arc<Common<W>>, view: View, machine: Machine) -> Self {
        Self {
            id,
            common,
            machine,
            sandbox: None,
            view,
            received: 0,
            numbers: 0,
            tasks: JoinSet::new(),
            channel: None,
            release: None,
            dials: HashMap::new(),
            relays: HashMap::new(),
            client: None,
            stream: None,
            expires: None,
            held_since: None,
            last_end: String::new(),
            obstacle: None,
        }
    }

    /// Serves the sandbox until no more orders can come. Dropping it cuts its connections.
    pub(super) async fn run(mut self, mut orders: mpsc::UnboundedReceiver<Order<W::Dial>>) {
        loop {
            let expires = self.expires;
            let expired = async move {
                match expires {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                order = orders.recv() => match order {
                    Some(order) => self.order(order),
                    None => return,
                },
                Some(done) = self.tasks.join_next() => match done {
                    Ok(done) => self.done(done),
                    Err(error) if error.is_panic() => {
                        tracing::error!("pod {}: a task of its life has panicked: report it", self.id);
                    }
                    // It was given up.
                    Err(_) => {}
                },
                () = expired => {
                    self.expires = None;
                    self.step(Input::Expired);
                }
            }
        }
    }

    fn order(&mut self, order: Order<W::Dial>) {
        self.received += 1;
        match order {
            Order::Appeared(sandbox) => {
                self.sandbox = Some(sandbox);
                self.step(Input::Appeared);
            }
            Order::Changed(sandbox) => {
                self.sandbox = Some(sandbox);
                self.step(Input::Changed);
            }
            Order::Gone => self.step(Input::Gone),
            Order::Dial(dial, sandbox) => {
                self.sandbox = Some(sandbox);
                self.dialled(*dial);
            }
            Order::Superseded(by) => {
                self.last_end = format!("sandbox {by}, which is younger, has the address of its VM");
                self.step(Input::Superseded);
            }
        }
    }

    fn dialled(&mut self, mut dial: W::Dial) {
        self.numbers += 1;
        let (number, vm) = (self.numbers, dial.vm());
        let (take, taken) = oneshot::channel::<oneshot::Sender<W::Dial>>();
        self.dials.insert(number, HeldDial { take, server_name: dial.server_name() });
        self.tasks.spawn(async move {
            tokio::select! {
                back = taken => {
                    // An error means that it is dropped: so is the dial.
                    if let Ok(back) = back {
                        // If nothing waits for it, it is closed.
                        drop(back.send(dial));
                    }
                    Done::DialTaken
                }
                reason = dial.closed() => Done::DialClosed(number, reason),
            }
        });
        self.step(Input::Dialled { dial: number, vm });
    }

    fn done(&mut self, done: Done<W>) {
        match done {
            Done::DialTaken => {}
            Done::DialClosed(dial, reason) => {
                if self.dials.remove(&dial).is_some() {
                    self.last_end = reason;
                    self.step(Input::DialClosed(dial));
                }
            }
            Done::RelayEnded(dial, reason) => {
                self.relays.remove(&dial);
                tracing::info!("pod {}: the runtime's connection has ended: {reason}", self.id);
                self.last_end = reason;
                self.step(Input::RelayEnded(dial));
            }
            Done::Slot { slot, number, outcome } => {
                let operation = self.slot(slot);
                if operation.as_ref().is_some_and(|operation| operation.number == number) {
                    *operation = None;
                    self.outcome(slot, outcome);
                }
            }
        }
    }

    fn outcome(&mut self, slot: Slot, outcome: Outcome<W>) {
        let input = match outcome {
            Outcome::Prepared(result) => Input::Prepared(self.noted("publish the keys", result).is_ok()),
            Outcome::Started(result) => Input::Started(self.noted_failure("start", result)),
            Outcome::Halted => Input::Halted,
            Outcome::Stopped(result) => {
                if let Err(reason) = result {
                    tracing::error!("pod {}: stop: {reason}", self.id);
                }
                Input::Stopped
            }
            Outcome::Checked(result) => {
                if result.is_err() {
                    self.common.metrics.check_failed();
                }
                Input::Checked(self.noted_failure("ask the kata agent", result))
            }
            Outcome::Opened(result) => {
                let result = self.noted_failure("open a stream to the kata agent", result);
                Input::Opened(result.map(|stream| self.stream = Some(stream)))
            }
            Outcome::Finished(dial, result) => {
                let proven = match result {
                    Ok(client) => {
                        self.client = Some(client);
                        self.common.metrics.dial_released();
                        true
                    }
                    Err(reason) => {
                        tracing::warn!("pod {}: the handshake of a dial failed: {reason}", self.id);
                        self.last_end = format!("its handshake failed: {reason}");
                        false
                    }
                };
                Input::Finished { dial, proven }
            }
            Outcome::Due => Input::Due(slot),
        };
        self.step(input);
    }

    fn noted_failure<T, F>(&mut self, what: &str, result: Result<T, Failed<F>>) -> Result<T, F> {
        match result {
            Ok(done) => {
                self.set_obstacle(None);
                Ok(done)
            }
            Err(Failed { failure, reason }) => {
                self.set_obstacle(Some(format!("{what}: {reason}")));
                Err(failure)
            }
        }
    }

    fn noted(&mut self, what: &str, result: Result<(), String>) -> Result<(), ()> {
        self.noted_failure(what, result.map_err(|reason| Failed { failure: (), reason }))
    }

    /// Each cause is logged once, until it changes.
    fn set_obstacle(&mut self, obstacle: Option<String>) {
        if self.obstacle == obstacle {
            return;
        }
        if let Some(obstacle) = &obstacle {
            tracing::warn!("pod {}: {obstacle}; it is tried again while cloud-api-adaptor waits", self.id);
        }
        self.common.world.obstacle(&self.id, self.sandbox.as_deref(), obstacle.clone());
        self.obstacle = obstacle;
    }

    fn step(&mut self, input: Input) {
        let effects = self.machine.step(input);
        self.perform(effects);
    }

    fn perform(&mut self, effects: Vec<Effect>) {
        let mut ended = false;
        for effect in effects {
            ended |= effect == Effect::Ended;
            self.carry_out(effect);
        }
        self.view.set(Seen {
            vm: self.machine.vm(),
            relaying: self.machine.is_relaying(),
            held: self.dials.len(),
        });
        if ended {
            // An error means that the service ends.
            drop(self.common.ended.send(Ended { id: self.id.clone(), orders: self.received }));
        }
    }

    fn carry_out(&mut self, effect: Effect) {
        match effect {
            Effect::Prepare | Effect::Start(_) | Effect::Halt | Effect::Stop(_) => self.of_channel(effect),
            Effect::Check | Effect::Open => self.of_release(effect),
            Effect::Finish(dial) => self.finish(dial),
            Effect::Relay(dial) => self.relay(dial),
            Effect::Cut(dial) => {
                if let Some(relay) = self.relays.remove(&dial) {
                    relay.abort();
                }
            }
            Effect::Drop(dial) => drop(self.dials.remove(&dial)),
            Effect::Park(dial) => self.park(dial),
            Effect::Abort(slot) => {
                if let Some(operation) = self.slot(slot).take() {
                    operation.task.abort();
                }
                if slot == Slot::Release {
                    self.stream = None;
                }
            }
            Effect::Pause(slot, time) => self.begin(slot, async move {
                sleep(time).await;
                Outcome::Due
            }),
            Effect::Expire(time) => {
                self.expires = time.and_then(|time| Instant::now().checked_add(time));
            }
            Effect::Show(connection) => self.show(connection),
            Effect::Ended => {}
        }
    }

    fn of_channel(&mut self, effect: Effect) {
        let (common, id, sandbox) = (Arc::clone(&self.common), self.id.clone(), self.sandbox.clone());
        match effect {
            Effect::Prepare => self.begin(Slot::Channel, async move {
                Outcome::Prepared(match sandbox {
                    Some(sandbox) => common.world.prepare(&sandbox).await,
                    None => Err("its directory is gone".to_owned()),
                })
            }),
            Effect::Start(vm) => {
                self.begin(Slot::Channel, async move { Outcome::Started(common.world.start(&id, vm).await) });
            }
            Effect::Halt => self.begin(Slot::Channel, async move {
                common.world.halt(&id).await;
                Outcome::Halted
            }),
            Effect::Stop(cause) => {
                self.log_end(cause);
                self.set_obstacle(None);
                self.begin(Slot::Channel, async move { Outcome::Stopped(common.world.stop(&id).await) });
            }
            _ => {}
        }
    }

    fn of_release(&mut self, effect: Effect) {
        let (common, id) = (Arc::clone(&self.common), self.id.clone());
        if effect == Effect::Check {
            self.begin(Slot::Release, async move { Outcome::Checked(common.world.check(&id).await) });
        } else {
            self.begin(Slot::Release, async move { Outcome::Opened(common.world.open(&id).await) });
        }
    }

    fn finish(&mut self, dial: DialNo) {
        let (common, sandbox) = (Arc::clone(&self.common), self.sandbox.clone());
        let taken = self.take(dial);
        self.begin(Slot::Release, async move {
            let closed = || "it was closed before".to_owned();
            let result = match (taken, sandbox) {
                (Some(taken), Some(sandbox)) => match taken.await {
                    Ok(dial) => common.world.finish(dial, &sandbox).await,
                    Err(_) => Err(closed()),
                },
                _ => Err(closed()),
            };
            Outcome::Finished(dial, result)
        });
    }

    fn take(&mut self, dial: DialNo) -> Option<oneshot::Receiver<W::Dial>> {
        let held = self.dials.remove(&dial)?;
        let (back, taken) = oneshot::channel();
        held.take.send(back).ok()?;
        Some(taken)
    }

    fn park(&mut self, dial: DialNo) {
        let name = self.dials.get(&dial).map(|held| held.server_name.clone()).unwrap_or_default();
        let (parked, taken) = (self.common.parked.clone(), self.take(dial));
        tracing::info!("pod {}: the dial for {name} is kept open without use: {}", self.id, self.last_end);
        self.tasks.spawn(async move {
            if let Some(taken) = taken
                && let Ok(dial) = taken.await
            {
                // An error means that the service ends.
                drop(parked.send(dial));
            }
            Done::DialTaken
        });
    }

    fn relay(&mut self, dial: DialNo) {
        let (Some(client), Some(stream)) = (self.client.take(), self.stream.take()) else { return };
        tracing::info!("pod {}: can be used: the runtime is connected to its kata agent", self.id);
        let (common, id) = (Arc::clone(&self.common), self.id.clone());
        let task = self
            .tasks
            .spawn(async move { Done::RelayEnded(dial, common.world.relay(&id, client, stream).await) });
        self.relays.insert(dial, task);
    }

    fn show(&mut self, connection: Connection) {
        let now = SystemTime::now();
        if connection != Connection::Held {
            self.held_since = None;
        }
        self.common.world.show(
            &self.id,
            match connection {
                Connection::None => Runtime::None,
                Connection::Held => Runtime::Held { since: *self.held_since.get_or_insert(now) },
                Connection::Connected => Runtime::Connected { since: now },
                Connection::Ended => Runtime::Ended { since: now, reason: self.last_end.clone() },
            },
        );
    }

    fn log_end(&self, cause: Cause) {
        let (grace, first_dial) = (self.common.times.grace.as_secs(), self.common.times.first_dial.as_secs());
        let why = match cause {
            Cause::NeverDialled => format!("cloud-api-adaptor has not dialled its VM within {first_dial} s"),
            Cause::NotDialledAgain => {
                format!(
                    "cloud-api-adaptor has not dialled its VM within {grace} s after the restart of this service"
                )
            }
            Cause::DialClosed | Cause::RelayEnded => {
                format!("{}, and no other connection came within {grace} s", self.last_end)
            }
            Cause::DirectoryGone => format!("its directory was removed {grace} s ago"),
            Cause::Superseded => self.last_end.clone(),
        };
        tracing::info!("pod {}: stopped, its keys are deleted: {why}", self.id);
    }

    fn slot(&mut self, slot: Slot) -> &mut Option<Operation> {
        match slot {
            Slot::Channel => &mut self.channel,
            Slot::Release => &mut self.release,
        }
    }

    /// Puts an operation into its slot, in place of an earlier one.
    fn begin(&mut self, slot: Slot, operation: impl Future<Output = Outcome<W>> + Send + 'static) {
        self.numbers += 1;
        let number = self.numbers;
        let task = self.tasks.spawn(async move { Done::Slot { slot, number, outcome: operation.await } });
        if let Some(earlier) = self.slot(slot).replace(Operation { number, task }) {
            earlier.task.abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Order;

    #[test]
    fn a_queue_of_orders_has_no_room_for_whole_dials() {
        let size = size_of::<Order<[u8; 4096]>>();
        assert!(size <= 128, "32 times {size} bytes for each sandbox, which is dialled once");
    }
}
