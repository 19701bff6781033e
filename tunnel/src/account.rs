//! What the streams of one peer hold of the process's memory, and what they have moved.
//!
//! Each stream may always have its initial window in flight. All that exceeds that, growth of windows and what an SSH
//! session reads ahead, is taken from one [`MemoryBudget`] of the process, and given back. At the limit it is refused: streams
//! go on with what they have. A peer may take as long as it holds less than what is free, so that `n` peers that want all
//! they can get have `1 / (n + 1)` of the budget each, and the same share is left for the next one (dynamic thresholds,
//! A. Choudhury and E. Hahne, 1998). One that holds more than twice what is free gives back as it is used.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

/// The memory of all peers' windows and read-ahead beyond the initial windows, in bytes. A clone is the same.
#[derive(Clone, Debug)]
pub struct MemoryBudget(Arc<Budget>);

#[derive(Debug)]
struct Budget {
    total: usize,
    used: AtomicUsize,
    moved: Moved,
}

/// Bytes of streams.
#[derive(Debug, Default)]
struct Moved {
    sent: AtomicU64,
    received: AtomicU64,
}

impl Moved {
    fn now(&self) -> Traffic {
        Traffic { sent: self.sent.load(Relaxed), received: self.received.load(Relaxed) }
    }
}

/// Bytes of streams, without what the transport adds, and without what was sent again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// To the peer.
    pub sent: u64,
    /// From the peer.
    pub received: u64,
}

impl MemoryBudget {
    /// A budget of this many bytes.
    pub fn new(total: usize) -> Self {
        Self(Arc::new(Budget { total, used: AtomicUsize::new(0), moved: Moved::default() }))
    }

    /// The account of one more peer.
    pub fn account(&self) -> Account {
        Account(Arc::new(Peer { budget: self.clone(), held: AtomicUsize::new(0), moved: Moved::default() }))
    }

    /// Bytes that all peers have taken.
    pub fn used(&self) -> usize {
        self.0.used.load(Relaxed)
    }

    /// What the streams of all peers have moved, also of those that are gone.
    pub fn traffic(&self) -> Traffic {
        self.0.moved.now()
    }

    fn free(&self) -> usize {
        self.0.total.saturating_sub(self.used())
    }
}

/// One peer's account. A clone is the same.
#[derive(Clone, Debug)]
pub struct Account(Arc<Peer>);

#[derive(Debug)]
struct Peer {
    budget: MemoryBudget,
    held: AtomicUsize,
    moved: Moved,
}

impl Account {
    /// An account of a budget without limit, where a process has one peer or other limits.
    pub fn unlimited() -> Self {
        // Half of it is more than any peer can want.
        MemoryBudget::new(usize::MAX).account()
    }

    /// Takes as much of `wanted` as the peer may have, in bytes.
    #[must_use = "what is taken must be given back"]
    pub fn take(&self, wanted: usize) -> usize {
        if wanted == 0 {
            return 0;
        }
        let budget = &self.0.budget.0;
        let mut taken = 0;
        let took = budget.used.fetch_update(Relaxed, Relaxed, |used| {
            let free = budget.total.saturating_sub(used);
            taken = wanted.min(free.saturating_sub(self.held()) / 2);
            (taken > 0).then(|| used + taken)
        });
        if took.is_err() {
            return 0;
        }
        self.0.held.fetch_add(taken, Relaxed);
        taken
    }

    /// Gives back what was taken, in bytes.
    pub fn give_back(&self, bytes: usize) {
        if bytes > 0 {
            self.0.held.fetch_sub(bytes, Relaxed);
            self.0.budget.0.used.fetch_sub(bytes, Relaxed);
        }
    }

    /// Takes `now` in place of `before`, whether there is room or not: for bytes that have arrived.
    pub(crate) fn charge(&self, now: usize, before: usize) {
        let budget = &self.0.budget.0;
        if now > before {
            self.0.held.fetch_add(now - before, Relaxed);
            budget.used.fetch_add(now - before, Relaxed);
        } else {
            self.give_back(before - now);
        }
    }

    /// Whether the peer may take nothing now.
    pub(crate) fn is_full(&self) -> bool {
        self.held() >= self.0.budget.free()
    }

    /// Bytes that the peer has taken.
    pub fn held(&self) -> usize {
        self.0.held.load(Relaxed)
    }

    /// Whether others want what this peer has: it holds more than twice what is free.
    pub fn is_over(&self) -> bool {
        self.held() / 2 > self.0.budget.free()
    }

    /// What the peer's streams have moved.
    pub fn traffic(&self) -> Traffic {
        self.0.moved.now()
    }

    pub(crate) fn sent(&self, bytes: usize) {
        for moved in [&self.0.moved, &self.0.budget.0.moved] {
            moved.sent.fetch_add(bytes as u64, Relaxed);
        }
    }

    pub(crate) fn received(&self, bytes: usize) {
        for moved in [&self.0.moved, &self.0.budget.0.moved] {
            moved.received.fetch_add(bytes as u64, Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn one_peer_has_half_and_leaves_the_other_half() {
        let budget = MemoryBudget::new(1000);
        let account = budget.account();
        assert_eq!(account.take(10_000), 500);
        assert_eq!(account.take(10_000), 0);
        assert!(!account.is_over());
        let second = budget.account();
        assert_eq!(second.take(10_000), 250);
        account.give_back(500);
        second.give_back(250);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn peers_that_want_everything_end_with_equal_shares() {
        const TOTAL: usize = 1 << 20;
        let budget = MemoryBudget::new(TOTAL);
        let peers: Vec<Account> = (0..9).map(|_| budget.account()).collect();
        // The first ones come long before the others.
        for number in 1..=peers.len() {
            for _ in 0..40 {
                for peer in peers.iter().take(number) {
                    if peer.is_over() {
                        peer.give_back(peer.held() / 2);
                    } else {
                        let _ = peer.take(4096);
                    }
                }
            }
        }
        let held: Vec<usize> = peers.iter().map(Account::held).collect();
        let (least, most) = (*held.iter().min().unwrap(), *held.iter().max().unwrap());
        assert!(most <= 3 * least.max(1), "{held:?}");
        assert!(budget.free() >= TOTAL / 20, "{held:?}");
    }

    proptest! {
        #[test]
        fn the_budget_is_never_exceeded_and_all_of_it_comes_back(
            total in 0_usize..10_000,
            steps in prop::collection::vec((0_usize..5, 0_usize..4_000, any::<bool>()), 0..200),
        ) {
            let budget = MemoryBudget::new(total);
            let peers: Vec<Account> = (0..5).map(|_| budget.account()).collect();
            for (peer, bytes, takes) in steps {
                let peer = peers.get(peer).unwrap();
                if takes {
                    let before = (peer.held(), budget.free());
                    let taken = peer.take(bytes);
                    prop_assert!(taken <= bytes);
                    // It holds no more than what is free, unless it did before.
                    prop_assert!(taken == 0 || peer.held() <= budget.free());
                    // A pod that holds less than what is free gets something.
                    prop_assert!(taken > 0 || bytes == 0 || before.0 + 2 > before.1);
                } else {
                    peer.give_back(bytes.min(peer.held()));
                }
                prop_assert!(budget.used() <= total);
                prop_assert_eq!(budget.used(), peers.iter().map(Account::held).sum::<usize>());
            }
            for peer in &peers {
                peer.give_back(peer.held());
            }
            prop_assert_eq!(budget.used(), 0);
        }
    }

    #[test]
    fn threads_that_race_never_exceed_the_budget() {
        let budget = MemoryBudget::new(1 << 16);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                let budget = budget.clone();
                scope.spawn(move || {
                    let account = budget.account();
                    for round in 0..20_000_usize {
                        let taken = account.take(round % 5000);
                        assert!(budget.used() <= 1 << 16);
                        if round % 3 == 0 {
                            account.give_back(account.held());
                        }
                        assert!(taken <= round % 5000);
                    }
                    account.give_back(account.held());
                });
            }
        });
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn traffic_is_counted_for_the_peer_and_for_all() {
        let budget = MemoryBudget::new(0);
        let (a, b) = (budget.account(), budget.account());
        a.sent(3);
        b.sent(4);
        b.received(5);
        assert_eq!(a.traffic(), Traffic { sent: 3, received: 0 });
        drop((a, b));
        assert_eq!(budget.traffic(), Traffic { sent: 7, received: 5 });
    }
}
