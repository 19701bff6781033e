//! Limits on connections: an admission queue, and eviction.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use secure_comms_protocol::limits::ADMISSION_PACE;
use tokio::time::{Instant, sleep_until};

use crate::connection::Connection;
use crate::os::log_limits::EVICTED;

/// The reason that an evicted connection receives.
const EVICTION: &str = "evicted: connection limit reached";

/// Limits the connections of one kind. A newcomer evicts another connection instead of being refused, so a flood slows an
/// honest peer but can't lock it out.
#[derive(Debug)]
pub(crate) struct ConnectionLimiter {
    limit: usize,
    held: Mutex<Vec<Connection>>,
    /// The time of the last admission by [`Self::admit_fifo`]; the lock is the queue.
    last_admission: tokio::sync::Mutex<Option<Instant>>,
}

/// A connection's place in a [`ConnectionLimiter`], given back on drop.
#[derive(Debug)]
pub(crate) struct Place {
    limiter: Arc<ConnectionLimiter>,
    id: u64,
}

/// The source that a connection counts for: a host's IPv4 address, or its IPv6 /64, in which a host can use any address.
fn source(address: SocketAddr) -> IpAddr {
    match address.ip().to_canonical() {
        IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() >> 64 << 64).into(),
        ip => ip,
    }
}

impl ConnectionLimiter {
    /// Admits at most `limit` connections at a time.
    pub(crate) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, held: Mutex::default(), last_admission: tokio::sync::Mutex::default() })
    }

    fn held(&self) -> MutexGuard<'_, Vec<Connection>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a place, first come, first served. While all places are taken, admissions are [`ADMISSION_PACE`] apart:
    /// without that pace the connections of a flood would evict each other before any handshake can end.
    ///
    /// Cancellation: a dropped future leaves the queue.
    pub(crate) async fn admit_fifo(self: &Arc<Self>, connection: Connection) -> Place {
        let mut last = self.last_admission.lock().await;
        if let Some(last) = *last
            && self.held().len() >= self.limit
        {
            sleep_until(last + ADMISSION_PACE).await;
        }
        *last = Some(Instant::now());
        self.admit_evicting(connection, None)
    }

    /// Takes a place at once. If all are taken, evicts a random connection of the source that has the most, so that a
    /// host with one connection survives a host with thousands. Never evicts the connection `exempt`.
    pub(crate) fn admit_evicting(self: &Arc<Self>, connection: Connection, exempt: Option<u64>) -> Place {
        let id = connection.id;
        let mut held = self.held();
        if held.len() >= self.limit
            && let Some(index) = eviction_candidate(&held, exempt)
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
}

/// The index of a random connection of the sources that have the most.
fn eviction_candidate(held: &[Connection], exempt: Option<u64>) -> Option<usize> {
    let mut by_source: HashMap<IpAddr, Vec<usize>> = HashMap::new();
    for (index, other) in held.iter().enumerate().filter(|(_, other)| Some(other.id) != exempt) {
        by_source.entry(source(other.address)).or_default().push(index);
    }
    let most = by_source.values().map(Vec::len).max()?;
    let candidates: Vec<usize> =
        by_source.into_values().filter(|indices| indices.len() == most).flatten().collect();
    candidates.get(rand::random_range(0..candidates.len())).copied()
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

    #[test]
    fn a_lone_source_survives_a_source_with_many() {
        for (alone, crowd) in [
            ("192.0.2.1:1", "192.0.2.2:1"),
            ("[::ffff:192.0.2.1]:1", "[::ffff:192.0.2.2]:1"),
            ("[2001:db8:0:1::1]:1", "[2001:db8:0:2::1]:1"),
        ] {
            let limiter = ConnectionLimiter::new(4);
            let mut places = vec![limiter.admit_evicting(connection(0, alone), None)];
            places.extend((1..100).map(|id| limiter.admit_evicting(connection(id, crowd), None)));
            let held: Vec<u64> = limiter.held().iter().map(|held| held.id).collect();
            assert!(held.len() == 4 && held.contains(&0), "{alone}: {held:?}");
        }
    }

    #[test]
    fn an_ipv6_network_is_one_source_and_the_exempt_stays() {
        let limiter = ConnectionLimiter::new(3);
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
        let limiter = ConnectionLimiter::new(2);
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
