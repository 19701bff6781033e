//! What the two ends of Secure Comms agree on, and nothing that needs an operating system.
//!
//! The modules are in the order in which an operator and then a connection meet them: the configuration (phases, names,
//! tags, KBS resources), the messages of a connection (banner, hello, sessions, control messages, refusals), and the limits.
#![no_std]

extern crate alloc;

mod phase;

mod name;

pub mod tag;

mod init_data;

pub mod resource;

mod banner;

mod hello;

pub mod session;

pub mod control;

pub mod json;

mod refusal;

pub mod volumes;

pub mod limits;

pub use banner::{Banner, BannerHint, LoginState};
pub use control::{Control, Credit, KeyProgress, StreamPosition};
pub use hello::{AgentConfig, Hello, Mismatch, MismatchKind, TunnelNames};
pub use init_data::{InitDataDigest, InitDataDigestError};
pub use name::{NameError, PodId, PodIdError, TunnelName};
pub use phase::{Attestation, Kubernetes, Phase, PhaseName};
pub use refusal::{Refusal, RefusalKind, RefusalReason};
pub use session::{Lane, Opening, Position, SessionId};
pub use tag::{Bind, InboundTag, OutboundTag, PhaseSet, TagErrors, Target};
