//! Secure Comms beside stock OpenSSH: the same server, the same load, in turns, in one run.
//!
//! - [`load`]: the server and its clients, which check what they move;
//! - [`place`]: where the two ends run: here, or at the ends of a [`crate::simulators::impaired_link`];
//! - [`contender`]: ours or OpenSSH, connected, with a tunnel to the server;
//! - [`measure`]: what is measured of one contender in one turn;
//! - [`groups`]: which measurements, at which place, and what we want to reach;
//! - [`tables`], [`plot`]: tables and pictures.
//!
//! Every figure is a median over rounds, every ratio the median of the rounds' ratios: what slows a round down slows
//! both. Nothing here fails because something was slow.

pub mod contender;
pub mod groups;
pub mod load;
pub mod measure;
pub mod place;
pub mod plot;
pub mod tables;
