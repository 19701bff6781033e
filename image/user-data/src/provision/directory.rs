//! Puts a set of files in place, or leaves the one that is there.
//!
//! The names are fixed and readers take no symbolic links, so no single step can exchange ten files. Three hidden directories stand
//! for how far a run came; each name is given in one step:
//!
//! | there is | what a later run does |
//! | --- | --- |
//! | `.staging`: a set that is being written | removes it: the old set stays |
//! | `.clearing`: a whole set, on the disk; old files are being removed | goes on, to the end: the new set |
//! | `.installing`: old files are gone; new ones are being renamed into place | goes on, to the end: the new set |
//!
//! `aa.toml` is the first file to go and the last to come: while it is there, the set is whole and of one run. Disk space is needed
//! for `.staging` only; what follows renames and removes.

mod sys;

use std::ffi::OsStr;
use std::fs::{File, TryLockError};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::stat::Mode;
use nix::unistd::geteuid;

use super::plan::{Earlier, FileSet};
use crate::files::FileName;

const STAGING: &str = ".staging";
const CLEARING: &str = ".clearing";
const INSTALLING: &str = ".installing";

/// The order in which files appear: what others start on comes last.
const ORDER: [FileName; 10] = [
    FileName::InitDataToml,
    FileName::InitDataDigest,
    FileName::InitData,
    FileName::Policy,
    FileName::SecureComms,
    FileName::ConfidentialDataHub,
    FileName::Auth,
    FileName::ScratchSpaceMarker,
    FileName::Apf,
    FileName::AttestationAgent,
];

/// The largest file that is read back; as much as the largest user data.
const READ_MAX: u64 = 1024 * 1024;
/// How often the lock is tried, with a pause in between: a holder only writes files, so it is done soon.
const LOCK_TRIES: u32 = 200;
const LOCK_PAUSE: Duration = Duration::from_millis(50);

/// Why the files can't be read or written. Unless it says otherwise the old set is still in place.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// A system call failed.
    #[error("{action} {}", path.display())]
    System {
        /// What was done: "creating", "renaming".
        action: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        cause: io::Error,
    },
    /// Something else than a file has one of the names.
    #[error("{}: not a regular file; remove it", .0.display())]
    NotRegular(PathBuf),
    /// Others could exchange the files.
    #[error("{}: other users can write to it; make it a directory of root with mode 0755 or 0700", .0.display())]
    Insecure(PathBuf),
    /// Another run holds the lock.
    #[error("{}: locked by another run for more than 10 s; check for a process-user-data that hangs", .0.display())]
    Busy(PathBuf),
}

/// The directory of the files, locked: two runs never write at once.
#[derive(Debug)]
pub struct Directory {
    // Its lock goes with it.
    fd: File,
    path: PathBuf,
}

/// A set that is written but out of sight. Dropped without [`Staged::commit`], it is removed.
#[derive(Debug)]
pub struct Staged<'a> {
    directory: &'a Directory,
    state: State,
}

#[derive(Debug, PartialEq, Eq)]
enum State {
    Unchanged,
    Written,
    Committed,
}

/// What became of a set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was in place already, byte for byte; nothing was written.
    Unchanged,
    /// It is in place.
    Written,
}

impl Directory {
    /// Opens the directory, makes it (0755) if it is missing, waits for the lock (10 s at most), and finishes or discards what a
    /// run that was killed left.
    ///
    /// # Errors
    /// No part of the path may be a symbolic link, no other user may write to the directory.
    pub fn open(path: &Path) -> Result<Self, WriteError> {
        let failed = |action| {
            move |errno: Errno| WriteError::System { action, path: path.to_owned(), cause: errno.into() }
        };
        let fd = match sys::open_path(path) {
            Err(Errno::ENOENT) => make(path).map_err(failed("making"))?,
            result => result.map_err(failed("opening"))?,
        };
        let stat = nix::sys::stat::fstat(&fd).map_err(failed("looking at"))?;
        let others = Mode::S_IWGRP | Mode::S_IWOTH;
        if stat.st_uid != geteuid().as_raw() || Mode::from_bits_truncate(stat.st_mode).intersects(others) {
            return Err(WriteError::Insecure(path.to_owned()));
        }
        let directory = Self { fd: File::from(fd), path: path.to_owned() };
        directory.lock()?;
        directory.recover()?;
        Ok(directory)
    }

    /// What an earlier run, or cloud-init, left there.
    ///
    /// # Errors
    /// A file that is not regular, larger than 1 MiB, or can't be read.
    pub fn earlier(&self) -> Result<Earlier, WriteError> {
        Ok(Earlier {
            init_data: self.read(FileName::InitData)?,
            digest: self.read(FileName::InitDataDigest)?,
        })
    }

    /// Writes the whole set, out of sight of every reader, and waits until it is on the disk.
    ///
    /// # Errors
    /// The old set stays, and nothing of the new one.
    pub fn stage(&self, set: &FileSet) -> Result<Staged<'_>, WriteError> {
        for name in ORDER {
            let stat =
                sys::look(&self.fd, name.as_str()).map_err(self.failed("looking at", name.as_str()))?;
            if stat.is_some_and(|stat| !sys::is_regular(&stat)) {
                return Err(WriteError::NotRegular(self.path.join(name.as_str())));
            }
        }
        if self.has(set)? {
            return Ok(Staged { directory: self, state: State::Unchanged });
        }
        // From here on the drop removes what is there.
        let staged = Staged { directory: self, state: State::Written };
        let staging = sys::make_directory(&self.fd, Path::new(STAGING), Mode::S_IRWXU)
            .map_err(self.failed("making", STAGING))?;
        for (name, content) in set.files() {
            sys::create(&staging, name.as_str(), content, mode(name))
                .map_err(|cause| self.error("writing", name.as_str(), cause))?;
        }
        sys::sync(&staging).map_err(self.failed("writing", STAGING))?;
        Ok(staged)
    }

    fn lock(&self) -> Result<(), WriteError> {
        for attempt in 0..LOCK_TRIES {
            if attempt > 0 {
                std::thread::sleep(LOCK_PAUSE);
            }
            match self.fd.try_lock() {
                Ok(()) => return Ok(()),
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(cause)) => return Err(self.error("locking", ".", cause)),
            }
        }
        Err(WriteError::Busy(self.path.clone()))
    }

    /// Finishes what was committed, discards what was not.
    fn recover(&self) -> Result<(), WriteError> {
        self.discard()?;
        if let Some(set) = self.open_hidden(CLEARING)? {
            self.clear(&set)?;
        }
        if let Some(set) = self.open_hidden(INSTALLING)? {
            self.install(&set)?;
        }
        Ok(())
    }

    fn discard(&self) -> Result<(), WriteError> {
        let Some(staging) = self.open_hidden(STAGING)? else { return Ok(()) };
        for name in ORDER {
            sys::remove(&staging, name.as_str()).map_err(self.failed("removing", name.as_str()))?;
        }
        sys::remove_directory(&self.fd, STAGING).map_err(self.failed("removing", STAGING))
    }

    /// Removes what must not be there while the new files come: the trigger, and all that the new set does not bring.
    fn clear(&self, set: &OwnedFd) -> Result<(), WriteError> {
        for name in ORDER.into_iter().rev() {
            let stays = name != FileName::AttestationAgent
                && sys::look(set, name.as_str()).map_err(self.failed("looking at", name.as_str()))?.is_some();
            if !stays {
                sys::remove(&self.fd, name.as_str()).map_err(self.failed("removing", name.as_str()))?;
            }
        }
        self.rename_hidden(CLEARING, INSTALLING)
    }

    fn install(&self, set: &OwnedFd) -> Result<(), WriteError> {
        for name in ORDER {
            match sys::rename(set, name.as_str(), &self.fd, name.as_str()) {
                // Not in the set, or moved by the run before.
                Err(Errno::ENOENT) => {}
                result => result.map_err(self.failed("renaming", name.as_str()))?,
            }
        }
        sys::sync(&self.fd).map_err(self.failed("writing", "."))?;
        sys::remove_directory(&self.fd, INSTALLING).map_err(self.failed("removing", INSTALLING))
    }

    fn rename_hidden(&self, old: &str, new: &str) -> Result<(), WriteError> {
        sys::rename(&self.fd, old, &self.fd, new).map_err(self.failed("renaming", old))?;
        sys::sync(&self.fd).map_err(self.failed("writing", "."))
    }

    fn open_hidden(&self, name: &'static str) -> Result<Option<OwnedFd>, WriteError> {
        match sys::open_directory(&self.fd, name) {
            Ok(found) => Ok(Some(found)),
            Err(Errno::ENOENT) => Ok(None),
            Err(errno) => Err(self.error("opening", name, errno.into())),
        }
    }

    /// Whether exactly this set is in place: its files with their modes, and none of the others.
    fn has(&self, set: &FileSet) -> Result<bool, WriteError> {
        for name in ORDER {
            let stat =
                sys::look(&self.fd, name.as_str()).map_err(self.failed("looking at", name.as_str()))?;
            let same = match (set.get(name), stat) {
                (None, None) => true,
                (Some(new), Some(stat)) => {
                    stat.st_uid == geteuid().as_raw()
                        && Mode::from_bits_truncate(stat.st_mode) == mode(name)
                        && u64::try_from(stat.st_size) == Ok(new.len() as u64)
                        && self.read(name)?.is_some_and(|old| old == new)
                }
                _ => false,
            };
            if !same {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn read(&self, name: FileName) -> Result<Option<Vec<u8>>, WriteError> {
        sys::read(&self.fd, name.as_str(), READ_MAX)
            .map_err(|cause| self.error("reading", name.as_str(), cause))
    }

    fn failed(&self, action: &'static str, name: &str) -> impl FnOnce(Errno) -> WriteError {
        let path = self.path.join(name);
        move |cause| WriteError::System { action, path, cause: cause.into() }
    }

    fn error(&self, action: &'static str, name: &str, cause: io::Error) -> WriteError {
        WriteError::System { action, path: self.path.join(name), cause }
    }
}

impl Staged<'_> {
    /// Puts the set in place, and removes the files of an earlier run that it does not bring.
    ///
    /// # Errors
    /// The next [`Directory::open`] either finishes the set or removes it; until then there is no `aa.toml` if some of the new
    /// files are in place.
    pub fn commit(mut self) -> Result<Outcome, WriteError> {
        if self.state == State::Unchanged {
            return Ok(Outcome::Unchanged);
        }
        // From this rename on the new set counts.
        sys::rename(&self.directory.fd, STAGING, &self.directory.fd, CLEARING)
            .map_err(self.directory.failed("renaming", STAGING))?;
        self.state = State::Committed;
        sys::sync(&self.directory.fd).map_err(self.directory.failed("writing", "."))?;
        self.directory.recover()?;
        Ok(Outcome::Written)
    }
}

impl Drop for Staged<'_> {
    fn drop(&mut self) {
        if self.state == State::Written {
            // What can't be removed now is removed by the next run; the fault that led here is the one to report.
            let _ = self.directory.discard();
        }
    }
}

/// Makes the last part of the path.
fn make(path: &Path) -> nix::Result<OwnedFd> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).ok_or(Errno::ENOENT)?;
    let name = path.file_name().filter(|name| *name != OsStr::new("..")).ok_or(Errno::EINVAL)?;
    let parent = sys::open_path(parent)?;
    let mode = Mode::S_IRWXU | Mode::S_IRGRP | Mode::S_IXGRP | Mode::S_IROTH | Mode::S_IXOTH;
    match sys::make_directory(parent.as_fd(), Path::new(name), mode) {
        // Another run was quicker.
        Err(Errno::EEXIST) => sys::open_path(path),
        result => result,
    }
}

/// The pod's TLS key and the credentials for registries are for root alone. Init-data are known to the cluster and to the cloud.
fn mode(name: FileName) -> Mode {
    let owner = Mode::S_IRUSR | Mode::S_IWUSR;
    match name {
        FileName::Apf | FileName::Auth => owner,
        _ => owner | Mode::S_IRGRP | Mode::S_IROTH,
    }
}

#[cfg(test)]
mod tests;
