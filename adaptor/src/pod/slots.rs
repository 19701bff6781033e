//! Bounds the addresses of a pod that are connected to at a time.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Addresses that are connected to, or attest, at a time. Each takes up to 640 KiB for the streams of a stranger
/// (`CreditLimits::ATTESTATION`); a VM has two addresses as a rule.
const SLOTS: usize = 8;

/// The slots of one pod. Those that wait get one in the order in which they came.
#[derive(Clone, Debug)]
pub(super) struct Slots {
    free: Arc<Semaphore>,
    waiting: Arc<AtomicUsize>,
}

/// A slot, until it is dropped.
#[derive(Debug)]
pub(super) struct Slot {
    // The semaphore is never closed, so that a permit is always there.
    _permit: Option<OwnedSemaphorePermit>,
}

impl Default for Slots {
    fn default() -> Self {
        Self { free: Arc::new(Semaphore::new(SLOTS)), waiting: Arc::default() }
    }
}

impl Slots {
    /// Waits for a slot. Dropping the future gives the place in the queue up.
    pub(super) async fn take(&self) -> Slot {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let _waiting = Waiting(&self.waiting);
        Slot { _permit: Arc::clone(&self.free).acquire_owned().await.ok() }
    }

    /// Whether an address waits for a slot.
    pub(super) fn is_crowded(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }
}

struct Waiting<'a>(&'a AtomicUsize);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use tokio::task::yield_now;

    use super::*;

    #[tokio::test]
    async fn one_more_than_there_are_slots_waits_for_one() {
        let slots = Slots::default();
        let mut taken = Vec::new();
        for _ in 0..SLOTS {
            taken.push(slots.take().await);
        }
        assert!(!slots.is_crowded());
        let ninth = tokio::spawn({
            let slots = slots.clone();
            async move { slots.take().await }
        });
        while !slots.is_crowded() {
            yield_now().await;
        }
        let given_up = tokio::spawn({
            let slots = slots.clone();
            async move { slots.take().await }
        });
        yield_now().await;
        given_up.abort();
        assert!(given_up.await.unwrap_err().is_cancelled());
        assert!(slots.is_crowded() && !ninth.is_finished());
        taken.pop();
        let _ninth = ninth.await.unwrap();
        assert!(!slots.is_crowded());
    }
}
