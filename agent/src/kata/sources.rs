//! Makes missing sources of bind mounts, below a list of prefixes only, and through no link.
//!
//! The agent is root, and no policy has seen the request yet: a path of its choice would be one in the VM's system, and a
//! link that a container has put into a volume would lead there. So each directory is opened from the one above it, which
//! stays open: what is renamed or replaced while it is open is not followed.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, mkdirat, umask};

/// Mode of a directory that is made: the container may have any user.
const MODE: u32 = 0o755;

/// The directories below which sources are made. Paths are compared as written, without `.` and doubled slashes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountPrefixes(Arc<[PathBuf]>);

/// What the kata agent has for a pod, cloud volumes, and the volumes of a kubelet.
const DEFAULT: [&str; 3] = ["/run/kata-containers", "/run/cloud-volumes", "/var/lib/kubelet"];

impl Default for MountPrefixes {
    fn default() -> Self {
        Self(DEFAULT.iter().map(PathBuf::from).collect())
    }
}

impl FromStr for MountPrefixes {
    type Err = String;

    /// Reads a comma separated list. An empty one lets no source be made.
    fn from_str(text: &str) -> Result<Self, String> {
        let paths = text.split(',').map(str::trim).filter(|path| !path.is_empty()).map(|path| {
            let is_plain = |part| matches!(part, Component::RootDir | Component::Normal(_));
            let path = Path::new(path);
            if path.is_absolute() && path.components().all(is_plain) {
                Ok(path.to_owned())
            } else {
                Err(format!(
                    "expected absolute paths without '..', comma separated; '{}' is none",
                    path.display()
                ))
            }
        });
        paths.collect::<Result<_, _>>().map(Self)
    }
}

impl std::fmt::Display for MountPrefixes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let paths: Vec<_> = self.0.iter().map(|path| path.display().to_string()).collect();
        f.write_str(&paths.join(","))
    }
}

/// What was done about a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// It exists, and was left alone.
    Exists,
    /// It was made.
    Made,
    /// It is missing, and is not made.
    Left(Why),
}

/// Why a source is not made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Why {
    /// No prefix is above it.
    #[error("it is not below -secure-comms-mount-prefixes")]
    Elsewhere,
    /// Its path goes up.
    #[error("its path has a '..'")]
    Parent,
    /// Below the prefix there is a link.
    #[error("its path leads through a link")]
    Link,
}

/// Gives this thread a umask of its own, so that directories get the mode they are made with and need no change after.
///
/// # Errors
/// The kernel refuses.
pub(super) fn own_umask() -> io::Result<()> {
    unshare(CloneFlags::CLONE_FS)?;
    umask(Mode::from_bits_truncate(0o777 & !MODE));
    Ok(())
}

/// Makes a source, if it is missing.
///
/// # Errors
/// It may be made, and can't be.
pub(super) fn make(source: &Path, prefixes: &MountPrefixes) -> io::Result<Source> {
    if source.exists() {
        return Ok(Source::Exists);
    }
    if source.components().any(|part| part == Component::ParentDir) {
        return Ok(Source::Left(Why::Parent));
    }
    let below = prefixes.0.iter().find_map(|prefix| Some((prefix, source.strip_prefix(prefix).ok()?)));
    let Some((prefix, rest)) = below else { return Ok(Source::Left(Why::Elsewhere)) };
    match make_below(prefix, rest) {
        Ok(()) => Ok(Source::Made),
        Err(Errno::ELOOP) => Ok(Source::Left(Why::Link)),
        Err(Errno::ENOSYS) => Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "openat2 is missing, without which a link could lead anywhere; use Linux 5.6 or later, and no \
             RestrictSUIDSGID= in the unit, which forbids it",
        )),
        Err(errno) => Err(errno.into()),
    }
}

/// Makes the directories of `rest` below `prefix`, which the operator chose: links in it are followed.
fn make_below(prefix: &Path, rest: &Path) -> Result<(), Errno> {
    let mut directory = open_prefix(prefix).map_err(errno)?;
    for part in rest.components() {
        // Only names are left: the path is absolute, and has no '..'.
        let Component::Normal(name) = part else { continue };
        directory = match open_below(&directory, name.as_ref()) {
            Err(Errno::ENOENT) => {
                match mkdirat(&directory, name, Mode::from_bits_truncate(MODE)) {
                    // Another program was quicker: it is not ours to change, whatever it is.
                    Ok(()) | Err(Errno::EEXIST) => {}
                    Err(errno) => return Err(errno),
                }
                open_below(&directory, name.as_ref())?
            }
            opened => opened?,
        };
    }
    Ok(())
}

fn open_prefix(prefix: &Path) -> io::Result<OwnedFd> {
    let open = || {
        let flags = (OFlag::O_PATH | OFlag::O_DIRECTORY).bits();
        File::options().read(true).custom_flags(flags).open(prefix).map(OwnedFd::from)
    };
    match open() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            DirBuilder::new().recursive(true).mode(MODE).create(prefix)?;
            open()
        }
        opened => opened,
    }
}

/// Opens a directory in `above`, never through a link.
fn open_below(above: impl AsFd, name: &Path) -> Result<OwnedFd, Errno> {
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    openat2(above, name, how)
}

fn errno(error: io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

/// The canonical path of a source that exists: as the mount table has it.
pub(super) fn resolved(source: &Path) -> io::Result<PathBuf> {
    fs::canonicalize(source)
}

#[cfg(test)]
#[path = "sources_tests.rs"]
mod tests;
