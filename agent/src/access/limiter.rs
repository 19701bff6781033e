//! Limits on connections: an admission queue, and eviction.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use secure_comms_protocol::limits::ADMISSION_PACE;
use tokio::time::{Instant, sleep_until};

use super::sources::{Source, Sources};
use crate::connection::Connection;
use crate::os::log_limits::EVICTED;

/// The reason that an evicted connection receives.
const EVICTION: &str = "evicted: connection limit reached";

/// Limits the connections of one kind. A newcomer evicts another connection instead of being refused, so a flood slows an
/// honest peer but can't lock it out.
#[derive(Debug)]
pub(crate) struct ConnectionLimiter {
    limit: usize,
    preference: Preference,
    held: Mutex<Vec<Connection>>,
    /// The queue of [`Self::admit_fifo`], and that of preferred sources, which need not wait behind a flood.
    queue: Queue,
    preferred_queue: Queue,
}

/// The time of the last admission; the lock is the queue.
type Queue = tokio::sync::Mutex<Option<Instant>>;

/// The sources for which some places are kept.
#[derive(Debug)]
pub(crate) enum Preference {
    /// None.
    None,
    /// This number of places is for sources from which a worker node has logged in.
    Proven(usize, Arc<Sources>),
    /// This number of places is for sources without a failed attempt. The source with the longest penalty loses places first.
    Unfailed(usize, Arc<Sources>),
}

/// Penalties that differ by less than this are equal: the most recent of many would always be the longest.
const PENALTY_STEP: Duration = Duration::from_secs(10);

impl Preference {
    /// Number of places that are kept.
    fn kept(&self) -> usize {
        match self {
            Self::None => 0,
            Self::Proven(kept, _) | Self::Unfailed(kept, _) => *kept,
        }
    }

    fn includes(&self, source: Source, now: Instant) -> bool {
        match self {
            Self::None => false,
            Self::Proven(_, sources) => sources.is_proven(source),
            Self::Unfailed(_, sources) => sources.failures(source, now) == 0,
        }
    }

    /// How long the source's penalty is, in steps.
    fn penalty(&self, source: Source, now: Instant) -> u128 {
        match self {
            Self::None | Self::Proven(..) => 0,
            Self::Unfailed(_, sources) => {
                let penalty = sources.due(source, now).saturating_duration_since(now);
                penalty.as_millis() / PENALTY_STEP.as_millis()
            }
        }
    }
}

/// A connection's place in a [`ConnectionLimiter`], given back on drop.
#[derive(Debug)]
pub(crate) struct Place {
    limiter: Arc<ConnectionLimiter>,
    id: u64,
}

/// The connections of a source that may be evicted, by index.
struct Candidates {
    is_preferred: bool,
    /// Penalty and number of connections.
    rank: (u128, usize),
    own: Vec<usize>,
}

impl ConnectionLimiter {
    /// Admits at most `limit` connections at a time.
    pub(crate) fn new(limit: usize, preference: Preference) -> Arc<Self> {
        Arc::new(Self {
            limit,
            preference,
            held: Mutex::default(),
            queue: Queue::default(),
            preferred_queue: Queue::default(),
        })
    }

    fn held(&self) -> MutexGuard<'_, Vec<Connection>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a place, first come, first served; preferred sources have a queue of their own. While all places are
    /// taken, admissions are [`ADMISSION_PACE`] apart: without that pace the connections of a flood would evict each other
    /// before any handshake can end.
    ///
    /// Cancellation: a dropped future leaves the queue.
    pub(crate) async fn admit_fifo(self: &Arc<Self>, connection: Connection) -> Place {
        let preferred = self.preference.includes(Source::of(connection.address), Instant::now());
        let queue = if preferred { &self.preferred_queue } else { &self.queue };
        let mut last = queue.lock().await;
        if let Some(last) = *last
            && self.held().len() >= self.limit
        {
            sleep_until(last + ADMISSION_PACE).await;
        }
        *last = Some(Instant::now());
        self.admit_evicting(connection, None)
    }

    /// Takes a place at once. If all are taken, evicts a connection of the source with the longest penalty; among equals a
    /// random one of the source that has the most, so that a host with one connection survives a host with thousands.
    /// Never evicts the connection `exempt`, and leaves the places that are kept to the sources that they are kept for.
    pub(crate) fn admit_evicting(self: &Arc<Self>, connection: Connection, exempt: Option<u64>) -> Place {
        let id = connection.id;
        let mut held = self.held();
        if held.len() >= self.limit
            && let Some(index) = self.eviction_candidate(&held, Source::of(connection.address), exempt)
        {
            let evicted = held.swap_remove(index);
            log::log!(EVICTED.level(log::Level::Info), "connection from {}: {EVICTION}", evicted.address);
            evicted.end(EVICTION);
        }
        held.push(connection);
        Place { limiter: self.clone(), id }
    }

    /// Ends every connection, with this reason.
    pub(crate) fn end_all(&self, reason: &str) {
        self.held().drain(..).for_each(|connection| connection.end(reason));
    }

    /// The index of a random connection of the sources that have the longest penalty, and of these the most connections.
    fn eviction_candidate(
        &self,
        held: &[Connection],
        newcomer: Source,
        exempt: Option<u64>,
    ) -> Option<usize> {
        let now = Instant::now();
        let mut by_source: HashMap<Source, Vec<usize>> = HashMap::new();
        for (index, other) in held.iter().enumerate().filter(|(_, other)| Some(other.id) != exempt) {
            by_source.entry(Source::of(other.address)).or_default().push(index);
        }
        // Each source is looked up once: a flood evicts thousands of times a second.
        let mut sources: Vec<_> = by_source
            .into_iter()
            .map(|(source, own)| Candidates {
                is_preferred: self.preference.includes(source, now),
                rank: (self.preference.penalty(source, now), own.len()),
                own,
            })
            .collect();
        let of_preferred = |source: &Candidates| if source.is_preferred { source.own.len() } else { 0 };
        let preferred: usize = sources.iter().map(of_preferred).sum();
        // Others may not take a place that is kept, and give one back that they have.
        let spares_preferred = match self.preference.includes(newcomer, now) {
            true => preferred < self.preference.kept(),
            false => preferred <= self.preference.kept(),
        };
        if spares_preferred && sources.iter().any(|source| !source.is_preferred) {
            sources.retain(|source| !source.is_preferred);
        }
        let most = sources.iter().map(|source| source.rank).max()?;
        sources.retain(|source| source.rank == most);
        let candidates: Vec<usize> = sources.into_iter().flat_map(|source| source.own).collect();
        candidates.get(rand::random_range(0..candidates.len())).copied()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.limiter.held().retain(|connection| connection.id != self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use secure_comms_ssh::guard::Guard;

    fn connection(id: u64, address: &str) -> Connection {
        Connection::new(id, address.parse().unwrap(), Guard::default())
    }

    fn ids(limiter: &ConnectionLimiter) -> Vec<u64> {
        limiter.held().iter().map(|held| held.id).collect()
    }

    fn of(number: u64) -> String {
        format!("192.0.2.{number}:1")
    }

    /// Lets every source in once, in turns, for many rounds; the ids of those that hold a place at the end of each.
    fn flood(
        limiter: &Arc<ConnectionLimiter>,
        numbers: std::ops::Range<u64>,
        mut each: impl FnMut(u64, Vec<u64>),
    ) {
        let mut places = Vec::new();
        for number in numbers.clone().cycle().take(2000) {
            places.push(limiter.admit_evicting(connection(number, &of(number)), None));
            each(number, ids(limiter));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_source_without_a_failure_keeps_its_seat_in_a_crowd_of_failed_ones() {
        let sources = Arc::new(Sources::default());
        let limiter = ConnectionLimiter::new(8, Preference::Unfailed(2, sources.clone()));
        for number in 2..30 {
            sources.attempt_failed(Source::of(of(number).parse().unwrap()), Instant::now());
        }
        let _honest = limiter.admit_evicting(connection(1, &of(1)), None);
        flood(&limiter, 2..30, |_, held| assert!(held.contains(&1) && held.len() <= 8, "{held:?}"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_calm_source_keeps_its_seat_in_a_crowd_that_has_not_failed_yet() {
        let sources = Arc::new(Sources::default());
        let limiter = ConnectionLimiter::new(8, Preference::Unfailed(2, sources.clone()));
        let log_in = |number| sources.logged_in(Source::of(of(number).parse().unwrap()), Instant::now());
        flood(&limiter, 2..30, |number, _| log_in(number));
        log_in(1);
        let _honest = limiter.admit_evicting(connection(1, &of(1)), None);
        flood(&limiter, 2..30, |number, held| {
            log_in(number);
            assert!(held.contains(&1), "{held:?}");
        });
    }

    #[tokio::test(start_paused = true)]
    async fn a_penalty_shuts_no_newcomer_out() {
        let sources = Arc::new(Sources::default());
        let limiter = ConnectionLimiter::new(8, Preference::Unfailed(2, sources.clone()));
        let failed = Source::of(of(1).parse().unwrap());
        sources.attempt_failed(failed, Instant::now());
        let mut places = Vec::new();
        for number in 2..30 {
            places.push(limiter.admit_evicting(connection(number, &of(number)), None));
        }
        places.push(limiter.admit_evicting(connection(1, &of(1)), None));
        assert!(ids(&limiter).contains(&1));
        // Once the penalty is over, it is evicted no sooner than others.
        tokio::time::advance(sources.due(failed, Instant::now()) - Instant::now()).await;
        let mut stayed = 0;
        for round in 0..200 {
            places.push(limiter.admit_evicting(connection(1, &of(1)), None));
            places.push(limiter.admit_evicting(connection(100 + round, &of(100 + round % 100)), None));
            stayed += u32::from(ids(&limiter).contains(&1));
        }
        assert!(stayed > 100, "{stayed}");
    }

    #[tokio::test(start_paused = true)]
    async fn places_are_kept_for_sources_that_are_proven_and_no_more_than_those() {
        let sources = Arc::new(Sources::default());
        let limiter = ConnectionLimiter::new(16, Preference::Proven(4, sources.clone()));
        sources.proved(Source::of(of(1).parse().unwrap()), Instant::now());
        let _honest = limiter.admit_evicting(connection(1, &of(1)), None);
        flood(&limiter, 2..200, |_, held| assert!(held.contains(&1), "{held:?}"));
        // Its neighbours behind the same address may flood: others are served, too.
        let mut places: Vec<_> =
            (0..200).map(|_| limiter.admit_evicting(connection(1, &of(1)), None)).collect();
        places.extend((2..14).map(|number| limiter.admit_evicting(connection(number, &of(number)), None)));
        places.extend((0..200).map(|_| limiter.admit_evicting(connection(1, &of(1)), None)));
        let held = ids(&limiter);
        assert!((2..14).filter(|number| held.contains(number)).count() == 12, "{held:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_proven_source_does_not_wait_behind_a_flood() {
        let sources = Arc::new(Sources::default());
        let limiter = ConnectionLimiter::new(2, Preference::Proven(1, sources.clone()));
        sources.proved(Source::of(of(1).parse().unwrap()), Instant::now());
        let mut places = Vec::new();
        for number in 2..4 {
            places.push(limiter.admit_fifo(connection(number, &of(number))).await);
        }
        let queue: Vec<_> =
            (4..100).map(|number| limiter.admit_fifo(connection(number, &of(number)))).collect();
        let began = Instant::now();
        tokio::select! {
            biased;
            () = async { for waits in queue { drop(waits.await); } } => panic!("the flood came first"),
            _place = limiter.admit_fifo(connection(1, &of(1))) => {}
        }
        assert!(began.elapsed() <= ADMISSION_PACE);
    }

    #[test]
    fn a_lone_source_survives_a_source_with_many() {
        for (alone, crowd) in [
            ("192.0.2.1:1", "192.0.2.2:1"),
            ("[::ffff:192.0.2.1]:1", "[::ffff:192.0.2.2]:1"),
            ("[2001:db8:0:1::1]:1", "[2001:db8:0:2::1]:1"),
        ] {
            let limiter = ConnectionLimiter::new(4, Preference::None);
            let mut places = vec![limiter.admit_evicting(connection(0, alone), None)];
            places.extend((1..100).map(|id| limiter.admit_evicting(connection(id, crowd), None)));
            let held: Vec<u64> = limiter.held().iter().map(|held| held.id).collect();
            assert!(held.len() == 4 && held.contains(&0), "{alone}: {held:?}");
        }
    }

    #[test]
    fn an_ipv6_network_is_one_source_and_the_exempt_stays() {
        let limiter = ConnectionLimiter::new(3, Preference::None);
        let mut places = vec![limiter.admit_evicting(connection(0, "[2001:db8::1]:1"), None)];
        places.extend(
            (1..100).map(|id| {
                limiter.admit_evicting(connection(id, &format!("[2001:db8:0:7::{id:x}]:1")), Some(0))
            }),
        );
        assert!(limiter.held().iter().any(|held| held.id == 0));
    }

    #[tokio::test(start_paused = true)]
    async fn full_limiter_admits_at_a_pace_an_empty_one_at_once() {
        let limiter = ConnectionLimiter::new(2, Preference::None);
        let began = Instant::now();
        let mut places = Vec::new();
        for id in 0..2 {
            places.push(limiter.admit_fifo(connection(id, "192.0.2.1:1")).await);
        }
        assert_eq!(began.elapsed().as_millis(), 0);
        for id in 2..12 {
            places.push(limiter.admit_fifo(connection(id, "192.0.2.1:1")).await);
        }
        assert!(began.elapsed() >= ADMISSION_PACE * 10);
        assert_eq!(limiter.held().len(), 2);
    }
}
