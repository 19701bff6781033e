//! The latched keys: stored until the VM reboots, so that a restarted agent does not attest again.
//!
//! The directory must be on a tmpfs, which is encrypted memory in a confidential VM. Everything here fails closed: a file
//! that another user could have written, or that can't be read, is an error and never "no keys". Without keys the agent
//! would attest again, and an attacker that answers as the KBS would own a VM that already runs a pod.

use std::fs::{DirBuilder, File};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat, renameat};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, geteuid, unlinkat};
use secure_comms_protocol::limits::KEY_MAX;
use zeroize::Zeroizing;

use crate::keys::{KeyError, PodKeys};

const FILE: &str = "keys";
const TEMPORARY: &str = "keys.new";
/// The first line, so that a later version knows what it reads.
const HEADER: &str = "secure-comms latch 1\n";
const FILE_MAX: usize = 2 * KEY_MAX + HEADER.len();

/// Why the latched keys can't be read or written.
#[derive(Debug, thiserror::Error)]
pub enum LatchError {
    /// A system call failed.
    #[error("{doing} {}: {source}; check the directory, or reboot the VM to start over", path.display())]
    Io {
        /// The action that failed.
        doing: &'static str,
        /// Path of the file or directory.
        path: PathBuf,
        /// Error of the system.
        source: std::io::Error,
    },
    /// Another user could have written or could read it.
    #[error(
        "checking the latched keys in {}: {fault}; it must be ours alone; reboot the VM to start over", path.display()
    )]
    Exposed {
        /// Path of the file or directory.
        path: PathBuf,
        /// The fault.
        fault: String,
    },
    /// The content is not what this agent wrote.
    #[error("reading the latched keys in {}: {fault}; reboot the VM to start over", path.display())]
    Broken {
        /// Path of the file.
        path: PathBuf,
        /// The fault.
        fault: String,
    },
    /// The keys have no text form.
    #[error("writing the latched keys: {0}")]
    Encode(#[from] KeyError),
}

/// The directory of the latched keys.
#[derive(Clone, Debug)]
pub(crate) struct Latch {
    directory: PathBuf,
}

impl Latch {
    /// The keys in `directory`, which need not exist yet.
    pub(crate) fn new(directory: impl Into<PathBuf>) -> Self {
        Self { directory: directory.into() }
    }

    /// Reads the keys of this boot; `None` if none were stored.
    ///
    /// # Errors
    /// The keys exist and can't be trusted or read. The caller must not continue without them.
    pub(crate) fn load(&self) -> Result<Option<PodKeys>, LatchError> {
        let Some(directory) = self.open_directory()? else { return Ok(None) };
        let path = self.directory.join(FILE);
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
        let file = match openat(&directory, FILE, flags, Mode::empty()) {
            Err(Errno::ENOENT) => return Ok(None),
            Err(Errno::ELOOP) => return Err(exposed(&path, "it is a symbolic link")),
            file => File::from(file.map_err(|errno| io_error("opening", &path, errno.into()))?),
        };
        check(&file, &path, Kind::File)?;
        let mut text = Zeroizing::new(String::with_capacity(FILE_MAX + 1));
        let read = file.take(FILE_MAX as u64 + 1).read_to_string(&mut text);
        read.map_err(|error| io_error("reading", &path, error))?;
        let broken = |fault: &str| LatchError::Broken { path: path.clone(), fault: fault.to_owned() };
        let keys =
            text.strip_prefix(HEADER).ok_or_else(|| broken("not written by this agent, or cut short"))?;
        PodKeys::from_text(keys).map(Some).map_err(|error| broken(&error.to_string()))
    }

    /// Stores the keys for the rest of this boot: whole or not at all.
    ///
    /// # Errors
    /// They could not be stored safely.
    pub(crate) fn store(&self, keys: &PodKeys) -> Result<(), LatchError> {
        let text = keys.to_text()?;
        self.make_directory()?;
        let directory = self.open_directory()?;
        let directory =
            directory.ok_or_else(|| io_error("opening", &self.directory, ErrorKind::NotFound.into()))?;
        let path = self.directory.join(TEMPORARY);
        // Left behind by a crash. O_EXCL below then ensures that the file is new and ours.
        match unlinkat(&directory, TEMPORARY, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => {}
            Err(errno) => return Err(io_error("removing", &path, errno.into())),
        }
        self.write_new(&directory, &path, &text).inspect_err(|_| {
            // Best effort: the fault itself is what the caller needs to see.
            let _ = unlinkat(&directory, TEMPORARY, UnlinkatFlags::NoRemoveDir);
        })
    }

    fn write_new(&self, directory: &OwnedFd, path: &Path, text: &str) -> Result<(), LatchError> {
        let failed = |doing| move |errno: Errno| io_error(doing, path, errno.into());
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let file = openat(directory, TEMPORARY, flags, Mode::S_IRUSR | Mode::S_IWUSR);
        let mut file = File::from(file.map_err(failed("creating"))?);
        let written = file.write_all(HEADER.as_bytes()).and_then(|()| file.write_all(text.as_bytes()));
        written.and_then(|()| file.sync_all()).map_err(|error| io_error("writing", path, error))?;
        renameat(directory, TEMPORARY, directory, FILE).map_err(failed("renaming"))?;
        nix::unistd::fsync(directory.as_fd()).map_err(failed("syncing the directory of"))
    }

    fn make_directory(&self) -> Result<(), LatchError> {
        let mut builder = DirBuilder::new();
        match builder.mode(0o700).create(&self.directory) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                builder.recursive(true).create(&self.directory)
            }
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
            made => made,
        }
        .map_err(|error| io_error("making the directory", &self.directory, error))
    }

    fn open_directory(&self) -> Result<Option<OwnedFd>, LatchError> {
        let path = &self.directory;
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let directory = match open(path, flags, Mode::empty()) {
            Err(Errno::ENOENT) => return Ok(None),
            Err(Errno::ELOOP | Errno::ENOTDIR) => {
                return Err(exposed(path, "it is not a directory, or a symbolic link"));
            }
            directory => directory.map_err(|errno| io_error("opening", path, errno.into()))?,
        };
        let directory = File::from(directory);
        check(&directory, path, Kind::Directory)?;
        Ok(Some(directory.into()))
    }
}

#[derive(Clone, Copy)]
enum Kind {
    File,
    Directory,
}

/// Checks that only our user has access. Through the descriptor, so that the file can't be replaced in between.
fn check(file: &File, path: &Path, kind: Kind) -> Result<(), LatchError> {
    let metadata = file.metadata().map_err(|error| io_error("checking", path, error))?;
    let right_kind = match kind {
        Kind::File => metadata.is_file(),
        Kind::Directory => metadata.is_dir(),
    };
    if !right_kind {
        return Err(exposed(path, "it is not a regular file"));
    }
    if metadata.uid() != geteuid().as_raw() {
        return Err(exposed(path, format!("it belongs to user {}", metadata.uid())));
    }
    let mode = metadata.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(exposed(path, format!("its mode is {mode:04o}, so that others have access")));
    }
    Ok(())
}

fn exposed(path: &Path, fault: impl Into<String>) -> LatchError {
    LatchError::Exposed { path: path.to_owned(), fault: fault.into() }
}

fn io_error(doing: &'static str, path: &Path, source: std::io::Error) -> LatchError {
    LatchError::Io { doing, path: path.to_owned(), source }
}

#[cfg(test)]
#[path = "latch_tests.rs"]
mod tests;
