//! What the program does: one file for each command.

pub mod connect;
pub mod keygen;
mod output;
pub mod user_data;

use std::io::Write as _;

use anyhow::Context as _;

/// Writes a command's result to standard output.
fn print(bytes: &[u8]) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(bytes).and_then(|()| out.flush()).context("write to standard output")
}
