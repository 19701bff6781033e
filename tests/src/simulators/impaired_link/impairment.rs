//! What a line does to the packets of one direction.

use std::time::Duration;

/// How one direction is; by default it is as good as the machine allows.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Impairment {
    /// How long each packet is under way.
    pub delay: Duration,
    /// How much goes through; `None`: all there is.
    pub rate: Option<Rate>,
    /// The chance of a packet to get lost, from 0 to 1.
    pub loss: f64,
    /// The chance of a packet to be held up, so that later ones overtake it.
    pub reorder: f64,
    /// How much longer it then takes.
    pub reorder_delay: Duration,
    /// The chance of a packet to arrive twice.
    pub duplicate: f64,
    /// Nothing goes through, and nobody is told.
    pub blackhole: bool,
}

/// How much goes through a direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Bytes of IP packets a second; at least 1.
    pub bytes_per_second: u32,
    /// Bytes that may wait for their turn; what does not fit is dropped.
    pub queue: u32,
}

impl Impairment {
    /// Both directions of it make a round trip of `round_trip`.
    #[must_use]
    pub fn round_trip(round_trip: Duration) -> Self {
        Self { delay: round_trip / 2, ..Self::default() }
    }

    /// Nothing goes through.
    #[must_use]
    pub fn blackhole() -> Self {
        Self { blackhole: true, ..Self::default() }
    }

    /// Whether each packet that would be on the wire has a fate of its own. Where not, the kernel's bursts stay whole.
    pub(super) fn tells_packets_apart(&self) -> bool {
        self.rate.is_some() || [self.loss, self.reorder, self.duplicate].iter().any(|chance| *chance > 0.0)
    }
}
