//! One pod's channel.

mod driver;

mod connect;

mod failover;

mod status;

pub use self::driver::LOST;
pub(crate) use self::driver::{Driver, Plan, Stop, Way};
pub(crate) use self::status::Report;
pub use self::status::{Observer, PodEvent, PodState};
