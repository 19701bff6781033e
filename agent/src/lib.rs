//! The Secure Comms agent in the pod VM.

pub mod access;
pub mod config;
pub mod kata;
pub mod keys;
pub mod os;
pub mod peers;
pub mod phases;
pub mod pod_network;
pub mod run;
pub mod server;
