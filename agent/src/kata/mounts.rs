//! The mounts of a container: makes missing sources of bind mounts, waits for volumes.

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

/// Makes missing sources, and waits until something is mounted on each volume.
///
/// # Errors
/// A source can't be made, or nothing is mounted on a volume for [`VOLUME_MOUNT`].
pub(super) async fn prepare(mounts: Mounts) -> Result<(), RequestRefusal> {
    let (done, made) = oneshot::channel();
    // On a separate thread: a file system that hangs must not stall the agent.
    std::thread::Builder::new()
        .name("mounts".into())
        .spawn(move || drop(done.send(make(mounts))))
        .map_err(RequestRefusal::Mounts)?;
    let volumes =
        made.await.map_err(|_| RequestRefusal::Mounts(io::Error::other("its thread ended early")))??;
    if volumes.is_empty() { Ok(()) } else { mounted(&volumes).await }
}

/// Makes missing sources. Returns the canonical paths of the volumes, which the mount table has.
fn make(mounts: Mounts) -> Result<Vec<PathBuf>, RequestRefusal> {
    for source in mounts.sources {
        if source.exists() {
            continue;
        }
        // Independent of our umask, because the container may have any user.
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

/// The mount table. The kernel reports each change since it was opened as an exceptional condition.
struct MountTable(AsyncFd<File>);

impl MountTable {
    #[expect(
        deprecated,
        reason = "its successor is unsafe, for types that may change their descriptor; a File does not"
    )]
    fn open() -> io::Result<Self> {
        AsyncFd::with_interest(File::open(MOUNT_INFO)?, Interest::PRIORITY).map(Self)
    }

    /// Waits for a change since the table was opened, or since the last call.
    async fn changed(&self) -> io::Result<()> {
        self.0.ready(Interest::PRIORITY).await?.clear_ready();
        Ok(())
    }

    /// The mount points.
    fn points(&self) -> io::Result<Vec<PathBuf>> {
        // Not from the open file, which is at its end after the first read.
        let table = fs::read(MOUNT_INFO)?;
        Ok(table.split(|byte| *byte == b'\n').filter_map(mount_point).collect())
    }
}

/// The mount point in a line of the table: its fifth field.
fn mount_point(line: &[u8]) -> Option<PathBuf> {
    let field = line.split(|byte| *byte == b' ').nth(4)?;
    Some(PathBuf::from(OsString::from_vec(unescape(field))))
}

/// Decodes octal escapes such as `\040`, which stand for blanks, tabs, newlines and backslashes.
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
