//! The Secure Comms agent in the pod VM: the map of its rooms, in the order data passes through them.
//!
//! Flags and the daemon config become a [`config`], with which the agent [`run`]s. A `connection` passes the `access`
//! policy and is served by the `server`. Its client becomes one of the `peers`, in the state of the `agent`. Through peers the
//! [`phases`] fetch the keys, and route local clients to them. The interceptor in the tunnel to the [`kata`] agent edits
//! requests. The [`pod_network`] is set up in parallel. Every room reports to the [`os`].
//!
//! tests/e2e/layering.rs has the order of the imports.

pub mod config;

pub mod run;

mod connection;

mod access;

mod server;

mod peers;

mod agent;

pub mod phases;

pub mod kata;

pub mod pod_network;

pub mod os;
