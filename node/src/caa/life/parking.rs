//! Dials that are kept open without use: their VM is gone, and closed they would come again.

use std::collections::VecDeque;

use tokio::task::{AbortHandle, JoinSet};

use super::world::Dial;

/// Dials that are parked at the same time. One more closes the oldest: it comes again.
const PARKED_MAX: usize = 256;

/// The parked dials. Dropping it closes them.
#[derive(Debug, Default)]
pub(super) struct Parking {
    watches: JoinSet<()>,
    order: VecDeque<AbortHandle>,
}

impl Parking {
    /// Keeps a dial open until the other end closes it.
    pub(super) fn park<D: Dial>(&mut self, mut dial: D) {
        while self.watches.try_join_next().is_some() {}
        self.order.retain(|watch| !watch.is_finished());
        if self.order.len() >= PARKED_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            oldest.abort();
        }
        self.order.push_back(self.watches.spawn(async move { drop(dial.closed().await) }));
    }
}
