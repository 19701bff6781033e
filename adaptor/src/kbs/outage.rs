//! When to report that the KBS gives no usable answer: once for each cause in an outage, however many calls meet it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// Causes of one outage that are reported. A KBS behind a broken load balancer may give ever new ones.
const CAUSES: usize = 8;

/// The outage of one KBS. A clone is the same.
#[derive(Clone, Debug, Default)]
pub(super) struct Outage(Arc<Mutex<Option<Ongoing>>>);

#[derive(Debug)]
struct Ongoing {
    since: Instant,
    attempts: u64,
    reported: Vec<String>,
}

/// An outage that is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Over {
    /// From the first attempt that failed to the first that did not.
    pub(super) lasted: Duration,
    /// Attempts that failed.
    pub(super) attempts: u64,
}

impl Outage {
    /// An attempt failed. Returns whether its cause is to be reported; never if the caller can't, because its call fails with it.
    pub(super) fn failed(&self, cause: &str, can_report: bool) -> bool {
        let mut ongoing = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let ongoing = ongoing.get_or_insert_with(|| Ongoing {
            since: Instant::now(),
            attempts: 0,
            reported: Vec::new(),
        });
        ongoing.attempts += 1;
        if !can_report
            || ongoing.reported.len() >= CAUSES
            || ongoing.reported.iter().any(|reported| reported == cause)
        {
            return false;
        }
        ongoing.reported.push(cause.to_owned());
        true
    }

    /// An attempt was answered. Returns the outage that ends with it.
    pub(super) fn answered(&self) -> Option<Over> {
        let ended = self.0.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        Some(Over { lasted: ended.since.elapsed(), attempts: ended.attempts })
    }
}

#[cfg(test)]
mod tests {
    use super::{CAUSES, Outage};

    #[tokio::test(start_paused = true)]
    async fn many_calls_report_an_outage_once() {
        let outage = Outage::default();
        assert!(!outage.failed("connection refused", false), "a call that is over");
        let calls: Vec<_> = (0..250).map(|_| outage.clone()).collect();
        assert_eq!(calls.iter().filter(|call| call.failed("connection refused", true)).count(), 1);
        assert!(outage.failed("no answer", true), "another cause");
        tokio::time::advance(std::time::Duration::from_secs(7)).await;
        let over = outage.answered().unwrap();
        assert_eq!((over.lasted.as_secs(), over.attempts), (7, 252));
        assert_eq!(outage.answered(), None);
        assert!(outage.failed("connection refused", true), "the next outage");
    }

    #[test]
    fn ever_new_causes_are_not_all_reported() {
        let outage = Outage::default();
        assert_eq!((0..100).filter(|number| outage.failed(&number.to_string(), true)).count(), CAUSES);
    }
}
