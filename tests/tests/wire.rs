//! An attacker at the level of packets, on either side of the real binaries: after each attack the process is the one that
//! it was, it is small, and it serves others.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // a test's helpers fail as the test does

#[path = "wire/channels.rs"]
mod channels;
#[path = "wire/control.rs"]
mod control;
#[path = "wire/exchange.rs"]
mod exchange;
#[path = "wire/fields.rs"]
mod fields;
#[path = "wire/packets.rs"]
mod packets;
#[path = "wire/rekey.rs"]
mod rekey;
#[path = "wire/requests.rs"]
mod requests;
#[path = "wire/states.rs"]
mod states;
#[path = "wire/streams.rs"]
mod streams;
