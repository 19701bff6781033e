//! Frames towards the kata agent, and the edits of those that are touched.
#![no_main]

#[path = "../src/frames.rs"]
mod frames;

libfuzzer_sys::fuzz_target!(|data: &[u8]| frames::exercise(data));
