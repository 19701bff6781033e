//! What the end-to-end tests (`e2e/`) and the demo `double` are made of. `harness` runs the real programs, `simulators`
//! play the systems around them, `attackers` break the protocol on purpose; the rest are programs of their own.
//!
//! Everything binds port 0, reports the address it got, and stops when dropped.

/// Processes, network namespaces, and the scenes that tests run in.
pub mod harness;

/// Systems around Secure Comms: KBS, guest components, kata agent, stock OpenSSH, networks.
pub mod simulators;

/// Clients, servers and networks that break the protocol on purpose.
pub mod attackers;

/// What the programs of the demo share.
pub mod demo;

/// The pod VM as a machine under qemu.
pub mod boot;

/// Many pods under faults that a seed decides.
pub mod chaos;

/// Secure Comms compared with stock OpenSSH.
pub mod bench;
