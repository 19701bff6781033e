//! What the end-to-end tests (`e2e/`) and the programs of `src/bin/` are made of.
//!
//! - [`harness`]: processes, network namespaces, and the scenes that tests run in;
//! - [`simulators`]: the systems around Secure Comms: KBS, guest components, kata agent, stock OpenSSH, networks;
//! - [`attackers`]: clients, servers and networks that break the protocol on purpose;
//! - [`demo`]: what the programs of the demo share;
//! - [`boot`]: the pod VM as a machine under qemu;
//! - [`chaos`]: many pods under faults that a seed decides;
//! - [`mod@bench`]: Secure Comms compared with stock OpenSSH.
//!
//! Everything binds port 0, reports the address it got, and stops when dropped.

pub mod harness;
pub mod simulators;

pub mod attackers;

pub mod demo;

pub mod boot;

pub mod chaos;

pub mod bench;
