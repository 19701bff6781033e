//! First messages of TLS clients, as the way in of cloud-api-adaptor reads them.
#![no_main]
#![allow(dead_code, reason = "node/ uses the rest of these files")]

#[path = "../../node/src/caa/front"]
mod front {
    #[path = "../../../../fuzz/src/client_hello.rs"]
    pub(crate) mod client_hello;
    mod hello;
    mod refusal;
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| front::client_hello::exercise(data));
