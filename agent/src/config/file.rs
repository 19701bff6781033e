//! Waiting for the daemon config's file, apf.json. It is written from the VM's user data, at any time during the boot.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use secure_comms_protocol::limits::START_EXTENSION;
use serde::de::IgnoredAny;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, interval};
use zeroize::Zeroizing;

use super::daemon_config::DaemonConfig;
use crate::os::log_limits::Repeated;
use crate::os::systemd::Notifier;

/// The largest daemon config, in bytes.
const SIZE_MAX: usize = 1024 * 1024;

/// Why there is no daemon config.
#[derive(Debug, thiserror::Error)]
pub enum DaemonConfigError {
    /// The file exists, but can't be read.
    #[error("reading the daemon config {}: {source}; make it a file that this service may read", path.display())]
    Read {
        /// Path of the daemon config.
        path: PathBuf,
        /// Error of the system.
        source: io::Error,
    },
    /// The file is too long.
    #[error("reading the daemon config {}: longer than {SIZE_MAX} bytes; check the VM's user data", path.display())]
    TooLong {
        /// Path of the daemon config.
        path: PathBuf,
    },
    /// The file is not a daemon config.
    #[error("reading the daemon config {}: {source}; correct the VM's user data", path.display())]
    Parse {
        /// Path of the daemon config.
        path: PathBuf,
        /// Error with line and column.
        source: serde_json::Error,
    },
    /// The file does not exist, and its directory can't be watched.
    #[error("waiting for the daemon config {}: watching {}: {source}; write it before this service starts", path.display(), directory.display())]
    Watch {
        /// Path of the daemon config.
        path: PathBuf,
        /// Directory that can't be watched.
        directory: PathBuf,
        /// Error of the system.
        source: io::Error,
    },
}

/// The state of the file.
enum Found {
    Complete(Box<DaemonConfig>),
    Missing,
    /// The JSON is truncated: the file is still being written.
    Truncated(serde_json::Error),
}

/// Waits until the daemon config exists and is complete, and reads it. Until then, reports the wait to systemd and extends
/// the start timeout.
///
/// # Errors
/// The file exists and is not a daemon config, or can't be waited for.
pub async fn wait_for(path: &Path, notifier: &Notifier) -> Result<DaemonConfig, DaemonConfigError> {
    let mut waiting = Repeated::new(format!("waiting for the daemon config {}", path.display()));
    let mut extension = interval(START_EXTENSION / 2);
    let (began, mut missed) = (Instant::now(), false);
    loop {
        // Before the file is read, so that a write in between is an event.
        let watch = watch(path)?;
        let state = match look(path)? {
            Found::Complete(config) => {
                if missed {
                    let waited = began.elapsed().as_secs_f64();
                    log::info!("daemon config {} found after {waited:.1} s", path.display());
                }
                return Ok(*config);
            }
            Found::Missing => "it is not there yet".to_owned(),
            Found::Truncated(error) => format!("it is not complete yet: {error}"),
        };
        missed = true;
        waiting.failed(&state);
        notifier.status(&format!("waiting for the daemon config {}: {state}", path.display()));
        let changed = async {
            loop {
                tokio::select! {
                    changed = watch.ready(Interest::READABLE) => return changed,
                    _ = extension.tick() => notifier.extend_start(START_EXTENSION),
                }
            }
        };
        drop(changed.await.map_err(|source| watch_error(path, path, source))?);
    }
}

fn look(path: &Path) -> Result<Found, DaemonConfigError> {
    let read_error = |source| DaemonConfigError::Read { path: path.to_owned(), source };
    let file = match File::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Found::Missing),
        file => file.map_err(read_error)?,
    };
    // The file holds a private key: the buffer is wiped, and sized first, because one that grows leaves copies behind.
    let size = file.metadata().map_err(read_error)?.len();
    let size = usize::try_from(size).unwrap_or(SIZE_MAX).min(SIZE_MAX);
    let mut text = Zeroizing::new(Vec::with_capacity(size + 1024));
    file.take(SIZE_MAX as u64 + 1).read_to_end(&mut text).map_err(read_error)?;
    if text.len() > SIZE_MAX {
        return Err(DaemonConfigError::TooLong { path: path.to_owned() });
    }
    match serde_json::from_slice(&text) {
        Ok(config) => Ok(Found::Complete(Box::new(config))),
        Err(error) if ends_early(&text) => Ok(Found::Truncated(error)),
        Err(source) => Err(DaemonConfigError::Parse { path: path.to_owned(), source }),
    }
}

/// Whether the text is the beginning of valid JSON. The error of our own visitor does not show it.
fn ends_early(text: &[u8]) -> bool {
    serde_json::from_slice::<IgnoredAny>(text).is_err_and(|error| error.is_eof())
}

/// Watches the nearest existing directory above the file. Readable once the file may have been created or changed.
fn watch(path: &Path) -> Result<AsyncFd<OwnedFd>, DaemonConfigError> {
    let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)
        .map_err(|errno| watch_error(path, path, errno.into()))?;
    let events = AddWatchFlags::IN_CLOSE_WRITE
        | AddWatchFlags::IN_CREATE
        | AddWatchFlags::IN_MOVED_TO
        | AddWatchFlags::IN_ATTRIB
        | AddWatchFlags::IN_DELETE_SELF
        | AddWatchFlags::IN_MOVE_SELF
        | AddWatchFlags::IN_ONLYDIR;
    for directory in path.ancestors().skip(1) {
        match inotify.add_watch(directory, events) {
            Ok(_) => {
                #[expect(
                    deprecated,
                    reason = "its successor is unsafe for types that change their file; OwnedFd does not"
                )]
                let watch = AsyncFd::with_interest(OwnedFd::from(inotify), Interest::READABLE);
                return watch.map_err(|source| watch_error(path, directory, source));
            }
            Err(Errno::ENOENT) => {}
            Err(errno) => return Err(watch_error(path, directory, errno.into())),
        }
    }
    Err(watch_error(path, path, ErrorKind::NotFound.into()))
}

fn watch_error(path: &Path, directory: &Path, source: io::Error) -> DaemonConfigError {
    DaemonConfigError::Watch { path: path.to_owned(), directory: directory.to_owned(), source }
}

#[cfg(test)]
#[path = "file_tests.rs"]
mod tests;
