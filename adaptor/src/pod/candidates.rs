//! All socket addresses at which the pod's VM may be, those that its names resolve to included, with the task of each.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;

use secure_comms_protocol::limits::{CONNECT_STAGGER, RETRY_MAX};
use secure_comms_protocol::tag::Host;
use secure_comms_protocol::{Attestation, KeyProgress, Kubernetes, PhaseName};
use secure_comms_tunnel::Backoff;
use tokio::sync::{mpsc, watch};
use tokio::task::{AbortHandle, JoinError, JoinSet};
use tokio::time::{Instant, sleep, sleep_until};

use super::candidate::{Candidate, Common, Report};
use super::connect::{AnyConnection, Connected, Failure, resolve};
use super::lost_vm::{LostFindings, LostLimits};
use super::plan::Plan;
use super::slots::Slots;
use super::status::PodState;
use crate::address::Address;
use crate::transport::agent_connection::AgentConnection;
use crate::transport::ssh::{AgentLink, AuthLock};

/// Reports that may wait. A candidate waits for room, and its agent's messages with it.
const REPORTS: usize = 16;

/// What is known of one address.
#[derive(Debug)]
pub(super) struct Known {
    address: SocketAddr,
    /// Index into [`Plan::addresses`].
    index: usize,
    task: Option<AbortHandle>,
    /// Why the last round of attempts failed; none while a connection is up and before the first round ended.
    failure: Option<Failure>,
    lost: LostFindings,
    connection: Option<Shown>,
}

/// A connection in the Attestation phase, as far as it is shown.
#[derive(Debug)]
struct Shown {
    /// Grows with each change of any connection.
    changed: u64,
    /// None once the agent has said `upgrade`.
    link: Option<AgentLink<Attestation>>,
    keys: Option<KeyProgress>,
}

/// A name's last lookup.
#[derive(Debug, Default)]
struct Lookup {
    done: bool,
    /// What it resolved to when it last could be looked up.
    found: Vec<SocketAddr>,
    failure: Option<Failure>,
}

/// What happened at an address.
#[derive(Debug)]
pub(super) enum Event {
    Report(SocketAddr, Report),
    /// A name was looked up.
    Resolved,
    /// The Kubernetes phase is up.
    Reached(Box<Reached>),
}

/// A connection in the Kubernetes phase, and where it was opened.
#[derive(Debug)]
pub(super) struct Reached {
    /// Index into [`Plan::addresses`].
    pub(super) index: usize,
    pub(super) address: SocketAddr,
    pub(super) connection: AgentConnection<Kubernetes>,
}

/// The addresses, and their tasks. Dropping it cuts every connection.
#[derive(Debug)]
pub(super) struct Candidates {
    common: Common,
    first: PhaseName,
    order: watch::Sender<Option<&'static str>>,
    reports: mpsc::Receiver<(SocketAddr, Report)>,
    lookups: mpsc::Receiver<(usize, Result<Vec<SocketAddr>, Failure>)>,
    tasks: JoinSet<(SocketAddr, Option<AgentConnection<Kubernetes>>)>,
    resolvers: JoinSet<()>,
    /// By index into [`Plan::addresses`].
    names: BTreeMap<usize, Lookup>,
    /// In the order of [`Plan::addresses`].
    known: Vec<Known>,
    /// The addresses whose task has not started.
    queue: VecDeque<SocketAddr>,
    next_start: Instant,
    changes: u64,
    /// The result, while the reports that precede it are handed out.
    reached: Option<(Reached, usize)>,
}

impl Candidates {
    /// Starts with the addresses of the plan, and the connection that was found already, if any. `first` is the phase to
    /// try first at each address.
    pub(super) fn new(plan: &Plan, first: PhaseName, found: Option<Connected>) -> Self {
        let (order, end) = watch::channel(None);
        let (reports_sender, reports) = mpsc::channel(REPORTS);
        let (lookups_sender, lookups) = mpsc::channel(REPORTS);
        let (lock, slots) = (AuthLock::default(), Slots::default());
        let mut candidates = Self {
            common: Common { plan: plan.clone(), lock, slots, end, reports: reports_sender },
            first,
            order,
            reports,
            lookups,
            tasks: JoinSet::new(),
            resolvers: JoinSet::new(),
            names: BTreeMap::new(),
            known: Vec::new(),
            queue: VecDeque::new(),
            next_start: Instant::now(),
            changes: 0,
            reached: None,
        };
        if let Some(Connected { index, address, connection }) = found {
            candidates.add(index, address);
            candidates.queue.clear();
            candidates.start(address, Some(connection));
        }
        for (index, address) in plan.addresses.iter().enumerate() {
            match &address.host {
                Host::Ip(ip) => candidates.add(index, (*ip, address.port).into()),
                Host::Name(_) => {
                    candidates.names.insert(index, Lookup::default());
                    let keep_resolving =
                        keep_resolving(index, address.clone(), first, lookups_sender.clone());
                    candidates.resolvers.spawn(keep_resolving);
                }
            }
        }
        candidates
    }

    /// Waits for what happens next. Dropping the future loses nothing.
    pub(super) async fn next(&mut self) -> Event {
        loop {
            // What a candidate reported before it reached the agent comes first; what a stranger reports all the time
            // may not delay it.
            if let Some((_, left)) = &mut self.reached {
                *left = left.saturating_sub(1);
                match (*left, self.reports.try_recv()) {
                    (1.., Ok((address, report))) => return Event::Report(address, report),
                    _ => {
                        if let Some((reached, _)) = self.reached.take() {
                            return Event::Reached(Box::new(reached));
                        }
                    }
                }
            }
            tokio::select! {
                Some((address, report)) = self.reports.recv() => return Event::Report(address, report),
                Some((index, looked_up)) = self.lookups.recv() => {
                    self.on_lookup(index, looked_up);
                    return Event::Resolved;
                }
                Some(ended) = self.tasks.join_next() => self.on_ended(ended),
                () = sleep_until(self.next_start), if !self.queue.is_empty() => {
                    if let Some(address) = self.queue.pop_front() {
                        self.start(address, None);
                    }
                    self.next_start = Instant::now() + CONNECT_STAGGER;
                }
            }
        }
    }

    fn on_ended(&mut self, ended: Result<(SocketAddr, Option<AgentConnection<Kubernetes>>), JoinError>) {
        match ended {
            Ok((address, Some(connection))) => {
                let index = self.get(address).map_or(0, |known| known.index);
                self.reached = Some((Reached { index, address, connection }, REPORTS + 1));
            }
            Ok((_, None)) => {}
            // Its panic was printed where it happened: the address starts over.
            Err(error) => {
                let is_its =
                    |known: &&mut Known| known.task.as_ref().is_some_and(|task| task.id() == error.id());
                if let Some(known) = self.known.iter_mut().find(is_its) {
                    (known.task, known.connection) = (None, None);
                    self.queue.push_back(known.address);
                }
            }
        }
    }

    pub(super) fn on_lookup(&mut self, index: usize, looked_up: Result<Vec<SocketAddr>, Failure>) {
        let lookup = self.names.entry(index).or_default();
        lookup.done = true;
        match looked_up {
            Ok(found) => {
                *lookup = Lookup { done: true, found: found.clone(), failure: None };
                found.into_iter().for_each(|address| self.add(index, address));
                self.remove_stale();
            }
            // What it resolved to before may still be right.
            Err(failure) => lookup.failure = Some(failure),
        }
    }

    fn add(&mut self, index: usize, address: SocketAddr) {
        if self.get(address).is_some() {
            return;
        }
        let at = self.known.partition_point(|known| known.index <= index);
        let lost = LostFindings::default();
        self.known.insert(at, Known { address, index, task: None, failure: None, lost, connection: None });
        self.queue.push_back(address);
    }

    fn start(&mut self, address: SocketAddr, found: Option<AnyConnection>) {
        let candidate = Candidate::new(self.common.clone(), address, self.first);
        let task = self.tasks.spawn(async move { (address, candidate.run(found).await) });
        if let Some(known) = self.get_mut(address) {
            known.task = Some(task);
        }
    }

    /// Removes the addresses that no name resolves to any more, unless a connection is up there.
    fn remove_stale(&mut self) {
        let (names, addresses) = (&self.names, &self.common.plan.addresses);
        let is_wanted = |known: &Known| {
            addresses.iter().enumerate().any(|(index, Address { host, port })| match host {
                Host::Ip(ip) => (*ip, *port) == (known.address.ip(), known.address.port()),
                Host::Name(_) => {
                    names.get(&index).is_none_or(|name| !name.done || name.found.contains(&known.address))
                }
            })
        };
        self.known.retain(|known| {
            let keep = known.connection.is_some() || is_wanted(known);
            if !keep && let Some(task) = &known.task {
                task.abort();
            }
            keep
        });
        let known = &self.known;
        self.queue.retain(|address| known.iter().any(|known| known.address == *address));
    }

    fn get(&self, address: SocketAddr) -> Option<&Known> {
        self.known.iter().find(|known| known.address == address)
    }

    fn get_mut(&mut self, address: SocketAddr) -> Option<&mut Known> {
        self.known.iter_mut().find(|known| known.address == address)
    }

    /// A round of attempts failed at this address.
    pub(super) fn failed(&mut self, address: SocketAddr, failure: Failure) {
        // Its place in the schedule is free.
        self.next_start = Instant::now();
        if let Some(known) = self.get_mut(address) {
            known.lost.record(failure.vm_lost);
            (known.failure, known.connection) = (Some(failure), None);
        }
        self.remove_stale();
    }

    /// A connection in the Attestation phase began.
    pub(super) fn attesting(&mut self, address: SocketAddr, link: AgentLink<Attestation>) {
        self.changes += 1;
        let shown = Shown { changed: self.changes, link: Some(link), keys: None };
        if let Some(known) = self.get_mut(address) {
            known.lost.record(false);
            (known.failure, known.connection) = (None, Some(shown));
        }
    }

    /// The agent reported on its keys. Returns whether that is news: its error is another one than before.
    pub(super) fn keys(&mut self, address: SocketAddr, keys: KeyProgress) -> bool {
        self.changes += 1;
        let changed = self.changes;
        let Some(shown) = self.get_mut(address).and_then(|known| known.connection.as_mut()) else {
            return false;
        };
        let before = shown.keys.as_ref().and_then(|keys| keys.error.as_ref());
        let news = keys.error.is_none() || keys.error.as_ref() != before;
        (shown.changed, shown.keys) = (changed, Some(keys));
        news
    }

    /// The agent said `upgrade`.
    pub(super) fn upgrading(&mut self, address: SocketAddr) {
        self.changes += 1;
        let changed = self.changes;
        if let Some(shown) = self.get_mut(address).and_then(|known| known.connection.as_mut()) {
            (shown.changed, shown.link) = (changed, None);
        }
    }

    /// The connection in the Attestation phase ended.
    pub(super) fn ended(&mut self, address: SocketAddr) {
        if let Some(known) = self.get_mut(address) {
            known.connection = None;
        }
        self.remove_stale();
    }

    /// The text, with the address in front if there is more than one.
    pub(super) fn named(&self, address: SocketAddr, text: String) -> String {
        if self.known.len() > 1 { format!("{address}: {text}") } else { text }
    }

    /// The state of the most advanced connection, of several the one that changed last; none without a connection.
    pub(super) fn shown(&self) -> Option<PodState> {
        let connections =
            self.known.iter().filter_map(|known| Some((known.address, known.connection.as_ref()?)));
        let rank = |shown: &Shown| (shown.link.is_none(), shown.keys.is_some(), shown.changed);
        let (address, shown) = connections.max_by_key(|(_, shown)| rank(shown))?;
        Some(match (&shown.link, &shown.keys) {
            (None, _) => PodState::Upgrading,
            (Some(_), None) => PodState::Attesting { attempt: 0, last_error: None },
            (Some(_), Some(keys)) => {
                let last_error = keys.error.clone().map(|error| self.named(address, error));
                PodState::Attesting { attempt: keys.attempt, last_error }
            }
        })
    }

    /// The link of the newest connection in the Attestation phase, for local clients of that phase. None of the agents is
    /// proven, so no choice is better; the newest one is the least likely to be half dead.
    pub(super) fn newest_link(&self) -> Option<AgentLink<Attestation>> {
        let connections = self.known.iter().filter_map(|known| known.connection.as_ref());
        let newest = connections.filter(|shown| shown.link.is_some()).max_by_key(|shown| shown.changed)?;
        newest.link.clone()
    }

    /// The last failure of each address that has one, and of each name.
    pub(super) fn failures(&self) -> Vec<&Failure> {
        let at = |index| self.known.iter().filter(move |known| known.index == index);
        let of = |index| {
            let name = self.names.get(&index).and_then(|name| name.failure.as_ref());
            name.into_iter().chain(at(index).filter_map(|known| known.failure.as_ref()))
        };
        (0..self.common.plan.addresses.len()).flat_map(of).collect()
    }

    /// Whether every address has failed.
    pub(super) fn all_failed(&self) -> bool {
        self.names.values().all(|name| name.done) && self.known.iter().all(|known| known.failure.is_some())
    }

    /// Whether every address was tried: each has failed, or an agent there attests.
    pub(super) fn all_tried(&self) -> bool {
        let tried = |known: &Known| known.failure.is_some() || known.connection.is_some();
        self.names.values().all(|name| name.done) && self.known.iter().all(tried)
    }

    /// Whether the last attempt at every address found that the VM there is lost. While another address cannot be
    /// reached, the pod's VM may still be booting there: the lost one may be a stale address, or a stranger's.
    pub(super) fn all_lost(&self) -> bool {
        self.lost(LostFindings::found)
    }

    /// Whether that ends a start.
    pub(super) fn lost_for_good(&self, limits: LostLimits) -> bool {
        self.lost(|lost| lost.suffice(limits))
    }

    fn lost(&self, holds: impl Fn(&LostFindings) -> bool) -> bool {
        let resolved = self.names.values().all(|name| name.done && name.failure.is_none());
        resolved && !self.known.is_empty() && self.known.iter().all(|known| holds(&known.lost))
    }

    /// Ends all connections with a bye, and returns once they have ended, after a second at most.
    pub(super) async fn end(mut self, reason: &'static str) {
        self.order.send_replace(Some(reason));
        self.reports.close();
        self.resolvers.abort_all();
        while self.tasks.join_next().await.is_some() {}
    }
}

/// Looks a name up again and again: its address may change, or appear. Ends with the candidates.
async fn keep_resolving(
    index: usize,
    address: Address,
    first: PhaseName,
    lookups: mpsc::Sender<(usize, Result<Vec<SocketAddr>, Failure>)>,
) {
    let mut backoff = Backoff::default();
    loop {
        let found = resolve(&address, first).await;
        let is_found = found.as_ref().is_ok_and(|found| !found.is_empty());
        if lookups.send((index, found)).await.is_err() {
            return;
        }
        if is_found {
            backoff.reset();
            sleep(RETRY_MAX).await;
        } else {
            backoff.pause().await;
        }
    }
}
