//! Which sandbox a dial and a change of the directory belong to.
//!
//! Nothing here waits for a pod: each sandbox has a task of its own ([`super::actor`]), and so has each dial until its
//! sandbox is known.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use secure_comms_protocol::PodId;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};

use super::super::Sandbox;
use super::super::directory::Change;
use super::actor::{Actor, Common, Ended, Order, View};
use super::claims::{Claim, Claims, Verdict};
use super::machine::Times;
use super::parking::Parking;
use super::world::{Dial, Directory, World};
use crate::metrics::Metrics;

/// How long a dial of which no sandbox is known is held: its `apf.json` may be late.
const UNKNOWN_WAIT: Duration = Duration::from_secs(10);
/// How many dials are held like that at the same time.
const UNKNOWN_MAX: usize = 128;
/// How many sandboxes may live before one more is prepared with its first dial only, and not as soon as it appears: a copy
/// of the directory makes thousands of pods long gone look new.
pub(super) const EARLY_MAX: usize = 1024;

/// A pod of an earlier process.
#[derive(Debug)]
pub(super) struct Resumed {
    pub(super) id: PodId,
    /// The address of its VM, if the adaptor has resumed it.
    pub(super) vm: Option<IpAddr>,
    /// When the pod was first prepared.
    pub(super) created: Option<SystemTime>,
}

struct Life<D> {
    orders: mpsc::UnboundedSender<Order<D>>,
    sent: u64,
    view: View,
}

/// A sandbox whose VM's address a younger one has.
struct Loss {
    pod: PodId,
    vm: IpAddr,
    by: PodId,
}

/// What has come to the router.
enum Event<W: World> {
    /// A dial's sandbox is known.
    Resolved(W::Dial, Arc<Sandbox>),
    /// It was refused, or its other end has closed it.
    Over,
    /// A sandbox that was connected has lost its address.
    Lost(Loss),
}

/// The lives of all sandboxes. Dropping it cuts their connections.
pub(super) struct Router<W: World> {
    common: Arc<Common<W>>,
    lives: HashMap<PodId, Life<W::Dial>>,
    tasks: JoinSet<()>,
    claims: Claims,
    parking: Parking,
    parked: mpsc::UnboundedReceiver<W::Dial>,
    ended: mpsc::UnboundedReceiver<Ended>,
    events: JoinSet<Event<W>>,
    /// Changes with the directory.
    version: watch::Sender<u64>,
    unknown: Arc<Semaphore>,
    /// Sandboxes whose file cannot be used.
    broken: HashSet<PodId>,
    /// It was said that there are too many.
    is_crowded: bool,
}

impl<W: World> Router<W> {
    pub(super) fn new(world: W, times: Times, metrics: Metrics) -> Self {
        let (parked_sender, parked) = mpsc::unbounded_channel();
        let (ended_sender, ended) = mpsc::unbounded_channel();
        let common = Common { world, times, metrics, parked: parked_sender, ended: ended_sender };
        Self {
            common: Arc::new(common),
            lives: HashMap::new(),
            tasks: JoinSet::new(),
            claims: Claims::default(),
            parking: Parking::default(),
            parked,
            ended,
            events: JoinSet::new(),
            version: watch::Sender::new(0),
            unknown: Arc::new(Semaphore::new(UNKNOWN_MAX)),
            broken: HashSet::new(),
            is_crowded: false,
        }
    }

    /// A pod of an earlier process, which waits for a dial.
    pub(super) fn resume(&mut self, resumed: Resumed) {
        let Resumed { id, vm, created } = resumed;
        if let Some(vm) = vm {
            // Its file was written just before.
            let written = created.unwrap_or(SystemTime::UNIX_EPOCH);
            // The youngest has it; the others end when their grace is over.
            self.claims.dialled(vm, Claim { written, id: id.clone() });
        }
        let view = View::default();
        let actor = Actor::resumed(id.clone(), vm, Arc::clone(&self.common), view.clone());
        self.spawn(id, actor, view);
    }

    /// Serves until `stop` becomes true. Connections go on until it is dropped.
    pub(super) async fn run(
        &mut self,
        mut dials: mpsc::Receiver<W::Dial>,
        mut directory: impl Directory,
        mut taken_away: mpsc::UnboundedReceiver<PodId>,
        mut stop: watch::Receiver<bool>,
    ) {
        loop {
            tokio::select! {
                // An error: what would have stopped us is gone.
                _ = stop.wait_for(|stop| *stop) => break,
                Some(dial) = dials.recv() => self.resolve(dial),
                change = directory.next() => self.change(change),
                Some(id) = taken_away.recv() => self.order_if_known(&id, Order::TakenAway),
                Some(dial) = self.parked.recv() => self.park(dial),
                Some(ended) = self.ended.recv() => self.ended(&ended),
                Some(event) = self.events.join_next() => self.event(event),
                Some(task) = self.tasks.join_next() => if let Err(error) = task && error.is_panic() {
                    tracing::error!("caa: the task of a pod has panicked: report it");
                },
            }
        }
    }

    /// Finds the sandbox of a dial, in a task of its own.
    fn resolve(&mut self, mut dial: W::Dial) {
        let (common, unknown) = (Arc::clone(&self.common), Arc::clone(&self.unknown));
        let mut version = self.version.subscribe();
        self.events.spawn(async move {
            let deadline = Instant::now() + UNKNOWN_WAIT;
            let mut permit = None;
            loop {
                version.mark_unchanged();
                let reason = match common.world.sandbox_of(&dial).await {
                    Ok(sandbox) => return Event::Resolved(dial, sandbox),
                    Err(reason) => reason,
                };
                if permit.is_none() {
                    permit = unknown.try_acquire().ok();
                }
                if permit.is_none() {
                    dial.refuse(&format!("{reason}, and too many such connections wait"));
                    return Event::Over;
                }
                tokio::select! {
                    _ = dial.closed() => return Event::Over,
                    changed = timeout_at(deadline, version.changed()) => if !matches!(changed, Ok(Ok(()))) {
                        dial.refuse(&reason);
                        return Event::Over;
                    },
                }
            }
        });
    }

    fn event(&mut self, event: Result<Event<W>, tokio::task::JoinError>) {
        match event {
            Ok(Event::Resolved(dial, sandbox)) => self.dialled(dial, sandbox),
            Ok(Event::Lost(Loss { pod, vm, by })) => {
                if self.lives.get(&pod).is_some_and(|life| life.view.get().vm == Some(vm)) {
                    self.order_if_known(&pod, Order::Superseded(by));
                }
            }
            Ok(Event::Over) => {}
            Err(error) if error.is_panic() => {
                tracing::error!("caa: a task of a dial has panicked: report it");
            }
            // It was given up.
            Err(_) => {}
        }
    }

    fn dialled(&mut self, dial: W::Dial, sandbox: Arc<Sandbox>) {
        let vm = dial.vm();
        let claim = Claim { written: sandbox.written, id: sandbox.id.clone() };
        match self.claims.dialled(vm, claim) {
            Verdict::Owner => {}
            Verdict::Taken(older) => self.supersede(Loss { pod: older, vm, by: sandbox.id.clone() }),
            Verdict::Zombie(owner) => {
                tracing::info!(
                    "pod {}: its dial to {vm} is kept open without use: pod {owner}, which is younger, has the address",
                    sandbox.id
                );
                let lost = self.lives.get(&sandbox.id).map(|life| life.view.get());
                if lost
                    .is_some_and(|seen| !seen.relaying && seen.held == 0 && seen.vm.is_none_or(|at| at == vm))
                {
                    self.order_if_known(&sandbox.id, Order::Superseded(owner));
                }
                self.park(dial);
                return;
            }
        }
        self.order(sandbox.id.clone(), Order::Dial(Box::new(dial), sandbox));
    }

    /// A dial proves nothing before its handshake, so it does not end a pod that is connected and up, nor one whose line is
    /// interrupted. But a pod that stays down must not go on: it would connect to the younger sandbox's VM.
    fn supersede(&mut self, loss: Loss) {
        let Some(life) = self.lives.get(&loss.pod) else { return };
        if life.view.get().relaying {
            let common = Arc::clone(&self.common);
            self.events.spawn(async move {
                common.world.until_down(&loss.pod).await;
                Event::Lost(loss)
            });
        } else {
            self.order_if_known(&loss.pod, Order::Superseded(loss.by));
        }
    }

    fn change(&mut self, change: Change) {
        let id = change.id().clone();
        if let Change::Broken { reason, .. } = change {
            tracing::warn!("pod {id}: its file in the pods directory cannot be used: {reason}");
            self.broken.insert(id.clone());
            self.common.world.obstacle(&id, None, Some(reason));
            return;
        }
        if self.broken.remove(&id) {
            self.common.world.obstacle(&id, None, None);
        }
        match change {
            Change::Changed(sandbox) if self.lives.contains_key(&id) => {
                self.order(id, Order::Changed(sandbox));
            }
            Change::Appeared(sandbox) | Change::Changed(sandbox) => {
                if self.lives.contains_key(&id) || self.has_room() {
                    self.order(id, Order::Appeared(sandbox));
                }
            }
            Change::Gone(id) => self.order_if_known(&id, Order::Gone),
            Change::Broken { .. } => {}
        }
        self.version.send_modify(|version| *version = version.wrapping_add(1));
    }

    /// Whether one more sandbox is prepared before it is dialled.
    fn has_room(&mut self) -> bool {
        let count = self.lives.len();
        if count >= EARLY_MAX && !self.is_crowded {
            tracing::warn!(
                "caa: {count} sandboxes live or look new: further ones are prepared with their first dial only; remove what is \
                 left over in the pods directory"
            );
            self.is_crowded = true;
        } else if count < EARLY_MAX / 2 {
            self.is_crowded = false;
        }
        count < EARLY_MAX
    }

    fn park(&mut self, dial: W::Dial) {
        self.common.metrics.dial_parked();
        self.parking.park(dial);
    }

    /// Another order may be under way to it: then it goes on.
    fn ended(&mut self, ended: &Ended) {
        if self.lives.get(&ended.id).is_some_and(|life| life.sent == ended.orders) {
            self.lives.remove(&ended.id);
        }
    }

    fn order(&mut self, id: PodId, order: Order<W::Dial>) {
        if !self.lives.contains_key(&id) {
            let view = View::default();
            let actor = Actor::new(id.clone(), Arc::clone(&self.common), view.clone());
            self.spawn(id.clone(), actor, view);
        }
        self.order_if_known(&id, order);
    }

    fn order_if_known(&mut self, id: &PodId, order: Order<W::Dial>) {
        let Some(life) = self.lives.get_mut(id) else { return };
        life.sent += 1;
        if life.orders.send(order).is_err() {
            // Its task has panicked: the next order begins another one.
            self.lives.remove(id);
        }
    }

    fn spawn(&mut self, id: PodId, actor: Actor<W>, view: View) {
        let (orders, queue) = mpsc::unbounded_channel();
        self.tasks.spawn(actor.run(queue));
        self.lives.insert(id, Life { orders, sent: 0, view });
    }
}
