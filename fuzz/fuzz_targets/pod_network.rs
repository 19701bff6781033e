//! The pod's network in apf.json.
#![no_main]

#[path = "../src/pod_network.rs"]
mod pod_network;

libfuzzer_sys::fuzz_target!(|data: &[u8]| pod_network::exercise(data));
