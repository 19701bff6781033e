//! The phases of the agent: attestation until there are keys, then Kubernetes.
//!
//! In: the shared state, peers as they come and go. Out: keys for the access policy, routes for local clients.

pub mod kbs_fetch;

pub(crate) mod attestation;

mod attempt_queue;

pub(crate) mod kubernetes;
