//! The command line of the agent.
#![no_main]

#[path = "../src/flags.rs"]
mod flags;

libfuzzer_sys::fuzz_target!(|data: &[u8]| flags::exercise(data));
