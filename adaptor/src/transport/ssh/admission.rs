//! Bounds the key exchanges that are under way at a time, and decides which one is next.
//!
//! A node that restarts has hundreds of pods that start at once. Without a bound, each step of a pod waits for one step of
//! every other, and all of them are up at the end. With one, those that came first are up first. The bound is soft: an
//! exchange that waits for its agent, and one that has waited for 3 s, goes on without a place.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::{Instant, timeout};

/// Key exchanges at a time: two threads compute, and the others wait for their agents.
const PLACES: usize = 8;
/// How long a key exchange keeps its place. One that takes longer waits for its agent and does not compute, so it goes on
/// without a place: an agent that never answers holds up nothing for longer.
const TERM: Duration = Duration::from_millis(25);
/// If its timer is later than this, our threads are behind: it may have waited for them, and one more would add to it.
const LATE: Duration = Duration::from_millis(5);
/// The most terms of such a key exchange.
const TERMS: usize = 4;
/// The longest wait for a place. After it, a key exchange begins without one: the agent ends a connection that does not
/// authenticate within 10 s.
const PATIENCE: Duration = Duration::from_secs(3);
/// How many with precedence are admitted before one without, if both wait.
const IN_A_ROW: usize = 4;

/// Which key exchange is admitted first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Precedence {
    /// Of a pod whose VM has its keys: a start that is almost over, or a lane whose streams wait.
    Kubernetes,
    /// Of a pod that only begins.
    Attestation,
}

/// The places. A clone has the same.
#[derive(Clone, Debug, Default)]
pub(crate) struct Admission(Arc<Mutex<Queue>>);

#[derive(Debug, Default)]
struct Queue {
    taken: usize,
    /// By arrival. A sender whose receiver is gone is one that was cancelled.
    kubernetes: VecDeque<oneshot::Sender<Place>>,
    attestation: VecDeque<oneshot::Sender<Place>>,
    /// Those with precedence that were admitted since one without.
    in_a_row: usize,
}

/// A place. Dropping it admits the next.
#[derive(Debug)]
pub(crate) struct Place(Option<Admission>);

impl Admission {
    /// Waits for a place, for 3 s at most.
    ///
    /// # Cancellation
    /// Dropping the future gives the position in the queue up.
    pub(super) async fn enter(&self, precedence: Precedence) -> Place {
        let waiting = {
            let mut queue = self.lock();
            if queue.taken < PLACES {
                queue.taken += 1;
                return Place(Some(self.clone()));
            }
            let (admit, admitted) = oneshot::channel();
            match precedence {
                Precedence::Kubernetes => queue.kubernetes.push_back(admit),
                Precedence::Attestation => queue.attestation.push_back(admit),
            }
            admitted
        };
        match timeout(PATIENCE, waiting).await {
            Ok(Ok(place)) => place,
            Ok(Err(_)) | Err(_) => Place(None),
        }
    }

    /// Hands a place that is free to the next, or keeps it free.
    fn admit_next(&self) {
        loop {
            let next = {
                let mut queue = self.lock();
                let next = queue.next();
                if next.is_none() {
                    queue.taken = queue.taken.saturating_sub(1);
                }
                next
            };
            let Some(next) = next else { return };
            match next.send(Place(Some(self.clone()))) {
                Ok(()) => return,
                // It was cancelled. The place is not dropped here: that would recurse.
                Err(mut place) => drop(place.0.take()),
            }
        }
    }

    /// Never poisoned: nothing panics under the lock.
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queue {
    fn next(&mut self) -> Option<oneshot::Sender<Place>> {
        // Those that were cancelled or wait no longer count for nothing.
        for queue in [&mut self.kubernetes, &mut self.attestation] {
            while queue.front().is_some_and(oneshot::Sender::is_closed) {
                queue.pop_front();
            }
        }
        let may_precede = self.in_a_row < IN_A_ROW || self.attestation.is_empty();
        if may_precede && let Some(next) = self.kubernetes.pop_front() {
            self.in_a_row = self.in_a_row.saturating_add(1);
            return Some(next);
        }
        self.in_a_row = 0;
        self.attestation.pop_front()
    }
}

impl Place {
    /// Runs a key exchange in this place. It keeps the place for 25 ms at most, or for four times as
    /// long while our threads are behind.
    ///
    /// # Cancellation
    /// Dropping the future gives the place back.
    pub(super) async fn lend<T>(self, exchange: impl Future<Output = T>) -> T {
        let mut exchange = Box::pin(exchange);
        for _ in 0..TERMS {
            let begun = Instant::now();
            match timeout(TERM, exchange.as_mut()).await {
                Ok(done) => return done,
                Err(_) if begun.elapsed() < TERM + LATE => break,
                Err(_) => {}
            }
        }
        drop(self);
        exchange.await
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(admission) = self.0.take() {
            admission.admit_next();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use tokio::task::{JoinHandle, yield_now};
    use tokio::time::advance;

    use super::*;

    /// All places of an admission.
    async fn all(admission: &Admission) -> Vec<Place> {
        let mut places = Vec::new();
        for _ in 0..PLACES {
            places.push(admission.enter(Precedence::Attestation).await);
        }
        places
    }

    /// One that waits behind those that came before.
    async fn waiting(admission: &Admission, precedence: Precedence) -> JoinHandle<Place> {
        let (queued, other) = (admission.lock().len(), admission.clone());
        let waiting = tokio::spawn(async move { other.enter(precedence).await });
        while admission.lock().len() == queued {
            yield_now().await;
        }
        waiting
    }

    impl Queue {
        fn len(&self) -> usize {
            self.kubernetes.len() + self.attestation.len()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn those_that_wait_are_admitted_by_arrival() {
        let admission = Admission::default();
        let mut places = all(&admission).await;
        let first = waiting(&admission, Precedence::Attestation).await;
        let second = waiting(&admission, Precedence::Attestation).await;
        places.pop();
        let first = first.await.unwrap();
        assert!(first.0.is_some() && !second.is_finished());
        drop(first);
        assert!(second.await.unwrap().0.is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_that_has_its_keys_comes_first() {
        let admission = Admission::default();
        let mut places = all(&admission).await;
        let begins = waiting(&admission, Precedence::Attestation).await;
        let almost_up = waiting(&admission, Precedence::Kubernetes).await;
        places.pop();
        let almost_up = almost_up.await.unwrap();
        assert!(!begins.is_finished());
        drop(almost_up);
        assert!(begins.await.unwrap().0.is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn precedence_starves_no_pod_that_begins() {
        let admission = Admission::default();
        let mut places = all(&admission).await;
        let begins = waiting(&admission, Precedence::Attestation).await;
        let mut others = Vec::new();
        for _ in 0..=IN_A_ROW {
            others.push(waiting(&admission, Precedence::Kubernetes).await);
        }
        let mut admitted = Vec::new();
        for other in others.drain(..IN_A_ROW) {
            places.pop();
            admitted.push(other.await.unwrap());
        }
        places.pop();
        assert!(begins.await.unwrap().0.is_some() && !others[0].is_finished());
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_is_cancelled_gives_its_place_to_the_next() {
        let admission = Admission::default();
        let mut places = all(&admission).await;
        let cancelled = waiting(&admission, Precedence::Kubernetes).await;
        let next = waiting(&admission, Precedence::Kubernetes).await;
        cancelled.abort();
        assert!(cancelled.await.unwrap_err().is_cancelled());
        places.pop();
        assert!(next.await.unwrap().0.is_some());
        drop(places);
        assert_eq!(admission.lock().taken, 0, "all places are free");
    }

    #[tokio::test(start_paused = true)]
    async fn a_place_that_was_handed_over_in_vain_is_free_again() {
        let admission = Admission::default();
        let mut places = all(&admission).await;
        let mut given_up = Box::pin(admission.enter(Precedence::Kubernetes));
        assert!(timeout(Duration::ZERO, given_up.as_mut()).await.is_err());
        places.pop();
        // It has its place, and was not polled since.
        drop(given_up);
        assert_eq!(admission.lock().taken, PLACES - 1);
    }

    #[tokio::test(start_paused = true)]
    async fn silent_agents_hold_up_no_other_for_long() {
        let admission = Admission::default();
        let stuck: Vec<_> = all(&admission)
            .await
            .into_iter()
            .map(|place| tokio::spawn(async move { place.lend(pending::<()>()).await }))
            .collect();
        let begun = Instant::now();
        let place = admission.enter(Precedence::Attestation).await;
        assert!(place.0.is_some() && begun.elapsed() <= TERM * 2);
        assert!(stuck.iter().all(|exchange| !exchange.is_finished()), "they go on without a place");
        for exchange in stuck {
            exchange.abort();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn fewer_are_admitted_while_our_threads_are_behind() {
        let admission = Admission::default();
        let mut places = all(&admission).await;
        let mut exchange = Box::pin(places.pop().unwrap().lend(pending::<()>()));
        for _ in 0..TERMS {
            assert_eq!(admission.lock().taken, PLACES);
            assert!(timeout(Duration::ZERO, exchange.as_mut()).await.is_err());
            advance(TERM + LATE).await;
        }
        assert!(timeout(Duration::ZERO, exchange.as_mut()).await.is_err());
        assert_eq!(admission.lock().taken, PLACES - 1, "but not for longer");
    }

    #[tokio::test(start_paused = true)]
    async fn an_exchange_that_ends_early_gives_its_place_back() {
        let admission = Admission::default();
        let mut places = all(&admission).await;
        let place = places.pop().unwrap();
        assert_eq!(place.lend(async { 7 }).await, 7);
        assert_eq!(admission.lock().taken, PLACES - 1);
        let cancelled = places.pop().unwrap().lend(pending::<()>());
        drop(cancelled);
        assert_eq!(admission.lock().taken, PLACES - 2);
    }

    #[tokio::test(start_paused = true)]
    async fn the_wait_for_a_place_has_an_end() {
        let admission = Admission::default();
        let _places = all(&admission).await;
        let begun = Instant::now();
        assert!(admission.enter(Precedence::Attestation).await.0.is_none());
        assert_eq!(begun.elapsed(), PATIENCE);
    }
}
