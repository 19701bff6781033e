//! What a pod VM takes from its cloud: an answer of the metadata service, user data, init-data.
#![no_main]

#[path = "../src/user_data.rs"]
mod user_data;

libfuzzer_sys::fuzz_target!(|data: &[u8]| user_data::exercise(data));
