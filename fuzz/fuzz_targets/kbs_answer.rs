//! Errors of the KBS, as the adaptor reads them.
#![no_main]

#[path = "../src/kbs_answer.rs"]
mod kbs_answer;
#[path = "../../adaptor/src/kbs/error_body.rs"]
mod error_body;

libfuzzer_sys::fuzz_target!(|data: &[u8]| kbs_answer::exercise(data));
