//! Connections to the agent: SSH, the control channel on it, and the local clients that are handed to it.

pub(crate) mod race;

pub(crate) mod ssh;

pub(crate) mod session;

pub(crate) mod routes;

#[cfg(test)]
mod connection_tests;
