//! The service's socket: systemd's, or one of our own that only root can reach.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use listenfd::ListenFd;
use nix::sys::stat::{Mode, umask};

use crate::mounts;

/// The socket that systemd passes on, or else a new one at the path.
///
/// # Errors
/// systemd's is no unix stream socket; the path is not absolute, its directory is open to others, or something listens there.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    if let Some(listener) = ListenFd::from_env().take_unix_listener(0)? {
        return Ok(listener);
    }
    // An empty one would become an address outside of the file system, which no file permissions protect.
    if !path.is_absolute() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not an absolute path"));
    }
    if let Some(directory) = path.parent() {
        mounts::make_directory(directory)?;
        if fs::metadata(directory)?.permissions().mode() & 0o022 != 0 {
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, "others may write to its directory"));
        }
    }
    remove_stale(path)?;
    // No other thread is there yet that makes files.
    let before = umask(Mode::from_bits_truncate(0o177));
    let listener = UnixListener::bind(path);
    umask(before);
    listener
}

/// Removes the socket of a process that has ended.
fn remove_stale(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Ok(metadata) if metadata.file_type().is_socket() => match UnixStream::connect(path) {
            Ok(_) => Err(io::Error::new(io::ErrorKind::AddrInUse, "another process listens there")),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
            Err(error) => Err(error),
        },
        Ok(_) => Err(io::Error::new(io::ErrorKind::AlreadyExists, "not a socket")),
        Err(error) => Err(error),
    }
}
