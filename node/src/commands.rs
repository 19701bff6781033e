//! What the program does: one file for each command.

pub mod caa_certs;
pub mod config;
pub mod connect;
pub mod doctor;
mod events;
pub mod keygen;
pub mod keys;
mod output;
pub mod pod;
mod screen;
pub mod serve;
pub mod status;
pub mod texts;
pub mod user_data;

use std::error::Error;
use std::io::{self, Write as _};
use std::path::Path;

use anyhow::Context as _;
use secure_comms_adaptor::store::DirectoryStore;

/// Writes a command's product to standard output: all of it, because a VM that got half of its user data would not start.
///
/// # Errors
/// It cannot be written, or its reader is gone. What people read is written by [`screen::show`].
fn print(bytes: &[u8]) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(bytes).and_then(|()| out.flush()).context("write to standard output")
}

/// Opens the key store.
fn open_store(directory: &Path) -> anyhow::Result<DirectoryStore> {
    DirectoryStore::open(directory).map_err(|error| {
        let denied = is_denied(&error);
        let error = anyhow::Error::from(error);
        if denied { anyhow::anyhow!("{error:#}: run as root, or give --store") } else { error }
    })
}

fn is_denied(error: &(dyn Error + 'static)) -> bool {
    let io = error.downcast_ref::<io::Error>();
    io.is_some_and(|error| error.kind() == io::ErrorKind::PermissionDenied)
        || error.source().is_some_and(is_denied)
}
