//! One pod's channel, from the first connection attempt to the stop.
//!
//! In: a [`Plan`], the local clients' [`Routes`](crate::transport::routes::Routes) and a stop order. Out: [`PodState`] and
//! [`PodEvent`]. Only [`Driver`] changes either.

mod plan;

mod status;

mod lost_vm;

mod connect;

mod advice;

mod failover;

mod driver;

pub use self::advice::LOST;
pub(crate) use self::driver::{Driver, Entry, Stop};
pub(crate) use self::plan::Plan;
pub(crate) use self::status::StatusReporter;
pub use self::status::{Observer, PodEvent, PodState};
