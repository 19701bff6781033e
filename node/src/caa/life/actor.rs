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
use super::machine::{DialNo, Effect, Input, Machine, Slot, StartFailure, Times};
use super::world::{Dial, Failed, World};
use crate::metrics::Metrics;

/// What becomes of an operation that has failed, for people.
const RETRIED: &str = "it is tried again while cloud-api-adaptor waits";
const NOT_RETRIED: &str = "it is not tried again at this VM: delete the pod, so that a new VM is made";

/// What becomes of a start that has failed.
fn after(failure: StartFailure) -> &'static str {
    match failure {
        StartFailure::Final => NOT_RETRIED,
        StartFailure::Again | StartFailure::NotPrepared => RETRIED,
    }
}

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
    /// Another ends the pod.
    TakenAway,
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
            Order::TakenAway => {
                self.last_end = "it was ended by force, over the API".to_owned();
                self.step(Input::TakenAway);
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
            Outcome::Started(result) => {
                let next = result.as_ref().err().map_or(RETRIED, |failed| after(failed.failure));
                Input::Started(self.noted_failure("start", next, result))
            }
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
                Input::Checked(self.noted_failure("ask the kata agent", RETRIED, result))
            }
            Outcome::Opened(result) => {
                let result = self.noted_failure("open a stream to the kata agent", RETRIED, result);
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

    /// `next`: what becomes of it after a failure.
    fn noted_failure<T, F>(&mut self, what: &str, next: &str, result: Result<T, Failed<F>>) -> Result<T, F> {
        match result {
            Ok(done) => {
                self.clear_obstacle();
                Ok(done)
            }
            Err(Failed { failure, reason }) => {
                self.set_obstacle(format!("{what}: {reason}"), next);
                Err(failure)
            }
        }
    }

    fn noted(&mut self, what: &str, result: Result<(), String>) -> Result<(), ()> {
        self.noted_failure(what, RETRIED, result.map_err(|reason| Failed { failure: (), reason }))
    }

    /// Each cause is logged once, until it changes.
    fn set_obstacle(&mut self, obstacle: String, next: &str) {
        if self.obstacle.as_ref() != Some(&obstacle) {
            tracing::warn!("pod {}: {obstacle}; {next}", self.id);
            self.show_obstacle(Some(obstacle));
        }
    }

    pub(super) fn clear_obstacle(&mut self) {
        if self.obstacle.is_some() {
            self.show_obstacle(None);
        }
    }

    fn show_obstacle(&mut self, obstacle: Option<String>) {
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
    use std::net::Ipv4Addr;
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_failure_is_called_retried_if_it_is() {
        let times = Times { grace: Duration::from_secs(60), first_dial: Duration::from_secs(600) };
        let vm = Ipv4Addr::new(10, 0, 0, 1).into();
        for failure in [StartFailure::Again, StartFailure::NotPrepared, StartFailure::Final] {
            let mut machine = Machine::new(times);
            machine.step(Input::Dialled { dial: 1, vm });
            assert!(machine.step(Input::Prepared(true)).contains(&Effect::Start(vm)));
            let effects = machine.step(Input::Started(Err(failure)));
            let is_retried = effects.iter().any(|effect| matches!(effect, Effect::Pause(..)));
            assert_eq!(after(failure), if is_retried { RETRIED } else { NOT_RETRIED }, "{failure:?}");
        }
    }

    #[test]
    fn a_queue_of_orders_has_no_room_for_whole_dials() {
        let size = size_of::<Order<[u8; 4096]>>();
        assert!(size <= 128, "32 times {size} bytes for each sandbox, which is dialled once");
    }
}
