//! Errors of the KBS, as the adaptor reads them.
#![no_main]

#[path = "../src/kbs_answer.rs"]
mod kbs_answer;
#[path = "../../adaptor/src/kbs/said.rs"]
mod said;

libfuzzer_sys::fuzz_target!(|data: &[u8]| kbs_answer::exercise(data));
