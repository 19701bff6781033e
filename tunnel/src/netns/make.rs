//! Makes a missing namespace as `ip netns add` does, so that `ip netns exec` and units find it.
//!
//! A namespace exists as long as a reference holds it: here a bind mount of `/proc/thread-self/ns/net` on a file.

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
    /// The path is occupied by another file.
    #[error(
        "making network namespace {}: the path is neither a namespace nor an empty file; remove it, or name another path",
        path.display()
    )]
    Occupied {
        /// Path of the namespace.
        path: PathBuf,
    },
    /// A step failed.
    #[error(
        "making network namespace {}: {step}: {cause}; this needs CAP_SYS_ADMIN, and a service that may mount and write there",
        path.display()
    )]
    Step {
        /// Path of the namespace.
        path: PathBuf,
        /// The step that failed.
        step: &'static str,
        /// Error that caused it.
        cause: io::Error,
    },
    /// No thread could be started.
    #[error("making a network namespace: {0}; check the limits on threads")]
    Thread(io::Error),
}

// Without `#[from]`, which would make the error a source, too: the text has it already.
impl From<io::Error> for MakeError {
    fn from(error: io::Error) -> Self {
        Self::Thread(error)
    }
}

impl Namespace {
    /// Makes the namespace if it is missing, and returns whether it was missing. Repairs an empty file without a mount,
    /// which an interrupted call leaves behind. `lo` stays down, as the kernel makes it. If the future is dropped, the
    /// namespace is still made.
    ///
    /// # Errors
    /// A step fails, or another file occupies the path.
    pub async fn make(&self) -> Result<bool, MakeError> {
        let path = self.0.clone();
        on_own_thread(move || make(&path)).await
    }
}

/// Must run on a thread that ends afterwards, because the thread stays in the new namespace.
fn make(path: &Path) -> Result<bool, MakeError> {
    let failed = |step| move |cause| MakeError::Step { path: path.to_owned(), step, cause };
    let directory = path.parent().unwrap_or(Path::new("/"));
    std::fs::create_dir_all(directory).map_err(failed("making its directory"))?;
    // `ip netns add` takes the same lock, so the second of two makers finds the namespace of the first.
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

/// Whether `path` is a network namespace. If it is not, an empty file exists there, on which one can be mounted.
fn is_there(path: &Path) -> Result<bool, MakeError> {
    let failed = |step| move |cause| MakeError::Step { path: path.to_owned(), step, cause };
    let created = OpenOptions::new().write(true).create_new(true).mode(0o000).open(path);
    match created {
        Ok(_) => return Ok(false),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(failed("making its file")(error)),
    }
    let file = File::open(path).map_err(failed("opening the existing file"))?;
    match setns(&file, CloneFlags::CLONE_NEWNET) {
        Ok(()) => return Ok(true),
        // Not a namespace, or not one of this kind.
        Err(Errno::EINVAL) => {}
        Err(errno) => return Err(failed("entering the existing file")(errno.into())),
    }
    let found = path.symlink_metadata().map_err(failed("inspecting the existing file"))?;
    if found.is_file() && found.len() == 0 {
        log::warn!("network namespace {}: its file had no mount, repaired", path.display());
        return Ok(false);
    }
    Err(MakeError::Occupied { path: path.to_owned() })
}

/// Makes the mount at `directory` shared, so that running services with mount namespaces of their own see a new
/// namespace appear and disappear.
fn share(directory: &Path) -> nix::Result<()> {
    let none = None::<&str>;
    let shared = || mount(none, directory, none, MsFlags::MS_SHARED | MsFlags::MS_REC, none);
    match shared() {
        // The directory is not a mount point yet.
        Err(Errno::EINVAL) => {
            mount(Some(directory), directory, none, MsFlags::MS_BIND | MsFlags::MS_REC, none)?;
            shared()
        }
        other => other,
    }
}
