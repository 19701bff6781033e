//! An attacker at the level of packets, on either side of the real binaries: after each attack the process is the one that
//! it was, it is small, and it serves others.
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
