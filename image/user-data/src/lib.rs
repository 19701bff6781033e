//! `process-user-data` and `azure-ready`: what a pod VM takes from its cloud before anything else runs.
//!
//! A cloud may write anything into user data. So all of it is bounded and checked before the first file is written, and what it may
//! decide is little: docs/THREAT-MODEL.md.
//!
//! The modules are in the order in which data passes through them.

// What the others share.
pub mod console;
pub mod files;
pub mod input;

pub mod cli;

pub mod cloud;
pub mod http;

pub mod fetch;

pub mod cloud_config;

pub mod init_data;

pub mod provision;

pub mod pcr;

pub mod run;

pub mod azure_ready;
