//! `podvm-volumes`: the disks of a pod VM. The agent has no right to mount; it asks this program over a unix socket.
//!
//! The modules, in the order in which a request passes them: the request's types, what the kernel says about disks and
//! mounts, which disk is meant, what is on it.

pub mod text;

pub mod volume;

pub mod roots;

pub mod mountinfo;

pub mod block;

pub mod discover;

pub mod program;

pub mod signature;

pub mod format;

pub mod mounts;

pub mod mappings;

pub mod cdh;

pub mod failure;

pub mod log;

pub mod mounting;

pub mod uevents;

pub mod service;

pub mod socket;

pub mod layout;
pub mod spare;

pub mod scratch;

pub mod cli;
