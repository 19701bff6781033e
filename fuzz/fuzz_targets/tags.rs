//! Tags of tunnels, and names.
#![no_main]

#[path = "../src/tags.rs"]
mod tags;

libfuzzer_sys::fuzz_target!(|data: &[u8]| tags::exercise(data));
