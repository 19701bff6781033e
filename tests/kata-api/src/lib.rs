//! The kata agent's API, as far as the tests speak it, over the `ttrpc` crate that kata uses itself.
//!
//! - [`api`]: messages, client and server, generated from `proto/` with the field numbers of the kata agent;
//! - [`client`]: the runtime's side; [`server`]: the kata agent's, which remembers what arrived.

pub mod client;
pub mod server;

/// Generated: see `proto/`.
#[allow(missing_docs, unreachable_pub, clippy::unwrap_used)]
pub mod api {
    include!(concat!(env!("OUT_DIR"), "/api.rs"));
}

pub use {protobuf, ttrpc};
