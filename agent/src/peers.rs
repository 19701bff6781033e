//! Connections: those that have not authenticated yet, and the peers of each phase.

use std::collections::HashMap;
use std::marker::PhantomData;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use secure_comms_protocol::limits::{ADMISSION_PACE, UPGRADE_DRAIN};
use secure_comms_protocol::{Phase, PodId, TunnelName};
use secure_comms_ssh::control::Outbox;
use secure_comms_ssh::guard::Guard;
use secure_comms_tunnel::Credits;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};

use crate::log::Throttle;

/// Refusals of a connection that are logged; the rest only for those who debug: strangers must not fill the log.
const REFUSALS_LOGGED: u32 = 16;

/// Connections a minute whose end to make room is worth a line.
const EVICTIONS_LOGGED: u32 = 20;

/// The handle on a connection: cutting it ends its session and everything on it.
#[derive(Clone, Debug)]
pub struct Connection {
    /// Unique in this process, growing.
    pub id: u64,
    /// Where it comes from.
    pub address: SocketAddr,
    guard: Guard,
    /// None until it has authenticated: only then the limits are known.
    credits: Arc<OnceLock<Credits>>,
    refusals: Arc<AtomicU32>,
}

impl Connection {
    /// A connection that has just been accepted.
    pub fn new(id: u64, address: SocketAddr, guard: Guard) -> Self {
        Self { id, address, guard, credits: Arc::default(), refusals: Arc::default() }
    }

    /// The peer has authenticated and gets this flow control.
    pub fn authenticated(&self, credits: Credits, held_max: usize) {
        self.guard.set_read_ahead_limit(held_max);
        // A connection authenticates once.
        drop(self.credits.set(credits));
    }

    /// Something that it asked for is refused: the level to log that at.
    pub fn refused(&self) -> log::Level {
        match self.refusals.fetch_add(1, Ordering::Relaxed) {
            0..REFUSALS_LOGGED => log::Level::Warn,
            _ => log::Level::Debug,
        }
    }

    /// Whether it has authenticated.
    pub fn has_authenticated(&self) -> bool {
        self.credits.get().is_some()
    }

    /// Waits until its flow control has ended: it was cut, or the peer overran its credit.
    pub async fn broken(&self) {
        match self.credits.get() {
            Some(credits) => credits.gone().await,
            None => std::future::pending().await,
        }
    }

    /// Waits until it is cut, while there is no session on it.
    pub async fn until_cut(&self) {
        self.guard.until_cut().await;
    }

    /// Ends it. The credits too: a stream that has stopped taking must not hold the session up for ever.
    pub fn cut(&self) {
        if let Some(credits) = self.credits.get() {
            credits.end();
        }
        self.guard.cut();
    }
}

/// Connections of one kind, at most so many: one makes room for the newcomer, so that a flood slows an honest peer and
/// can't keep it out.
#[derive(Debug)]
pub struct Slots {
    limit: usize,
    held: Mutex<Vec<Connection>>,
    /// When the last one came in turn.
    turn: tokio::sync::Mutex<Option<Instant>>,
    evictions: Throttle,
}

/// Where a connection comes from: a host, or a network of IPv6, of which a host has as many addresses as it likes.
fn origin(address: SocketAddr) -> IpAddr {
    match address.ip().to_canonical() {
        IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() >> 64 << 64).into(),
        ip => ip,
    }
}

/// A place among [`Slots`], given up on drop.
#[derive(Debug)]
pub struct Slot {
    slots: Arc<Slots>,
    id: u64,
}

impl Slots {
    /// So many places.
    pub fn new(limit: usize) -> Arc<Self> {
        let evictions = Throttle::new(EVICTIONS_LOGGED);
        Arc::new(Self { limit, held: Mutex::default(), turn: tokio::sync::Mutex::default(), evictions })
    }

    fn held(&self) -> MutexGuard<'_, Vec<Connection>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a place when its turn comes: first come, first served, and where there is no place not faster than
    /// [`ADMISSION_PACE`]. Else those of a flood would push one another out before any handshake can end.
    pub async fn enter_in_turn(self: &Arc<Self>, connection: Connection) -> Slot {
        let mut last = self.turn.lock().await;
        if let Some(last) = *last
            && self.held().len() >= self.limit
        {
            sleep_until(last + ADMISSION_PACE).await;
        }
        *last = Some(Instant::now());
        self.enter(connection, None)
    }

    /// Takes a place; if there is none, another connection is cut (never `spared`): a random one of those that come from
    /// where most come from, so that one that comes alone is not pushed out by thousands from elsewhere.
    pub fn enter(self: &Arc<Self>, connection: Connection, spared: Option<u64>) -> Slot {
        let id = connection.id;
        let mut held = self.held();
        if held.len() >= self.limit {
            let mut crowds: HashMap<IpAddr, Vec<usize>> = HashMap::new();
            for (index, other) in held.iter().enumerate().filter(|(_, other)| Some(other.id) != spared) {
                crowds.entry(origin(other.address)).or_default().push(index);
            }
            let largest = crowds.values().map(Vec::len).max().unwrap_or_default();
            let crowd: Vec<usize> =
                crowds.into_values().filter(|crowd| crowd.len() == largest).flatten().collect();
            if let Some(index) = crowd.get(rand::random_range(0..crowd.len().max(1))) {
                let victim = held.swap_remove(*index);
                log::log!(
                    self.evictions.level(log::Level::Info),
                    "connection from {}: cut to make room for a newcomer",
                    victim.address
                );
                victim.cut();
            }
        }
        held.push(connection);
        Slot { slots: self.clone(), id }
    }

    /// Cuts them all, at once.
    pub fn cut_all(&self) {
        self.held().drain(..).for_each(|connection| connection.cut());
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.slots.held().retain(|connection| connection.id != self.id);
    }
}

/// What a peer serves: the tunnel names it asked to have forwarded, with address and port as it asked.
pub type Offers = Mutex<HashMap<TunnelName, (String, u32)>>;

/// An authenticated peer of a phase.
#[derive(Debug)]
pub struct Peer<P> {
    /// Its connection.
    pub connection: Connection,
    /// Opens streams to it.
    pub link: crate::ssh::PeerLink,
    /// What it serves.
    pub offers: Arc<Offers>,
    /// Messages to it.
    pub outbox: Outbox,
    /// The streams on its connection.
    pub credits: Credits,
    /// The pod it says it drives.
    pub pod: OnceLock<PodId>,
    tried: AtomicBool,
    dismissed: AtomicBool,
    phase: PhantomData<P>,
}

impl<P: Phase> Peer<P> {
    /// A peer that has just authenticated.
    pub fn new(
        connection: Connection,
        credits: Credits,
        link: crate::ssh::PeerLink,
        offers: Arc<Offers>,
    ) -> Self {
        Self {
            connection,
            link,
            offers,
            outbox: Outbox::default(),
            credits,
            pod: OnceLock::new(),
            tried: AtomicBool::new(false),
            dismissed: AtomicBool::new(false),
            phase: PhantomData,
        }
    }

    /// Tells it why it must go, and lets it: what stays is cut.
    pub fn dismiss(&self, reason: &str) {
        if self.dismissed.swap(true, Ordering::Relaxed) {
            return;
        }
        self.outbox.bye(reason);
        let connection = self.connection.clone();
        tokio::spawn(async move {
            sleep(UPGRADE_DRAIN).await;
            connection.cut();
        });
    }

    /// Whether it has been told to go: it gets nothing new to do, though its connection may last a little.
    pub fn is_dismissed(&self) -> bool {
        self.dismissed.load(Ordering::Relaxed)
    }

    /// Whether it serves this tunnel.
    pub fn offers(&self, name: &TunnelName) -> bool {
        self.offers.lock().unwrap_or_else(PoisonError::into_inner).contains_key(name)
    }

    /// Whether an attempt was made with it before; from now on there was.
    pub fn mark_tried(&self) -> bool {
        self.tried.swap(true, Ordering::Relaxed)
    }

    /// Whether an attempt was made with it.
    pub fn was_tried(&self) -> bool {
        self.tried.load(Ordering::Relaxed)
    }
}

/// The peers of a phase.
#[derive(Debug)]
pub struct Peers<P> {
    list: Mutex<Vec<Arc<Peer<P>>>>,
    changed: watch::Sender<u64>,
}

impl<P> Default for Peers<P> {
    fn default() -> Self {
        Self { list: Mutex::default(), changed: watch::Sender::new(0) }
    }
}

impl<P: Phase> Peers<P> {
    fn list(&self) -> MutexGuard<'_, Vec<Arc<Peer<P>>>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds one.
    pub fn add(&self, peer: Arc<Peer<P>>) {
        self.list().push(peer);
        self.touch();
    }

    /// Removes one.
    pub fn remove(&self, id: u64) {
        self.list().retain(|peer| peer.connection.id != id);
        self.touch();
    }

    /// Something about a peer has changed: what it serves, what it said.
    pub fn touch(&self) {
        self.changed.send_modify(|version| *version += 1);
    }

    /// Tells of changes.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// All of them now, oldest first.
    pub fn all(&self) -> Vec<Arc<Peer<P>>> {
        self.list().clone()
    }

    /// The one that authenticated last, of those that stay.
    pub fn newest(&self) -> Option<Arc<Peer<P>>> {
        self.list().iter().rev().find(|peer| !peer.is_dismissed()).cloned()
    }

    /// Waits until there are none.
    pub async fn none_left(&self) {
        let mut changes = self.changes();
        while !self.list().is_empty() {
            if changes.changed().await.is_err() {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connection(id: u64, address: &str) -> Connection {
        Connection::new(id, address.parse().unwrap(), Guard::default())
    }

    #[test]
    fn one_that_comes_alone_stays_while_a_crowd_pushes_itself_out() {
        for (alone, crowd) in [
            ("192.0.2.1:1", "192.0.2.2:1"),
            ("[::ffff:192.0.2.1]:1", "[::ffff:192.0.2.2]:1"),
            ("[2001:db8:0:1::1]:1", "[2001:db8:0:2::1]:1"),
        ] {
            let slots = Slots::new(4);
            let mut places = vec![slots.enter(connection(0, alone), None)];
            places.extend((1..100).map(|id| slots.enter(connection(id, crowd), None)));
            let held: Vec<u64> = slots.held().iter().map(|held| held.id).collect();
            assert!(held.len() == 4 && held.contains(&0), "{alone}: {held:?}");
        }
    }

    #[test]
    fn a_host_with_many_addresses_of_a_network_is_one_crowd_and_the_spared_one_stays() {
        let slots = Slots::new(3);
        let mut places = vec![slots.enter(connection(0, "[2001:db8::1]:1"), None)];
        places.extend(
            (1..100).map(|id| slots.enter(connection(id, &format!("[2001:db8:0:7::{id:x}]:1")), Some(0))),
        );
        assert!(slots.held().iter().any(|held| held.id == 0));
    }

    #[tokio::test(start_paused = true)]
    async fn those_in_turn_push_one_another_out_at_a_pace_and_only_where_there_is_no_place() {
        let slots = Slots::new(2);
        let began = Instant::now();
        let mut places = Vec::new();
        for id in 0..2 {
            places.push(slots.enter_in_turn(connection(id, "192.0.2.1:1")).await);
        }
        assert_eq!(began.elapsed().as_millis(), 0);
        for id in 2..12 {
            places.push(slots.enter_in_turn(connection(id, "192.0.2.1:1")).await);
        }
        assert!(began.elapsed() >= ADMISSION_PACE * 10);
        assert_eq!(slots.held().len(), 2);
    }
}
