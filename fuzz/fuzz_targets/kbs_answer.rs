//! Errors of the KBS, as the adaptor reads them.
#![no_main]

#[path = "../../adaptor/src/kbs/error_body.rs"]
mod error_body;
#[path = "../src/kbs_answer.rs"]
mod kbs_answer;

libfuzzer_sys::fuzz_target!(|data: &[u8]| kbs_answer::exercise(data));
