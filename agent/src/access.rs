//! Who may come in.

pub mod latch;
pub mod policy;
