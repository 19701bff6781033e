//! Private keys in PEM, and authorized_keys.
#![no_main]

#[path = "../src/keys.rs"]
mod keys;

libfuzzer_sys::fuzz_target!(|data: &[u8]| keys::exercise(data));
