//! The pod VM's disk and kernel command line, as its initrd reads them.
#![no_main]

#[path = "../src/disk.rs"]
mod disk;

libfuzzer_sys::fuzz_target!(|data: &[u8]| disk::exercise(data));
