//! Lines of the control channel.
#![no_main]

#[path = "../src/control.rs"]
mod control;

libfuzzer_sys::fuzz_target!(|data: &[u8]| control::exercise(data));
