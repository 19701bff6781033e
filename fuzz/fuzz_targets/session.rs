//! A stream of a session, over connections that end at any point.
#![no_main]

#[path = "../src/session.rs"]
mod session;

libfuzzer_sys::fuzz_target!(|data: &[u8]| session::exercise(data));
