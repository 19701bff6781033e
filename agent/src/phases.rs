//! The phases of the agent.

pub mod attestation;
pub mod kbs_fetch;
pub mod kubernetes;
