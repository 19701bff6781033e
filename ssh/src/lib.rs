//! The part of SSH that both ends of Secure Comms share.
//!
//! The modules are in the order in which a connection uses them. The [`profile`] sets the algorithms and limits that
//! both ends require. The SSH session reads and writes a [`guard`]ed socket. Its channels become the streams of the tunnel
//! crate ([`channel`]), opened on a [`link`]. One channel carries the [`control`] messages.
//!
//! russh is named here, in the agent's SSH server and in the adaptor's SSH client; nowhere else.
//! Defects of russh 0.65.1 that this crate works around are named D1 to D4 in docs/PROTOCOL.md, section 12.

pub mod profile;

pub mod guard;

pub mod channel;

pub mod link;

pub mod control;
