//! The text of a secure-comms.toml.
#![no_main]

#[path = "../src/init_data.rs"]
mod init_data;

libfuzzer_sys::fuzz_target!(|data: &[u8]| init_data::exercise(data));
