//! The adaptor: the worker node's end of Secure Comms, as a library.

pub mod registry;

pub mod address;
pub mod key_source;
pub mod store;

pub mod kbs;
pub mod user_data;

pub mod pod;
mod transport;

mod text;

// Tests share their simulated agent with the integration tests, which see this crate by its name.
#[cfg(test)]
extern crate self as secure_comms_adaptor;
