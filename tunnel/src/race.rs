//! Races connection attempts (RFC 8305 5, "happy eyeballs"): each candidate starts shortly after the one before, and the
//! first that succeeds wins.

use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

/// How long a result that does not settle the race waits for a better one.
const GRACE: Duration = Duration::from_secs(1);

/// Races the candidates, and returns the winner with its index. Each starts `stagger` after the one before, or at once when
/// one has failed. A result that does not settle the race, by `settles`, wins only if no better one follows within a
/// second. The losing attempts are dropped.
///
/// Dropping the future drops all attempts.
///
/// # Errors
/// The error of each candidate, in the order of the candidates.
pub async fn race<C, T, E, F>(
    candidates: Vec<C>,
    stagger: Duration,
    attempt: impl Fn(C) -> F,
    settles: impl Fn(&T) -> bool,
) -> Result<(usize, T), Vec<E>>
where
    T: Send + 'static,
    E: Send + 'static,
    F: Future<Output = Result<T, E>> + Send + 'static,
{
    let mut failures: Vec<Option<E>> = candidates.iter().map(|_| None).collect();
    let mut waiting = candidates.into_iter().enumerate();
    let mut running = JoinSet::new();
    let mut second_best = None;
    let mut next = Instant::now();
    loop {
        if let Some((index, candidate)) = waiting.next() {
            let attempt = attempt(candidate);
            running.spawn(async move { (index, attempt.await) });
            // There is a result already: the remaining candidates start at once, to be ready within the grace time.
            if second_best.is_some() {
                continue;
            }
            next = Instant::now() + stagger;
        }
        let (left, event) = (waiting.len() > 0, second_best.is_some());
        tokio::select! {
            done = running.join_next() => match done {
                Some(Ok((index, Ok(won)))) if settles(&won) => return Ok((index, won)),
                Some(Ok((index, Ok(won)))) => {
                    next = if second_best.is_none() { Instant::now() + GRACE } else { next };
                    second_best.get_or_insert((index, won));
                }
                Some(Ok((index, Err(error)))) => {
                    if let Some(failure) = failures.get_mut(index) {
                        *failure = Some(error);
                    }
                }
                // The panic of an attempt was printed where it happened.
                Some(Err(_)) => {}
                None if left => {}
                None => break,
            },
            () = sleep_until(next), if left || event => if event { break },
        }
    }
    second_best.ok_or_else(|| failures.into_iter().flatten().collect())
}

#[cfg(test)]
mod tests {
    use tokio::time::sleep;

    use secure_comms_protocol::limits::CONNECT_STAGGER;

    use super::*;

    async fn after(millis: u64, result: Result<u64, u64>) -> Result<u64, u64> {
        sleep(Duration::from_millis(millis)).await;
        result
    }

    #[tokio::test(start_paused = true)]
    async fn candidates_start_staggered_and_the_first_success_wins() {
        let start = Instant::now();
        let won = race(
            vec![1, 2, 3],
            CONNECT_STAGGER,
            |n| after(if n == 1 { 60_000 } else { 100 }, Ok(n)),
            |_| true,
        )
        .await;
        assert_eq!((won, start.elapsed().as_millis()), (Ok((1, 2)), 350));
    }

    #[tokio::test(start_paused = true)]
    async fn the_next_candidate_starts_at_once_when_one_fails() {
        let start = Instant::now();
        let won =
            race(vec![1, 2], CONNECT_STAGGER, |n| after(10, if n == 1 { Err(n) } else { Ok(n) }), |_| true)
                .await;
        assert_eq!((won, start.elapsed().as_millis()), (Ok((1, 2)), 20));
    }

    #[tokio::test(start_paused = true)]
    async fn all_failures_come_in_the_order_of_the_candidates() {
        assert_eq!(
            race(vec![900, 400, 1], CONNECT_STAGGER, |n| after(n, Err(n)), |_| true).await,
            Err(vec![900, 400, 1])
        );
        assert_eq!(race(vec![], CONNECT_STAGGER, |n| after(n, Err(n)), |_| true).await, Err(vec![]));
    }

    #[tokio::test(start_paused = true)]
    async fn an_unsettled_result_waits_a_moment_for_a_better_one() {
        let start = Instant::now();
        let won = race(vec![10, 60_000, 900], CONNECT_STAGGER, |n| after(n, Ok(n)), |n| *n == 900).await;
        assert_eq!((won, start.elapsed().as_millis()), (Ok((2, 900)), 910));
        let start = Instant::now();
        let won = race(vec![10, 60_000, 900], CONNECT_STAGGER, |n| after(n, Ok(n)), |_| false).await;
        assert_eq!((won, start.elapsed().as_millis()), (Ok((0, 10)), 1010));
        let won = race(vec![10], CONNECT_STAGGER, |n| after(n, Ok(n)), |_| false).await;
        assert_eq!((won, start.elapsed().as_millis()), (Ok((0, 10)), 1020));
    }
}
