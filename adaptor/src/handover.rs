//! The wait for what another adaptor of the node releases as it ends: a pod's lock, and the addresses of its inbounds.

use std::iter::repeat_n;
use std::time::Duration;

/// Pauses between tries, and how many: half a second in all. A process that ends, or is killed, releases all it has, but one
/// thing a little later than the other.
const PAUSE: Duration = Duration::from_millis(20);
const PAUSES: usize = 25;

/// The pause before each further try; none is left once it has to count as a failure.
pub(crate) fn pauses() -> impl Iterator<Item = Duration> {
    repeat_n(PAUSE, PAUSES)
}
