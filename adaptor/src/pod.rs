//! One pod's channel, from the first connection attempt to the stop.
//!
//! In: the pod's plan (addresses, keys, tunnels), the routes of its local clients, and a stop order. Out: [`PodState`]
//! and [`PodEvent`]. Only the pod's task changes the state: the driver runs in it.

mod plan;

mod status;
mod vm_log;

mod lost_vm;

mod connect;

mod advice;

mod failover;

mod redial;

mod session;

mod data_lane;

mod expected_agent;

mod withdrawal;

mod slots;

mod candidate;

mod candidates;

mod reach;

mod driver;

pub use self::advice::LOST;
pub(crate) use self::driver::{Driver, Ended, Entry, Stop};
pub(crate) use self::expected_agent::ExpectedAgent;
pub use self::expected_agent::{AgentTunnels, KATA_AGENT_SOCKETS};
pub(crate) use self::lost_vm::LostLimits;
pub(crate) use self::plan::{AttestationLimits, LaneLimits, Plan};
pub(crate) use self::status::StatusReporter;
pub use self::status::{Endpoint, Observer, PodEvent, PodSnapshot, PodState, SessionStatus, VmLine};

#[cfg(test)]
mod driver_tests;
#[cfg(test)]
mod lane_tests;
