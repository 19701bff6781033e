//! Requests of an unproven agent to the KBS, as the adaptor filters them.
#![no_main]

#[path = "../src/adaptor_filter.rs"]
mod adaptor_filter;
#[path = "../src/kbs_filter.rs"]
mod kbs_filter;

libfuzzer_sys::fuzz_target!(|data: &[u8]| kbs_filter::exercise(data, adaptor_filter::filtered));
