//! The edit of a request to the kata agent.
#![no_main]

#[path = "../src/edit.rs"]
mod edit;

libfuzzer_sys::fuzz_target!(|data: &[u8]| edit::exercise(data));
