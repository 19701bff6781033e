//! The fate of each packet of one direction, without I/O: the same for the same seed and the same packets.

use std::time::{Duration, Instant};

use rand::rngs::Xoshiro256PlusPlus;
use rand::{RngExt as _, SeedableRng as _};

use super::{Impairment, Rate};

/// One direction.
#[derive(Debug)]
pub(super) struct Lane {
    random: Xoshiro256PlusPlus,
    /// Time at which the last accepted packet has left, at the rate that applied then.
    free_at: Instant,
}

/// Decision about a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// Dropped by the blackhole.
    Swallowed,
    /// Dropped at random.
    Lost,
    /// Dropped because the queue was full.
    NoRoom,
    /// Arrives.
    Arrives {
        /// Time of its arrival.
        at: Instant,
        /// It was held up.
        late: bool,
        /// It arrives twice.
        twice: bool,
    },
}

impl Lane {
    pub(super) fn new(seed: u64) -> Self {
        Self { random: Xoshiro256PlusPlus::seed_from_u64(seed), free_at: Instant::now() }
    }

    /// Decides about the next packet, of `bytes` bytes.
    pub(super) fn decide(&mut self, impairment: &Impairment, now: Instant, bytes: usize) -> Fate {
        // Drawn for every packet, whatever the impairment: so its fate depends on its number, not on earlier settings.
        let [lost, late, twice] = [impairment.loss, impairment.reorder, impairment.duplicate]
            .map(|chance| self.random.random::<f64>() < chance);
        if impairment.blackhole {
            return Fate::Swallowed;
        }
        if lost {
            return Fate::Lost;
        }
        let Some(leaves) = self.leaves(impairment.rate, now, bytes) else { return Fate::NoRoom };
        let held_up = if late { impairment.reorder_delay } else { Duration::ZERO };
        Fate::Arrives { at: leaves + impairment.delay + held_up, late, twice }
    }

    /// Time at which its last byte has left, if the queue has room for it.
    fn leaves(&mut self, rate: Option<Rate>, now: Instant, bytes: usize) -> Option<Instant> {
        let Some(rate) = rate else { return Some(now) };
        let takes =
            |bytes: usize| Duration::from_secs_f64(bytes as f64 / f64::from(rate.bytes_per_second.max(1)));
        let waits = self.free_at.saturating_duration_since(now);
        let queue = usize::try_from(rate.queue).unwrap_or(usize::MAX);
        // An empty queue accepts any packet; otherwise a short queue would block all traffic.
        if !waits.is_zero() && waits + takes(bytes) > takes(queue) {
            return None;
        }
        self.free_at = now + waits + takes(bytes);
        Some(self.free_at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BAD: Impairment = Impairment {
        delay: Duration::from_millis(10),
        rate: None,
        loss: 0.2,
        reorder: 0.2,
        reorder_delay: Duration::from_millis(5),
        duplicate: 0.2,
        blackhole: false,
    };

    fn fates(seed: u64, impairment: &Impairment, now: Instant) -> Vec<Fate> {
        let mut lane = Lane::new(seed);
        (0..1000).map(|_| lane.decide(impairment, now, 1500)).collect()
    }

    #[test]
    fn a_seed_decides_the_fate_of_each_packet() {
        let now = Instant::now();
        assert_eq!(fates(7, &BAD, now), fates(7, &BAD, now));
        assert_ne!(fates(7, &BAD, now), fates(8, &BAD, now));
    }

    #[test]
    fn the_fate_of_a_packet_does_not_depend_on_earlier_settings() {
        let now = Instant::now();
        let mut lane = Lane::new(7);
        for _ in 0..500 {
            assert_eq!(lane.decide(&Impairment::blackhole(), now, 1500), Fate::Swallowed);
        }
        let rest: Vec<_> = (0..500).map(|_| lane.decide(&BAD, now, 1500)).collect();
        assert_eq!(rest, fates(7, &BAD, now)[500..]);
    }

    #[test]
    fn loss_reordering_and_duplication_have_their_probability() {
        let now = Instant::now();
        let fates = fates(1, &BAD, now);
        let count = |wanted: fn(&Fate) -> bool| fates.iter().filter(|fate| wanted(fate)).count();
        assert!((150..250).contains(&count(|fate| *fate == Fate::Lost)));
        // Of the 800 that arrive.
        assert!((110..210).contains(&count(|fate| matches!(fate, Fate::Arrives { late: true, .. }))));
        assert!((110..210).contains(&count(|fate| matches!(fate, Fate::Arrives { twice: true, .. }))));
        for fate in &fates {
            if let Fate::Arrives { at, late, .. } = fate {
                assert_eq!(*at - now, Duration::from_millis(if *late { 15 } else { 10 }));
            }
        }
    }

    #[test]
    fn packets_leave_at_the_rate_and_excess_ones_are_dropped() {
        let now = Instant::now();
        let rate = Some(Rate { bytes_per_second: 1_000_000, queue: 10_000 });
        let narrow = Impairment { rate, ..Impairment::default() };
        let mut lane = Lane::new(1);
        lane.free_at = now;
        for number in 1..=10 {
            let at = now + Duration::from_millis(number);
            assert_eq!(lane.decide(&narrow, now, 1000), Fate::Arrives { at, late: false, twice: false });
        }
        assert_eq!(lane.decide(&narrow, now, 1000), Fate::NoRoom);
        let later = now + Duration::from_millis(1);
        assert!(matches!(lane.decide(&narrow, later, 1000), Fate::Arrives { .. }));
    }

    #[test]
    fn an_empty_queue_accepts_a_packet_longer_than_itself() {
        let rate = Some(Rate { bytes_per_second: 1_000_000, queue: 10 });
        let mut lane = Lane::new(1);
        let impairment = Impairment { rate, ..Impairment::default() };
        assert!(matches!(lane.decide(&impairment, Instant::now(), 1500), Fate::Arrives { .. }));
    }
}
