//! The task of one sandbox: carries out what its machine says, and gives it what happened.

mod dials;
mod effects;
mod operations;
mod view;

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

use secure_comms_protocol::PodId;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep_until};

use self::dials::HeldDials;
use self::operations::{Done, Operations, Outcome};
use self::view::Seen;
pub(super) use self::view::View;
use super::super::Sandbox;
use super::machine::{DialNo, Effect, Input, Machine, Slot, Times};
use super::world::{Dial, Failed, World};
use crate::metrics::Metrics;

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

/// What all sandboxes have in common.
pub(super) struct Common<W: World> {
    pub(super) world: W,
    pub(super) times: Times,
    pub(super) metrics: Metrics,
    /// Dials that are to be kept open without use.
    pub(super) parked: mpsc::UnboundedSender<W::Dial>,
    pub(super) ended: mpsc::UnboundedSender<Ended>,
}

/// The task of one sandbox.
pub(super) struct Actor<W: World> {
    id: PodId,
    common: Arc<Common<W>>,
    machine: Machine,
    sandbox: Option<Arc<Sandbox>>,
    view: View,
    /// Orders so far.
    received: u64,
    /// Dials so far.
    dialled: DialNo,
    operations: Operations<W>,
    dials: HeldDials<W::Dial>,
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
            dialled: 0,
            operations: Operations::new(),
            dials: HeldDials::new(),
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
                Some(done) = self.operations.next() => match done {
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

    fn dialled(&mut self, dial: W::Dial) {
        self.dialled += 1;
        let (number, vm) = (self.dialled, dial.vm());
        let watch = self.dials.hold(number, dial);
        self.operations.spawn(async move {
            match watch.await {
                Some(reason) => Done::DialClosed(number, reason),
                None => Done::DialTaken,
            }
        });
        self.step(Input::Dialled { dial: number, vm });
    }

    fn done(&mut self, done: Done<W>) {
        match done {
            Done::DialTaken => {}
            Done::DialClosed(dial, reason) => {
                if self.dials.remove(dial) {
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
                if self.operations.has_ended(slot, number) {
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
