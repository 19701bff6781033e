//! What a link does to the packets of one direction.

use std::time::Duration;

/// Impairment of one direction; by default the direction is as good as the machine allows.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Impairment {
    /// Delay of each packet.
    pub delay: Duration,
    /// Bandwidth; `None`: no limit.
    pub rate: Option<Rate>,
    /// Probability of loss, from 0 to 1.
    pub loss: f64,
    /// Probability that a packet is held up, so that later ones overtake it.
    pub reorder: f64,
    /// Additional delay of a packet that is held up.
    pub reorder_delay: Duration,
    /// Probability that a packet arrives twice.
    pub duplicate: f64,
    /// All packets are dropped silently.
    pub blackhole: bool,
}

/// Bandwidth of a direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Bytes of IP packets per second; at least 1.
    pub bytes_per_second: u32,
    /// Length of the queue in bytes; a packet that does not fit is dropped.
    pub queue: u32,
}

impl Impairment {
    /// A delay in each direction, so that the round trip takes `round_trip`.
    #[must_use]
    pub fn round_trip(round_trip: Duration) -> Self {
        Self { delay: round_trip / 2, ..Self::default() }
    }

    /// All packets are dropped.
    #[must_use]
    pub fn blackhole() -> Self {
        Self { blackhole: true, ..Self::default() }
    }

    /// Whether packets are treated one by one. If not, the kernel's bursts stay whole.
    pub(super) fn treats_packets_singly(&self) -> bool {
        self.rate.is_some() || [self.loss, self.reorder, self.duplicate].iter().any(|chance| *chance > 0.0)
    }
}
