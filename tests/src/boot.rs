//! Pod VMs under qemu: the machine, what it boots, and the source of its user data. At the worker node's side is a
//! [`Scene`](crate::harness::scene::Scene), as in other tests.
//!
//! The machine's network is qemu's user network, closed except for one port of the host's loopback, which is forwarded to
//! port 2222 of the guest, and a simulated metadata service where there is one. So the VM reaches the KBS through the agent's tunnel only.

mod artifacts;
mod cloud_config;
mod confinement;
mod firmware;
mod host_credentials;
mod machine;
mod pod;
mod tpm;
mod user_data;

pub use artifacts::{Artifacts, artifacts};
pub use cloud_config::CloudConfig;
pub use confinement::sees_only_its_own;
pub use firmware::{Certificate, SECURE_VARIABLES, test_certificate};
pub use host_credentials::{HOST_RAN, HostCredentials};
pub use machine::{Boot, Bus, DataDisk, Machine, MachineOptions, MachinePermit, Platform};
pub use pod::{AGENT, Pod, scene};
pub use user_data::{UserData, apf_json};
