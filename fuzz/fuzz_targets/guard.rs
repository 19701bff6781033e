//! A guarded socket: strict key exchange, and what is read ahead.
#![no_main]

#[path = "../src/guard.rs"]
mod guard;

libfuzzer_sys::fuzz_target!(|data: &[u8]| guard::exercise(data));
