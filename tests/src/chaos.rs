//! Pod lifetimes under faults: each is drawn from a seed, runs the real binaries, and is checked against the requirements.
//!
//! In the order of a lifetime:
//!
//! - `script`: what is drawn from the seed: path, phase, faults and their times;
//! - `pod_scene`: the pod and everything around it; `program`: its processes and their supervisor; `disk`: their disks;
//! - `hostile_cloud`: the user data and the KBS's answers that the cloud forges;
//! - `traffic`: clients at every inbound that check each byte; `attacker`: connects to the agent without keys;
//! - `fault`: injects a fault, and removes it again;
//! - `lifetime`: all of that in sequence; `secrets`, `resources`: the checks at the end;
//! - `soak`: one pod that reconnects many times; `leftovers`: what the run left on this machine;
//! - `summary`: summary of many lifetimes.

pub mod script;

pub mod disk;
mod pod_scene;
mod program;

mod attacker;
mod fault;
mod hostile_cloud;
mod traffic;

pub mod lifetime;

mod resources;
mod secrets;

pub mod leftovers;
pub mod soak;

pub mod summary;
