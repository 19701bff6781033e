//! Fetches user data from the cloud that was detected, again and again until they are there and pass, or the time is over.

mod clouds;

use std::error::Error;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::cloud::Cloud;
use crate::console::{Console, with_causes};
use crate::http::{HttpError, Limits};

/// Where user data are asked for; other addresses only in tests.
#[derive(Clone, Debug)]
pub struct Endpoints {
    /// The file of [`Cloud::NoCloud`].
    pub no_cloud: PathBuf,
    /// The metadata service of Azure, AWS, GCP and OpenStack.
    pub link_local: SocketAddr,
    /// The metadata service of Alibaba Cloud.
    pub alibaba: SocketAddr,
}

impl Default for Endpoints {
    fn default() -> Self {
        Self {
            no_cloud: crate::cloud::Places::default().no_cloud,
            link_local: (Ipv4Addr::new(169, 254, 169, 254), 80).into(),
            alibaba: (Ipv4Addr::new(100, 100, 100, 200), 80).into(),
        }
    }
}

/// How long, and how often.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// For all tries together.
    pub total: Duration,
    /// Between two tries, once a network has had the time to come up: the first pause is 250 ms, each is twice the one
    /// before.
    pub pause: Duration,
    /// Of one request.
    pub limits: Limits,
    /// After as many permanent faults it gives up.
    pub permanent_faults: u32,
}

/// A VM's address comes a moment after its boot has come this far.
const FIRST_PAUSE: Duration = Duration::from_millis(250);

impl Pace {
    /// The usual pace for `total`.
    #[must_use]
    pub fn within(total: Duration) -> Self {
        Self { total, pause: Duration::from_secs(5), limits: Limits::default(), permanent_faults: 3 }
    }

    fn pause_after(&self, tries: u32) -> Duration {
        FIRST_PAUSE.saturating_mul(1 << (tries - 1).min(16)).min(self.pause)
    }
}

/// Time, so that tests need not wait.
pub trait Clock {
    /// Since any moment that does not change.
    fn now(&self) -> Duration;
    /// Waits.
    fn pause(&mut self, time: Duration);
}

/// The machine's clock.
#[derive(Debug)]
pub struct Monotonic(Instant);

impl Default for Monotonic {
    fn default() -> Self {
        Self(Instant::now())
    }
}

impl Clock for Monotonic {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }

    fn pause(&mut self, time: Duration) {
        std::thread::sleep(time);
    }
}

/// What is wrong with a body that came whole.
#[derive(Debug)]
pub struct Rejection {
    /// Class and place of the fault, never a value of the body.
    pub cause: Box<dyn Error>,
    /// Whether the same body must be expected from the next try: not if it may be cut, or not there yet.
    pub is_permanent: bool,
}

/// Why one try failed.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// No answer.
    #[error("{what}")]
    Http {
        /// The request.
        what: String,
        /// What came instead.
        #[source]
        cause: HttpError,
    },
    /// An answer without the user data.
    #[error("{what}: status {status}, expected 200")]
    Status {
        /// The request.
        what: String,
        /// Of the answer.
        status: u16,
    },
    /// AWS gave a token that can't be sent back.
    #[error("{what}: the token is empty, too long or has characters that no header may have")]
    Token {
        /// The request.
        what: String,
    },
    /// Something that base64 does not have.
    #[error("{what}: the body is no base64 (standard alphabet, padded)")]
    Base64 {
        /// The request.
        what: String,
    },
    /// Base64 without its end.
    #[error("{what}: the base64 of the body is cut short or lacks its padding")]
    Base64Cut {
        /// The request.
        what: String,
    },
    /// The file can't be read.
    #[error("reading {}", .path.display())]
    File {
        /// Of the file.
        path: PathBuf,
        /// Why not.
        #[source]
        cause: io::Error,
    },
    /// The user data themselves.
    #[error("{what}")]
    Rejected {
        /// The request.
        what: String,
        /// From the judge.
        #[source]
        cause: Box<dyn Error>,
        /// As in [`Rejection`].
        is_permanent: bool,
    },
}

impl Fault {
    /// Whether to expect the same from the next try.
    fn is_permanent(&self) -> bool {
        match self {
            Self::Http { cause, .. } => cause.is_permanent(),
            Self::Base64 { .. } | Self::File { .. } => true,
            Self::Rejected { is_permanent, .. } => *is_permanent,
            Self::Status { .. } | Self::Token { .. } | Self::Base64Cut { .. } => false,
        }
    }
}

/// No user data, finally.
#[derive(Debug, thiserror::Error)]
#[error("no user data from {cloud} in {seconds} s (tries: {tries}); the last fault")]
pub struct FetchError {
    cloud: Cloud,
    tries: u32,
    seconds: u64,
    #[source]
    cause: Fault,
}

impl FetchError {
    /// The last fault.
    #[must_use]
    pub fn fault(&self) -> &Fault {
        &self.cause
    }

    /// How often it tried.
    #[must_use]
    pub fn tries(&self) -> u32 {
        self.tries
    }
}

/// Where from and how: what [`fetch`] needs but the judge.
pub struct Fetch<'a, C> {
    /// As detected.
    pub cloud: Cloud,
    /// Of its service.
    pub endpoints: &'a Endpoints,
    /// Of the tries.
    pub pace: Pace,
    /// For the pauses.
    pub clock: &'a mut C,
    /// Each distinct fault is a line there.
    pub console: &'a mut Console,
}

/// Fetches until `judge` accepts what came, and returns what it made of it.
///
/// # Errors
/// If that has not happened when the time is over, or after too many permanent faults; with the last fault.
pub fn fetch<C: Clock, T>(
    mut with: Fetch<'_, C>,
    mut judge: impl FnMut(&[u8]) -> Result<T, Rejection>,
) -> Result<T, FetchError> {
    let start = with.clock.now();
    let (mut tries, mut permanent_faults) = (0, 0);
    loop {
        tries += 1;
        let left = with.pace.total.saturating_sub(with.clock.now().saturating_sub(start));
        let fault = match once(&mut with, left, &mut judge) {
            Ok(accepted) => {
                with.console.note(&format!("{}: user data are there, try {tries}", with.cloud));
                return Ok(accepted);
            }
            Err(fault) => fault,
        };
        permanent_faults += u32::from(fault.is_permanent());
        let spent = with.clock.now().saturating_sub(start);
        // A try without time would end with a fault of its own and hide this one.
        let is_last = with.pace.total.saturating_sub(spent) <= with.pace.pause;
        if is_last || permanent_faults >= with.pace.permanent_faults {
            return Err(FetchError { cloud: with.cloud, tries, seconds: spent.as_secs(), cause: fault });
        }
        with.console.fault(&format!("{}: {}; trying again", with.cloud, with_causes(&fault)));
        with.clock.pause(with.pace.pause_after(tries));
    }
}

/// One try, which takes no longer than `left`.
fn once<C, T>(
    with: &mut Fetch<'_, C>,
    left: Duration,
    judge: &mut impl FnMut(&[u8]) -> Result<T, Rejection>,
) -> Result<T, Fault> {
    let time = clouds::Time { limits: with.pace.limits, end: Instant::now() + left };
    let (what, user_data) = clouds::user_data(with.cloud, with.endpoints, time, with.console)?;
    judge(&user_data).map_err(|rejection| Fault::Rejected {
        what,
        cause: rejection.cause,
        is_permanent: rejection.is_permanent,
    })
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// Pauses take no time, except on this clock.
    #[derive(Default)]
    struct Simulated {
        now: Duration,
        pauses: Vec<Duration>,
    }

    impl Clock for Simulated {
        fn now(&self) -> Duration {
            self.now
        }

        fn pause(&mut self, time: Duration) {
            self.now += time;
            self.pauses.push(time);
        }
    }

    /// The file that is there, judged by `judge`: the error and the pauses.
    fn failed(
        seconds: u64,
        judge: impl FnMut(&[u8]) -> Result<(), Rejection>,
    ) -> (FetchError, Vec<Duration>) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let endpoints = Endpoints { no_cloud: file.path().to_owned(), ..Endpoints::default() };
        let mut clock = Simulated::default();
        let mut console = Console::new("test", Box::new(io::sink()), None);
        let pace = Pace::within(Duration::from_secs(seconds));
        let with = Fetch {
            cloud: Cloud::NoCloud,
            endpoints: &endpoints,
            pace,
            clock: &mut clock,
            console: &mut console,
        };
        (fetch(with, judge).unwrap_err(), clock.pauses)
    }

    fn rejected(is_permanent: bool) -> Result<(), Rejection> {
        Err(Rejection { cause: "wrong".into(), is_permanent })
    }

    #[test]
    fn a_fault_that_may_pass_is_tried_until_the_time_is_over() {
        let (error, pauses) = failed(180, |_| rejected(false));
        assert_eq!(pauses[..6], [250, 500, 1000, 2000, 4000, 5000].map(Duration::from_millis));
        assert!(pauses[6..].iter().all(|pause| *pause == Duration::from_secs(5)));
        assert_eq!(error.tries() as usize, pauses.len() + 1);
        let spent: Duration = pauses.iter().sum();
        assert!((170..180).contains(&spent.as_secs()), "{spent:?}");
        assert_eq!(failed(6, |_| rejected(false)).0.tries(), 4);
        assert_eq!(failed(1, |_| rejected(false)).0.tries(), 1);
    }

    #[test]
    fn a_fault_that_stays_is_tried_three_times() {
        let (error, pauses) = failed(180, |_| rejected(true));
        assert_eq!((error.tries(), pauses.len()), (3, 2));
        // Those that may pass do not count.
        let tries = Cell::new(0);
        let mixed = |_: &[u8]| {
            tries.set(tries.get() + 1);
            rejected(tries.get() % 2 == 0)
        };
        assert_eq!(failed(180, mixed).0.tries(), 6);
    }

    #[test]
    fn the_last_fault_is_in_the_error() {
        let (error, _) = failed(1, |_| rejected(false));
        let text = with_causes(&error);
        assert!(text.starts_with("no user data from NoCloud in 0 s (tries: 1); the last fault: "), "{text}");
        assert!(text.ends_with(": wrong"), "{text}");
    }
}
