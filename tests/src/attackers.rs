//! Clients, servers and networks that break the protocol on purpose, and the programs that they attack.
//!
//! - [`stranger`]: an SSH client that keeps to no rule, and a peer that a test drives by hand;
//! - [`raw`]: an SSH transport in either role, whose every byte is the test's;
//! - [`by_hand`]: an adaptor or an agent that speaks the protocol's version 2, with whatever a test makes it say;
//! - [`flood`]: thousands of connections at a time;
//! - [`front`]: an address that a forged agent answers at before the real one;
//! - [`impostor`]: a server in the place of the agent, attacking the real adaptor;
//! - [`tamper`]: a TCP path that changes what it carries;
//! - [`attacked_agent`]: a scene with the agent under attack, and the checks that it withstands it.

pub mod raw;
pub mod stranger;

pub mod flood;
pub mod front;
pub mod impostor;
pub mod tamper;

pub mod attacked_agent;
pub mod by_hand;
