//! What the two ends of Secure Comms agree on, and nothing that needs an operating system.
//!
//! In the order an operator meets them: [`phase`]s, [`name`]s, the [`tag`]s that configure tunnels, the
//! KBS [`resource`]s that carry the keys, the [`control`] messages on a connection, and the [`limits`]
//! that bound every wait and every buffer.
#![no_std]

extern crate alloc;

pub mod control;
pub mod limits;
pub mod name;
pub mod phase;
pub mod resource;
pub mod tag;

pub use control::{Control, Credit, Hello, KeyProgress};
pub use name::{NameError, PodId, PodIdError, TunnelName};
pub use phase::{Attestation, Kubernetes, Phase, PhaseName};
pub use tag::{Bind, InboundTag, OutboundTag, PhaseSet, TagErrors, Target};
