//! What the agent remembers of the sources of connections: whose turn is when, and who has proven a worker-node key.
//!
//! A source is a host's IPv4 address or its IPv6 /64. For each the table holds the time when it is *due*: its attempts come
//! in the order of these times, and a source that is due in the future is under a penalty. Each login costs it a little, and
//! an attempt through it in which it was silent or left costs much more. So a source that floods, or stays silent, comes
//! behind all others, for at most [`PENALTY_MAX`]. A penalty decides only between sources: it delays none that is alone, and
//! shuts none out.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use secure_comms_protocol::limits::{
    FAILURE_MEMORY, FAILURE_PENALTY, LOGIN_PENALTY, PENALTY_CREDIT, PENALTY_MAX, SOURCES_MAX,
};
use tokio::time::Instant;

/// The source that a connection counts for: a host's IPv4 address, or its IPv6 /64, in which a host can use any address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Source(IpAddr);

impl Source {
    /// The source of connections from this address.
    pub(crate) fn of(address: SocketAddr) -> Self {
        Self(match address.ip().to_canonical() {
            IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() >> 64 << 64).into(),
            ip => ip,
        })
    }
}

/// The sources that are remembered: at most [`SOURCES_MAX`].
#[derive(Debug, Default)]
pub(crate) struct Sources {
    table: Mutex<HashMap<Source, Record>>,
    /// Whether any is proven: before the first login a flood costs no look-ups.
    any_proven: AtomicBool,
}

#[derive(Clone, Copy, Debug)]
struct Record {
    /// When its next attempt is due; in the future under a penalty.
    due: Instant,
    /// Attempts through it in which it failed, and when it last did.
    failures: u32,
    failed: Option<Instant>,
    /// A worker node has logged in from there.
    is_proven: bool,
}

impl Record {
    fn new(now: Instant) -> Self {
        Self { due: now, failures: 0, failed: None, is_proven: false }
    }

    fn failures(&self, now: Instant) -> u32 {
        let is_recent = |failed| now.saturating_duration_since(failed) < FAILURE_MEMORY;
        if self.failed.is_some_and(is_recent) { self.failures } else { 0 }
    }

    fn postpone(&mut self, from: Instant, penalty: Duration, now: Instant) {
        self.due = (from + penalty).min(now + PENALTY_MAX);
    }
}

impl Sources {
    fn table(&self) -> MutexGuard<'_, HashMap<Source, Record>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn get(&self, source: Source) -> Option<Record> {
        self.table().get(&source).copied()
    }

    /// Changes the record of a source. At the limit the source that has been due for longest is forgotten, because it has no
    /// penalty to lose; one that is proven goes last.
    fn change(&self, source: Source, now: Instant, change: impl FnOnce(&mut Record)) {
        let mut table = self.table();
        if table.len() >= SOURCES_MAX && !table.contains_key(&source) {
            let first = table.iter().min_by_key(|(_, record)| (record.is_proven, record.due));
            if let Some(first) = first.map(|(source, _)| *source) {
                table.remove(&first);
            }
        }
        change(table.entry(source).or_insert_with(|| Record::new(now)));
    }

    /// Counts a login for attestation.
    pub(crate) fn logged_in(&self, source: Source, now: Instant) {
        self.change(source, now, |record| {
            // A source that waits gets older by waiting, or one that reconnects now and then would lose its turn.
            let credit = now.checked_sub(PENALTY_CREDIT).unwrap_or(now);
            record.postpone(record.due.max(credit), LOGIN_PENALTY, now);
        });
    }

    /// An attempt through the source begins: the others are next.
    pub(crate) fn attempt_begins(&self, source: Source, now: Instant) {
        self.change(source, now, |record| record.due = record.due.max(now));
    }

    /// The peer of this source has failed an attempt: it was silent, took long or left.
    pub(crate) fn attempt_failed(&self, source: Source, now: Instant) {
        self.change(source, now, |record| {
            let before = record.failures(now);
            record.failures = before.saturating_add(1);
            record.failed = Some(now);
            let penalty = FAILURE_PENALTY.saturating_mul(2_u32.saturating_pow(before));
            record.postpone(record.due.max(now), penalty, now);
        });
    }

    /// A worker node has logged in to the Kubernetes phase from there.
    pub(crate) fn proved(&self, source: Source, now: Instant) {
        self.any_proven.store(true, Ordering::Relaxed);
        self.change(source, now, |record| record.is_proven = true);
    }

    /// When the next attempt of the source is due; `unknown` if it is not remembered.
    pub(crate) fn due(&self, source: Source, unknown: Instant) -> Instant {
        self.get(source).map_or(unknown, |record| record.due)
    }

    /// Attempts that the source has failed lately.
    pub(crate) fn failures(&self, source: Source, now: Instant) -> u32 {
        self.get(source).map_or(0, |record| record.failures(now))
    }

    /// Whether a worker node has logged in from there, since this process started.
    pub(crate) fn is_proven(&self, source: Source) -> bool {
        self.any_proven.load(Ordering::Relaxed) && self.get(source).is_some_and(|record| record.is_proven)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(last: u32) -> Source {
        Source(Ipv6Addr::from_bits(u128::from(last) << 64).into())
    }

    #[tokio::test(start_paused = true)]
    async fn a_source_that_floods_comes_behind_one_that_logs_in_now_and_then() {
        let (sources, mut now) = (Sources::default(), Instant::now());
        let (flood, calm) = (source(1), source(2));
        for second in 0..100 {
            now += Duration::from_secs(1);
            for _ in 0..5 {
                sources.logged_in(flood, now);
            }
            if second % 5 == 0 {
                sources.logged_in(calm, now);
            }
            assert!(sources.due(calm, now) <= now + LOGIN_PENALTY, "{second}");
            assert!(sources.due(flood, now) <= now + PENALTY_MAX, "no penalty is longer");
        }
        assert!(sources.due(flood, now) > sources.due(calm, now) + PENALTY_MAX / 2);
        // It is over as soon as the flood is.
        assert!(sources.due(flood, now) <= now + PENALTY_MAX);
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_costs_more_each_time_and_is_forgotten() {
        let (sources, now, one) = (Sources::default(), Instant::now(), source(1));
        assert_eq!((sources.failures(one, now), sources.due(one, now)), (0, now));
        let mut at = now;
        for penalty in [FAILURE_PENALTY, FAILURE_PENALTY * 2, PENALTY_MAX, PENALTY_MAX] {
            sources.attempt_failed(one, at);
            assert_eq!(sources.due(one, at), at + penalty);
            at = sources.due(one, at);
        }
        assert_eq!(sources.failures(one, at), 4);
        assert_eq!(sources.failures(one, at + FAILURE_MEMORY), 0);
        sources.attempt_failed(one, at + FAILURE_MEMORY);
        assert_eq!(sources.failures(one, at + FAILURE_MEMORY), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn the_table_is_bounded_and_keeps_penalties_and_proofs() {
        let (sources, now) = (Sources::default(), Instant::now());
        sources.proved(source(0), now);
        sources.attempt_failed(source(1), now);
        let most = u32::try_from(SOURCES_MAX).unwrap();
        for other in 2..3 * most {
            sources.logged_in(source(other), now);
        }
        assert_eq!(sources.table().len(), SOURCES_MAX);
        assert!(sources.is_proven(source(0)) && !sources.is_proven(source(1)));
        assert_eq!(sources.failures(source(1), now), 1);
    }

    #[test]
    fn a_source_is_an_ipv4_address_or_an_ipv6_network() {
        let of = |address: &str| Source::of(address.parse().unwrap());
        assert_eq!(of("192.0.2.1:1"), of("[::ffff:192.0.2.1]:2"));
        assert_ne!(of("192.0.2.1:1"), of("192.0.2.2:1"));
        assert_eq!(of("[2001:db8:0:1::1]:1"), of("[2001:db8:0:1:ffff::2]:1"));
        assert_ne!(of("[2001:db8:0:1::1]:1"), of("[2001:db8:0:2::1]:1"));
    }
}
