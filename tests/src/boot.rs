//! Pod VMs under qemu: the machine, what it boots, and how user data gets in. The worker node's side is a
//! [`Scene`](crate::scene::Scene), as everywhere.
//!
//! The machine's network is qemu's user network, closed but for one port of the host's loopback, which leads to port 2222
//! of the guest. So the VM reaches the KBS through the agent's tunnel or not at all.

mod artifacts;
mod machine;
mod user_data;

pub use artifacts::{Artifacts, artifacts};
pub use machine::{Boot, Machine, MachineOptions, Turn};
pub use user_data::{UserData, apf_json};
