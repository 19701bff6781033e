//! The simulators behave as the systems that they stand for.

// clippy.toml allows these in `#[test]` functions; the helpers of a test program are tests as well.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod caa;
mod guest;
mod http;
mod kata;
mod kbs;
