//! Pod VMs under qemu: the machine, what it boots, and how user data gets in. The worker node's side is a
//! [`Scene`](crate::harness::scene::Scene), as everywhere.
//!
//! The machine's network is qemu's user network, closed but for one port of the host's loopback, which leads to port 2222
//! of the guest. So the VM reaches the KBS through the agent's tunnel or not at all.

mod artifacts;
mod firmware;
mod machine;
mod pod;
mod tpm;
mod user_data;

pub use artifacts::{Artifacts, artifacts};
pub use firmware::{Certificate, test_certificate};
pub use machine::{Boot, Machine, MachineOptions, Platform, Turn};
pub use pod::{AGENT, Pod, scene};
pub use user_data::{UserData, apf_json};
