//! What the end-to-end tests (`e2e/`) and the demo `double` are made of.
//!
//! - [`harness`] runs the real programs, in network namespaces on request, and has the scenes that tests run in.
//! - [`simulators`] play the systems around them: KBS, guest components, kata agent, stock OpenSSH, networks.
//! - [`attackers`] are clients, servers and networks that break the protocol on purpose.
//! - [`demo`] is what the programs of the demo share; [`boot`] is the pod VM as a machine under qemu.
//! - [`usage`] is the `--help` of the programs.
//! - [`chaos`] runs many pods under faults that a seed decides; [`mod@bench`] compares Secure Comms with stock OpenSSH.
//!
//! Everything binds port 0, reports the address it got, and stops when dropped.

pub mod harness;

pub mod simulators;

pub mod attackers;

pub mod demo;

pub mod usage;

pub mod boot;

pub mod chaos;

pub mod bench;
