//! Programs and tasks that behave like the real systems around Secure Comms, with faults on demand.
//!
//! - [`kbs`]: Trustee's key broker service;
//! - [`caa`]: cloud-api-adaptor, as far as the node's service meets it;
//! - [`guest`]: the guest components in the VM (`api-server-rest`, CDH), which fetch keys through the agent;
//! - [`kata`]: an echo server in the place of the kata agent, and clients that check every byte;
//! - [`kata_api`]: a kata agent and its runtime that speak the real protocol, ttrpc;
//! - [`inspector`]: reports to tests what the test VM is like inside;
//! - [`openssh`]: command lines of the stock OpenSSH client;
//! - [`tcp_proxy`]: a TCP path that can be cut, frozen and delayed;
//! - [`mod@line`]: a TCP path that a test controls to the byte and to the SSH record;
//! - [`impaired_link`]: an IP path with delay, loss and a rate, between two network namespaces.

pub mod kbs;

pub use secure_comms_kata_api as kata_api;
pub use secure_comms_simulators::{guest, inspector, kata};

pub mod caa;
pub mod openssh;

pub mod impaired_link;
pub mod line;
pub mod tcp_proxy;
