//! What the two SSH ends of Secure Comms share, and the only crate besides their `ssh.rs` that names russh.
//!
//! The [`profile`] says which algorithms and limits both ends insist on. A connection's socket goes in
//! [`guard`]ed; its channels come out as the tunnel crate's streams ([`channel`]), opened on a [`link`]; one
//! channel carries the [`control`] messages. Defects of russh 0.65.1 that this crate lives with are named D1 to D4
//! in docs/PROTOCOL.md.

pub mod channel;
pub mod control;
pub mod guard;
pub mod link;
pub mod profile;
