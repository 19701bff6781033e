//! The Secure Comms agent in the pod VM, in the order data passes through: flags ([`cli`]), validated
//! configuration ([`config`]), [`keys`], the keys kept for this boot ([`latch`]), the [`guest`] components
//! that fetch them, and what operators see ([`log`], [`notify`]).

pub mod cli;
pub mod config;
pub mod keys;
