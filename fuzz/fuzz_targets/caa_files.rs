//! Files in the pods directory of cloud-api-adaptor.
#![no_main]
#![allow(dead_code, reason = "node/ uses the rest of these files")]

#[path = "../../node/src/caa"]
mod caa {
    pub(crate) mod directory {
        mod apf;
        #[path = "../../../../fuzz/src/caa_files.rs"]
        pub(crate) mod caa_files;
        mod files;
    }
    pub(crate) mod identity;
    pub(crate) mod sandbox;
}
#[path = "../../node/src/init_data"]
mod init_data {
    mod pod_name;
    pub(crate) use pod_name::PodName;
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| caa::directory::caa_files::exercise(data));
