//! One pod's channel, from the first connection attempt to the stop.
//!
//! In: the pod's plan (addresses, keys, tunnels), the routes of its local clients, and a stop order. Out: [`PodState`]
//! and [`PodEvent`]. Only the driver and the start that waits for it change the state.

mod plan;

mod status;
mod vm_log;

mod lost_vm;

mod connect;

mod advice;

mod failover;

mod driver;

pub use self::advice::LOST;
pub(crate) use self::driver::{Driver, Entry, Stop};
pub(crate) use self::plan::Plan;
pub(crate) use self::status::StatusReporter;
pub use self::status::{Observer, PodEvent, PodState, VmLine};
