//! The system calls that change or read the directory, each relative to an open one, none through a symbolic link.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, OpenHow, ResolveFlag, openat, openat2, renameat};
use nix::sys::stat::{FileStat, Mode, SFlag, fchmod, fstat, fstatat, mkdirat};
use nix::unistd::{UnlinkatFlags, fsync, unlinkat};

const DIRECTORY: OFlag =
    OFlag::O_RDONLY.union(OFlag::O_DIRECTORY).union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);

/// Opens a directory by its whole path: no part of it may be a symbolic link.
pub(super) fn open_path(path: &Path) -> nix::Result<OwnedFd> {
    step()?;
    // With O_NOFOLLOW the error would say "not a directory" instead of naming the link.
    let flags = DIRECTORY.difference(OFlag::O_NOFOLLOW);
    let how = OpenHow::new().flags(flags).resolve(ResolveFlag::RESOLVE_NO_SYMLINKS);
    openat2(AT_FDCWD, path, how)
}

/// Opens a directory in another.
pub(super) fn open_directory(parent: impl AsFd, name: &str) -> nix::Result<OwnedFd> {
    step()?;
    openat(parent, name, DIRECTORY, Mode::empty())
}

/// What `name` is; `None` if there is nothing.
pub(super) fn look(parent: impl AsFd, name: &str) -> nix::Result<Option<FileStat>> {
    step()?;
    match fstatat(parent, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::ENOENT) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// Whether it is a regular file, rather than a link, a pipe or a device.
pub(super) fn is_regular(stat: &FileStat) -> bool {
    SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFREG
}

/// Makes a directory with exactly this mode, whatever the umask.
pub(super) fn make_directory(parent: impl AsFd, name: &Path, mode: Mode) -> nix::Result<OwnedFd> {
    step()?;
    mkdirat(&parent, name, mode)?;
    let made = openat(parent, name, DIRECTORY, Mode::empty())?;
    fchmod(&made, mode)?;
    Ok(made)
}

/// Writes a file that does not exist yet, with exactly this mode, and waits until it is on the disk.
pub(super) fn create(parent: impl AsFd, name: &str, content: &[u8], mode: Mode) -> io::Result<()> {
    step()?;
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let mut file = File::from(openat(parent, name, flags, Mode::S_IRUSR | Mode::S_IWUSR)?);
    step()?;
    file.write_all(content)?;
    step()?;
    fchmod(&file, mode)?;
    fsync(&file)?;
    Ok(())
}

/// Reads a regular file of at most `limit` bytes; `None` if there is nothing.
pub(super) fn read(parent: impl AsFd, name: &str, limit: u64) -> io::Result<Option<Vec<u8>>> {
    step()?;
    // A pipe must not block the start.
    let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let file = match openat(parent, name, flags, Mode::empty()) {
        Ok(file) => File::from(file),
        Err(Errno::ENOENT) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    };
    if !is_regular(&fstat(&file)?) {
        return Err(Errno::EINVAL.into());
    }
    let mut content = Vec::new();
    file.take(limit.saturating_add(1)).read_to_end(&mut content)?;
    if content.len() as u64 > limit {
        return Err(Errno::EFBIG.into());
    }
    Ok(Some(content))
}

/// Gives a file or a directory another name, in one step.
pub(super) fn rename(from: impl AsFd, old: &str, to: impl AsFd, new: &str) -> nix::Result<()> {
    step()?;
    renameat(from, old, to, new)
}

/// Removes a file, if it is there.
pub(super) fn remove(parent: impl AsFd, name: &str) -> nix::Result<()> {
    step()?;
    unless_missing(unlinkat(parent, name, UnlinkatFlags::NoRemoveDir))
}

/// Removes an empty directory, if it is there.
pub(super) fn remove_directory(parent: impl AsFd, name: &str) -> nix::Result<()> {
    step()?;
    unless_missing(unlinkat(parent, name, UnlinkatFlags::RemoveDir))
}

/// Waits until the names of a directory are on the disk.
pub(super) fn sync(directory: impl AsFd) -> nix::Result<()> {
    step()?;
    fsync(directory)
}

fn unless_missing(result: nix::Result<()>) -> nix::Result<()> {
    match result {
        Err(Errno::ENOENT) => Ok(()),
        result => result,
    }
}

#[cfg(not(test))]
fn step() -> nix::Result<()> {
    Ok(())
}

#[cfg(test)]
fn step() -> nix::Result<()> {
    faults::step()
}

/// Stops the program, or fails, before the n-th system call.
#[cfg(test)]
pub(super) mod faults {
    use std::cell::Cell;

    use nix::errno::Errno;

    #[derive(Clone, Copy)]
    pub(crate) enum Fault {
        /// As kill -9 does: no destructor runs.
        Kill,
        Error(Errno),
    }

    thread_local! {
        static NEXT: Cell<Option<(u32, Fault)>> = const { Cell::new(None) };
    }

    /// Lets `after` system calls pass, then comes the fault, once.
    pub(crate) fn inject(after: u32, fault: Fault) {
        NEXT.set(Some((after, fault)));
    }

    /// Whether the fault has come; also takes back one that has not.
    pub(crate) fn came() -> bool {
        NEXT.take().is_none()
    }

    pub(super) fn step() -> nix::Result<()> {
        match NEXT.get() {
            None => Ok(()),
            Some((0, fault)) => {
                NEXT.set(None);
                match fault {
                    Fault::Kill => loop {
                        nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL)?;
                    },
                    Fault::Error(errno) => Err(errno),
                }
            }
            Some((after, fault)) => {
                NEXT.set(Some((after - 1, fault)));
                Ok(())
            }
        }
    }
}
