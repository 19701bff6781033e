//! Compares Secure Comms with stock OpenSSH: the same server and the same load, alternating, in one run.
//!
//! - `load`: the server and its clients, which check what they move;
//! - `place`: where the two ends run: here, or at the ends of an `impaired_link`(crate::simulators::impaired_link);
//! - `contender`: Secure Comms or OpenSSH, connected, with a tunnel to the server;
//! - `measure`: the measurements of one contender in one round;
//! - `groups`: which measurements run at which place, and their goals;
//! - `cuts`: cuts of the line, which no stream may notice; OpenSSH is no contender there;
//! - `node`: the node's service with many pods; OpenSSH is no contender there, and it runs by name only;
//! - `control`: what the machine itself takes, under the same load;
//! - `tables`, `plot`: tables and pictures.
//!
//! Every figure is a median over rounds, every ratio the median of the rounds' ratios: a slow round slows both
//! contenders. No measurement fails because it is slow.

mod load;

mod contender;
mod place;

mod measure;

pub mod groups;

pub mod control;
pub mod cuts;
pub mod node;

mod plot;
pub mod tables;
