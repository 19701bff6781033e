//! Happy eyeballs (RFC 8305 5): several candidates are tried, each a little after the one before; the first that works
//! wins.

use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

/// The next candidate is tried this long after the one before, or as soon as that one has failed.
const STAGGER: Duration = Duration::from_millis(250);
/// How long a result that does not settle the race waits for one that does.
const GRACE: Duration = Duration::from_secs(1);

/// Races the candidates. A result that does not `settle` the race wins only if no other does shortly after. Those that
/// have not won are dropped with all they hold.
///
/// # Errors
/// What became of each, in their order.
pub(crate) async fn race<C, T, E, F>(
    candidates: Vec<C>,
    attempt: impl Fn(C) -> F,
    settles: impl Fn(&T) -> bool,
) -> Result<(usize, T), Vec<E>>
where
    T: Send + 'static,
    E: Send + 'static,
    F: Future<Output = Result<T, E>> + Send + 'static,
{
    let mut waiting = candidates.into_iter().enumerate();
    let mut running = JoinSet::new();
    let (mut failures, mut second_best) = (Vec::new(), None);
    let mut next = Instant::now();
    loop {
        if let Some((index, candidate)) = waiting.next() {
            let attempt = attempt(candidate);
            running.spawn(async move { (index, attempt.await) });
            // Somebody is there: the others must not come too late.
            if second_best.is_some() {
                continue;
            }
            next = Instant::now() + STAGGER;
        }
        let (left, event) = (waiting.len() > 0, second_best.is_some());
        tokio::select! {
            done = running.join_next() => match done {
                Some(Ok((index, Ok(won)))) if settles(&won) => return Ok((index, won)),
                Some(Ok((index, Ok(won)))) => {
                    next = if second_best.is_none() { Instant::now() + GRACE } else { next };
                    second_best.get_or_insert((index, won));
                }
                Some(Ok((index, Err(error)))) => failures.push((index, error)),
                // A task that panicked has said so.
                Some(Err(_)) => {}
                None if left => {}
                None => break,
            },
            () = sleep_until(next), if left || event => if event { break },
        }
    }
    failures.sort_by_key(|(index, _)| *index);
    second_best.ok_or_else(|| failures.into_iter().map(|(_, error)| error).collect())
}

#[cfg(test)]
mod tests {
    use tokio::time::sleep;

    use super::*;

    async fn after(millis: u64, result: Result<u64, u64>) -> Result<u64, u64> {
        sleep(Duration::from_millis(millis)).await;
        result
    }

    #[tokio::test(start_paused = true)]
    async fn the_next_starts_after_a_quarter_second_and_the_first_that_works_wins() {
        let start = Instant::now();
        let won = race(vec![1, 2, 3], |n| after(if n == 1 { 60_000 } else { 100 }, Ok(n)), |_| true).await;
        assert_eq!((won, start.elapsed().as_millis()), (Ok((1, 2)), 350));
    }

    #[tokio::test(start_paused = true)]
    async fn the_next_starts_at_once_when_one_fails() {
        let start = Instant::now();
        let won = race(vec![1, 2], |n| after(10, if n == 1 { Err(n) } else { Ok(n) }), |_| true).await;
        assert_eq!((won, start.elapsed().as_millis()), (Ok((1, 2)), 20));
    }

    #[tokio::test(start_paused = true)]
    async fn all_failures_are_told_in_the_order_of_the_candidates() {
        assert_eq!(race(vec![900, 400, 1], |n| after(n, Err(n)), |_| true).await, Err(vec![900, 400, 1]));
        assert_eq!(race(vec![], |n| after(n, Err(n)), |_| true).await, Err(vec![]));
    }

    #[tokio::test(start_paused = true)]
    async fn a_result_that_does_not_settle_the_race_waits_a_little_for_one_that_does() {
        let start = Instant::now();
        let won = race(vec![10, 60_000, 900], |n| after(n, Ok(n)), |n| *n == 900).await;
        assert_eq!((won, start.elapsed().as_millis()), (Ok((2, 900)), 910));
        let start = Instant::now();
        let won = race(vec![10, 60_000, 900], |n| after(n, Ok(n)), |_| false).await;
        assert_eq!((won, start.elapsed().as_millis()), (Ok((0, 10)), 1010));
        let won = race(vec![10], |n| after(n, Ok(n)), |_| false).await;
        assert_eq!((won, start.elapsed().as_millis()), (Ok((0, 10)), 1020));
    }
}
