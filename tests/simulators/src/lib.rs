//! Simulators of what runs next to the agent in a pod VM, and the services of the test VM.
//!
//! In the order of a boot:
//!
//! - `metadata`, a crate of its own: the metadata service of a cloud, outside the VM;
//! - [`bare`]: PID 1 of the bare test VM, which does what systemd does in the image;
//! - [`user_data`]: `process-user-data`, which finds apf.json where a cloud puts it;
//! - [`guest`]: the guest components (`api-server-rest`, AA, CDH), which fetch keys through the agent;
//! - [`kata`]: the kata agent behind `KATAAGENT`, and the client side that checks every byte;
//! - [`inspector`]: reports to tests what the VM is like inside.
//!
//! The binary `simulator` runs each of them as a process. They share [`args`], [`accept`] and [`http`].

pub mod accept;
pub mod args;
pub mod bare;
pub mod guest;
pub mod http;
pub mod inspector;
pub mod kata;
pub mod user_data;
