//! Streams that outlive the connections which carry them.

pub mod stream;
