//! Packet-level attacks of a client on the real agent. After each attack the agent is the same process, small, and serves
//!  others.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // a test's helpers fail as the test does

mod channels;
mod control;
mod exchange;
mod fields;
mod packets;
mod rekey;
mod requests;
mod states;
mod streams;
