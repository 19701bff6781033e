//! Connections to the agent.
//!
//! In: addresses, keys and tunnels of a pod. Out: agent connections, and their links for local clients. Only
//! [`ssh`] names russh.

pub mod kbs_filter;

pub(crate) mod ssh;

pub(crate) mod agent_connection;

pub(crate) mod routes;

#[cfg(test)]
mod connection_tests;
