//! Makes a namespace that is missing, as `ip netns add` does, so that `ip netns exec` and units find it.
//!
//! A namespace lives as long as something holds it: here a bind mount of `/proc/thread-self/ns/net` on a file.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};

use super::{NAMED, Namespace, on_own_thread};

/// Why a namespace could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MakeError {
    /// Something else is in its place.
    #[error(
        "making network namespace {}: it is there, is no namespace and is not an empty file; remove it, or name another path",
        path.display()
    )]
    Occupied {
        /// Its path.
        path: PathBuf,
    },
    /// A step failed.
    #[error(
        "making network namespace {}: {step}: {source}; this needs CAP_SYS_ADMIN, and a service that may mount and write there",
        path.display()
    )]
    Step {
        /// Its path.
        path: PathBuf,
        /// What was being done.
        step: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// No thread could be started for it.
    #[error("making a network namespace: {0}; check the limits on threads")]
    Thread(#[from] io::Error),
}

impl Namespace {
    /// Makes the namespace if it is missing, and says whether it was. An empty file without a mount, which a making
    /// that was cut short leaves behind, is repaired. `lo` is left down, as the kernel makes it.
    ///
    /// # Errors
    /// It can't be made; something else is in its place.
    pub async fn make(&self) -> Result<bool, MakeError> {
        let path = self.0.clone();
        on_own_thread(move || make(&path)).await
    }
}

/// To be called on a thread that nobody needs afterwards: it ends in the namespace.
fn make(path: &Path) -> Result<bool, MakeError> {
    let failed = |step| move |source| MakeError::Step { path: path.to_owned(), step, source };
    let directory = path.parent().unwrap_or(Path::new("/"));
    std::fs::create_dir_all(directory).map_err(failed("making its directory"))?;
    // `ip netns add` holds the same lock: of two makers the second finds what the first made.
    let lock = File::open(directory).map_err(failed("opening its directory"))?;
    let _lock = Flock::lock(lock, FlockArg::LockExclusive)
        .map_err(|(_, errno)| failed("locking its directory")(errno.into()))?;
    if is_there(path)? {
        return Ok(false);
    }
    if directory == Path::new(NAMED) {
        share(directory).map_err(|errno| failed("sharing mounts in its directory")(errno.into()))?;
    }
    unshare(CloneFlags::CLONE_NEWNET)
        .and_then(|()| {
            mount(Some("/proc/thread-self/ns/net"), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        })
        .map_err(|errno| failed("mounting it")(errno.into()))?;
    Ok(true)
}

/// Whether `path` is a network namespace; if it is not, there is an empty file to mount one on.
fn is_there(path: &Path) -> Result<bool, MakeError> {
    let failed = |step| move |source| MakeError::Step { path: path.to_owned(), step, source };
    let created = OpenOptions::new().write(true).create_new(true).mode(0o000).open(path);
    match created {
        Ok(_) => return Ok(false),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(failed("making its file")(error)),
    }
    let file = File::open(path).map_err(failed("opening what is in its place"))?;
    match setns(&file, CloneFlags::CLONE_NEWNET) {
        Ok(()) => return Ok(true),
        // Not a namespace, or not one of this kind.
        Err(Errno::EINVAL) => {}
        Err(errno) => return Err(failed("entering what is in its place")(errno.into())),
    }
    let found = path.symlink_metadata().map_err(failed("looking at what is in its place"))?;
    if found.is_file() && found.len() == 0 {
        log::warn!("network namespace {}: its file was there without a mount, repaired", path.display());
        return Ok(false);
    }
    Err(MakeError::Occupied { path: path.to_owned() })
}

/// A mount made here shows in the mount namespaces of services that run already, and its end does too.
fn share(directory: &Path) -> nix::Result<()> {
    let none = None::<&str>;
    let shared = || mount(none, directory, none, MsFlags::MS_SHARED | MsFlags::MS_REC, none);
    match shared() {
        // It is no mount point yet.
        Err(Errno::EINVAL) => {
            mount(Some(directory), directory, none, MsFlags::MS_BIND | MsFlags::MS_REC, none)?;
            shared()
        }
        other => other,
    }
}
