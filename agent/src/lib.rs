//! The Secure Comms agent in the pod VM, in the order data passes through.
//!
//! Before the first connection: flags ([`cli`]), the daemon config ([`config_file`]), validated configuration
//! ([`config`]), the life of the agent ([`run`]).
//! A connection comes in ([`ssh`]) past the [`gate`], becomes one of the [`peers`] and gets a [`session`]. Through a
//! peer of the [`attestation`] phase the [`guest`] components fetch the keys that open the [`kubernetes`] phase and
//! are [`latch`]ed for this boot. In the tunnel to the kata agent stands the [`interceptor`]. Clients in the VM reach the
//! peer whose turn it is by [`routes`]. Beside all that runs the [`pod_network`]. Operators see [`log`] and [`notify`].

pub mod attestation;
pub mod cli;
pub mod config;
pub mod config_file;
pub mod gate;
pub mod guest;
pub mod interceptor;
pub mod kubernetes;
pub mod latch;
pub mod log;
pub mod notify;
pub mod peers;
pub mod pod_network;
pub mod routes;
pub mod run;
pub mod session;
pub mod ssh;
