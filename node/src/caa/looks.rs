//! Looks at what others change, each shared by all that asked before it began.

use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::{Instant, sleep_until};

/// Answers each call by a look that begins after the call: what an earlier one saw may have changed. Any process of the node
/// can cause calls, so those that come during a look share the next one, and looks have a pause between them.
#[derive(Debug)]
pub(super) struct Looks<T> {
    pause: Duration,
    /// How many have begun.
    begun: AtomicU64,
    /// Held during a look.
    state: Mutex<State<T>>,
}

#[derive(Debug)]
struct State<T> {
    /// When the next one may begin.
    next: Option<Instant>,
    /// The number of the last one that ended, and its answer.
    last: Option<(u64, T)>,
}

impl<T: Clone> Looks<T> {
    /// `pause`: from the end of a look to the next one.
    pub(super) fn new(pause: Duration) -> Self {
        let state = State { next: None, last: None };
        Self { pause, begun: AtomicU64::new(0), state: Mutex::new(state) }
    }

    /// The answer of a look that began after this call: a failure, too, is the answer for all that shared the look.
    ///
    /// A call that is dropped during its look gives the look up; the next call makes another one, after the pause.
    pub(super) async fn after_now<F: Future<Output = T>>(&self, look: impl FnOnce() -> F) -> T {
        let called = self.begun.load(Ordering::SeqCst);
        let mut state = self.state.lock().await;
        if let Some((number, answer)) = &state.last
            && *number > called
        {
            return answer.clone();
        }
        if let Some(next) = state.next {
            sleep_until(next).await;
        }
        let number = self.begun.fetch_add(1, Ordering::SeqCst) + 1;
        // For a look that is given up.
        state.next = Some(Instant::now() + self.pause);
        let answer = look().await;
        state.next = Some(Instant::now() + self.pause);
        state.last = Some((number, answer.clone()));
        answer
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::sync::Semaphore;
    use tokio::task::{JoinSet, yield_now};

    use super::*;

    const PAUSE: Duration = Duration::from_millis(20);

    /// Looks that take until the test lets them end. Each answers with its number, or fails with it.
    #[derive(Clone)]
    struct World {
        looks: Arc<Looks<Result<u64, u64>>>,
        ends: Arc<Semaphore>,
        begun: Arc<AtomicU64>,
        fails: bool,
    }

    impl World {
        fn new(fails: bool) -> Self {
            Self {
                looks: Arc::new(Looks::new(PAUSE)),
                ends: Arc::new(Semaphore::new(0)),
                begun: Arc::default(),
                fails,
            }
        }

        fn begun(&self) -> u64 {
            self.begun.load(Ordering::SeqCst)
        }

        async fn call(self) -> Result<u64, u64> {
            let look = || async {
                let number = self.begun.fetch_add(1, Ordering::SeqCst) + 1;
                self.ends.acquire().await.unwrap().forget();
                if self.fails { Err(number) } else { Ok(number) }
            };
            self.looks.after_now(look).await
        }

        /// A call that has begun its look.
        async fn looking(&self, calls: &mut JoinSet<Result<u64, u64>>) {
            let before = self.begun();
            calls.spawn(self.clone().call());
            while self.begun() == before {
                yield_now().await;
            }
        }
    }

    async fn results(calls: JoinSet<Result<u64, u64>>) -> Vec<Result<u64, u64>> {
        let mut results = calls.join_all().await;
        results.sort_unstable();
        results
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_gets_no_look_that_began_before_it() {
        let (world, mut first, mut second) = (World::new(false), JoinSet::new(), JoinSet::new());
        world.looking(&mut first).await;
        second.spawn(world.clone().call());
        yield_now().await;
        world.ends.add_permits(2);
        assert_eq!((results(first).await, results(second).await), (vec![Ok(1)], vec![Ok(2)]));
    }

    #[tokio::test(start_paused = true)]
    async fn a_burst_during_a_look_shares_the_next_one() {
        let (world, mut calls) = (World::new(false), JoinSet::new());
        world.looking(&mut calls).await;
        for _ in 0..100 {
            calls.spawn(world.clone().call());
            yield_now().await;
        }
        world.ends.add_permits(1000);
        let results = results(calls).await;
        assert_eq!((results.first(), results.last(), world.begun()), (Some(&Ok(1)), Some(&Ok(2)), 2));
        assert_eq!(results.iter().filter(|result| **result == Ok(2)).count(), 100);
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_is_the_answer_for_all_that_waited() {
        let (world, mut calls) = (World::new(true), JoinSet::new());
        world.looking(&mut calls).await;
        for _ in 0..100 {
            calls.spawn(world.clone().call());
            yield_now().await;
        }
        world.ends.add_permits(1000);
        assert_eq!(results(calls).await.last(), Some(&Err(2)));
        assert_eq!(world.begun(), 2);
        assert_eq!(world.clone().call().await, Err(3), "a later call looks again");
    }

    #[tokio::test(start_paused = true)]
    async fn looks_have_a_pause_between_them() {
        let world = World::new(false);
        world.ends.add_permits(1000);
        let began = Instant::now();
        for look in 0..10_u32 {
            world.clone().call().await.unwrap();
            assert!(began.elapsed() >= PAUSE * look, "look {look} after {:?}", began.elapsed());
        }
        tokio::time::advance(PAUSE).await;
        let began = Instant::now();
        world.call().await.unwrap();
        assert_eq!(began.elapsed(), Duration::ZERO, "a lone call does not wait");
    }

    #[tokio::test(start_paused = true)]
    async fn a_look_that_is_given_up_is_made_again_after_the_pause() {
        let (world, mut first, mut second) = (World::new(false), JoinSet::new(), JoinSet::new());
        let began = Instant::now();
        world.looking(&mut first).await;
        second.spawn(world.clone().call());
        yield_now().await;
        first.shutdown().await;
        world.ends.add_permits(1);
        assert_eq!(results(second).await, [Ok(2)]);
        assert!(began.elapsed() >= PAUSE);
    }
}
