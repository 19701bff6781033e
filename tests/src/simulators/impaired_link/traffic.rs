//! Counters of the packets of one direction.

use std::sync::atomic::{AtomicU64, Ordering};

/// Packets of one direction so far. A burst that stayed whole counts as one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Arrived; a duplicate counts again.
    pub passed: u64,
    /// Bytes of the packets that arrived, as IP packets.
    pub bytes: u64,
    /// Dropped at random.
    pub lost: u64,
    /// Dropped because the queue of the rate was full.
    pub no_room: u64,
    /// Dropped by a blackhole.
    pub swallowed: u64,
    /// Held up, so that others overtook them.
    pub late: u64,
    /// Sent twice.
    pub twice: u64,
    /// Refused by the receiving end, whose device is down.
    pub refused: u64,
}

/// Live counters behind [`Traffic`].
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) passed: Counter,
    pub(super) bytes: Counter,
    pub(super) lost: Counter,
    pub(super) no_room: Counter,
    pub(super) swallowed: Counter,
    pub(super) late: Counter,
    pub(super) twice: Counter,
    pub(super) refused: Counter,
}

/// A counter that one thread increments and any may read.
#[derive(Debug, Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    pub(super) fn add(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    fn read(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Counters {
    pub(super) fn read(&self) -> Traffic {
        Traffic {
            passed: self.passed.read(),
            bytes: self.bytes.read(),
            lost: self.lost.read(),
            no_room: self.no_room.read(),
            swallowed: self.swallowed.read(),
            late: self.late.read(),
            twice: self.twice.read(),
            refused: self.refused.read(),
        }
    }
}
