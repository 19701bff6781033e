//! What runs beside the agent in a pod VM, for tests: stand-ins for its neighbours, and the services of the test VM.
//!
//! In the order in which a boot meets them:
//!
//! - [`bare`]: PID 1 of the bare test VM; in the image, systemd does what it does;
//! - [`user_data`]: `process-user-data`, which brings apf.json from where a cloud puts it;
//! - [`guest`]: the guest components (`api-server-rest`, AA, CDH), which fetch keys through the agent;
//! - [`kata`]: the kata agent behind `KATAAGENT`, and the client side that checks every byte;
//! - [`inspector`]: tells tests what the VM is like inside.
//!
//! The binary `simulator` is all of it as processes; [`args`], [`accept`] and [`http`] are what they share.

pub mod accept;
pub mod args;
pub mod bare;
pub mod guest;
pub mod http;
pub mod inspector;
pub mod kata;
pub mod user_data;
