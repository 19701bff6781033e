//! What must be there before a container is made: the sources of its bind mounts, and its volumes.

use std::ffi::OsString;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use secure_comms_protocol::limits::VOLUME_MOUNT;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout_at};

use super::edit::Mounts;
use super::reply::RequestRefusal;

/// The mounts that this process sees (proc_pid_mountinfo(5)).
const MOUNT_INFO: &str = "/proc/self/mountinfo";

/// Makes the sources that are missing, and waits until something is mounted on each volume.
///
/// # Errors
/// A source can't be made, or nothing is mounted on a volume for [`VOLUME_MOUNT`].
pub async fn prepare(mounts: Mounts) -> Result<(), RequestRefusal> {
    let (done, made) = oneshot::channel();
    // On a thread of its own: a file system that hangs must not hold up the agent.
    std::thread::Builder::new()
        .name("mounts".into())
        .spawn(move || drop(done.send(make(mounts))))
        .map_err(RequestRefusal::Mounts)?;
    let volumes =
        made.await.map_err(|_| RequestRefusal::Mounts(io::Error::other("its thread ended early")))??;
    if volumes.is_empty() { Ok(()) } else { mounted(&volumes).await }
}

/// Makes the sources that are missing. Returns the volumes by the names that they have once mounted.
fn make(mounts: Mounts) -> Result<Vec<PathBuf>, RequestRefusal> {
    for source in mounts.sources {
        if source.exists() {
            continue;
        }
        // Whatever our umask is: the container's user may be anyone.
        fs::create_dir_all(&source)
            .and_then(|()| fs::set_permissions(&source, Permissions::from_mode(0o755)))
            .map_err(|error| RequestRefusal::Source { path: source.clone(), source: error })?;
        log::info!("tunnel KATAAGENT: made {}, the source of a bind mount", source.display());
    }
    let resolved = |volume: PathBuf| {
        fs::canonicalize(&volume).map_err(|error| RequestRefusal::Source { path: volume, source: error })
    };
    mounts.volumes.into_iter().map(resolved).collect()
}

/// Waits until something is mounted on each of `volumes`.
async fn mounted(volumes: &[PathBuf]) -> Result<(), RequestRefusal> {
    let table = MountTable::open().map_err(RequestRefusal::Mounts)?;
    let deadline = Instant::now() + VOLUME_MOUNT;
    let mut waited_for = None;
    loop {
        let points = table.points().map_err(RequestRefusal::Mounts)?;
        let Some(missing) = volumes.iter().find(|volume| !points.contains(volume)) else { return Ok(()) };
        if waited_for.replace(missing) != Some(missing) {
            log::info!("tunnel KATAAGENT: a container waits for its volume {}", missing.display());
        }
        match timeout_at(deadline, table.changed()).await {
            Ok(changed) => changed.map_err(RequestRefusal::Mounts)?,
            Err(_) => return Err(RequestRefusal::Volume { path: missing.clone() }),
        }
    }
}

/// The table of mounts. The kernel reports each change after it was opened as an exceptional condition.
struct MountTable(AsyncFd<File>);

impl MountTable {
    #[expect(
        deprecated,
        reason = "what took its place is unsafe, for types whose descriptor changes; a File's stays the same"
    )]
    fn open() -> io::Result<Self> {
        AsyncFd::with_interest(File::open(MOUNT_INFO)?, Interest::PRIORITY).map(Self)
    }

    /// Waits until it has changed since it was opened, or since the last time.
    async fn changed(&self) -> io::Result<()> {
        self.0.ready(Interest::PRIORITY).await?.clear_ready();
        Ok(())
    }

    /// The mount points.
    fn points(&self) -> io::Result<Vec<PathBuf>> {
        // The open file is at its end after it was read once.
        let table = fs::read(MOUNT_INFO)?;
        Ok(table.split(|byte| *byte == b'\n').filter_map(mount_point).collect())
    }
}

/// The mount point of a line: its fifth field.
fn mount_point(line: &[u8]) -> Option<PathBuf> {
    let field = line.split(|byte| *byte == b' ').nth(4)?;
    Some(PathBuf::from(OsString::from_vec(unescape(field))))
}

/// Decodes `\040` and its like, which stand for blanks, tabs, newlines and backslashes.
fn unescape(mut field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    while let Some((first, rest)) = field.split_first() {
        field = rest;
        match (first, rest) {
            (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', after @ ..]) => {
                out.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                field = after;
            }
            _ => out.push(*first),
        }
    }
    out
}

#[cfg(test)]
#[path = "mounts_tests.rs"]
mod tests;
