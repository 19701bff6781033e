//! The mounts of a container: makes missing sources of bind mounts, waits for volumes.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use secure_comms_tunnel::Reminder;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{Semaphore, oneshot};
use tokio::time::{Instant, sleep, timeout_at};

use super::edit::Mounts;
use super::reply::RequestRefusal;
use super::sources::{self, MountPrefixes, Source};

/// Time after which the mount table is read again, whatever the kernel says.
const LOOK_AGAIN: Duration = Duration::from_secs(5);
/// The mounts that this process sees (proc_pid_mountinfo(5)).
const MOUNT_INFO: &str = "/proc/self/mountinfo";

/// Makes missing sources below the `prefixes`, and waits until something is mounted on each volume, at most until `end`. A
/// source that may not be made is left to the kata agent, whose policy decides. Needs one of `threads`.
///
/// # Errors
/// A source can't be made, a volume may not be made, or not all is there in time.
pub(super) async fn prepare(
    mounts: Mounts,
    prefixes: MountPrefixes,
    end: Instant,
    threads: Arc<Semaphore>,
) -> Result<(), RequestRefusal> {
    if mounts.sources.is_empty() {
        return Ok(());
    }
    let start = Instant::now();
    // The semaphore is never closed.
    let Ok(Ok(permit)) = timeout_at(end, threads.acquire_owned()).await else {
        return Err(RequestRefusal::TooManyThreads(start.elapsed()));
    };
    let (done, made) = oneshot::channel();
    // On a separate thread: a file system that hangs must not stall the agent.
    std::thread::Builder::new()
        .name("mounts".into())
        .spawn(move || {
            // Until the thread ends, whatever becomes of the request.
            let _permit = permit;
            let volumes = make(mounts, &prefixes, || done.is_closed());
            drop(done.send(volumes));
        })
        .map_err(RequestRefusal::Mounts)?;
    let Ok(made) = timeout_at(end, made).await else { return Err(RequestRefusal::Sources(start.elapsed())) };
    let volumes = made.map_err(|_| RequestRefusal::Mounts(io::Error::other("its thread ended early")))??;
    if volumes.is_empty() { Ok(()) } else { mounted(&volumes, end).await }
}

/// Makes missing sources, until the request `is_gone`. Returns the canonical paths of the volumes, which the mount table has.
fn make(
    mounts: Mounts,
    prefixes: &MountPrefixes,
    is_gone: impl Fn() -> bool,
) -> Result<Vec<PathBuf>, RequestRefusal> {
    sources::own_umask().map_err(RequestRefusal::Mounts)?;
    for source in mounts.sources {
        if is_gone() {
            return Ok(Vec::new());
        }
        match sources::make(&source, prefixes) {
            Ok(Source::Exists) => {}
            Ok(Source::Made) => {
                log::info!("tunnel KATAAGENT: made {}, the source of a bind mount", source.display());
            }
            Ok(Source::Left(why)) if mounts.volumes.contains(&source) => {
                return Err(RequestRefusal::VolumeLeft { path: source, why });
            }
            Ok(Source::Left(why)) => log::warn!(
                "tunnel KATAAGENT: {}, the source of a bind mount, is missing and not made: {why}; the kata agent decides",
                source.display()
            ),
            Err(error) => return Err(RequestRefusal::Source { path: source, source: error }),
        }
    }
    let resolved = |volume: PathBuf| {
        sources::resolved(&volume).map_err(|error| RequestRefusal::Source { path: volume, source: error })
    };
    mounts.volumes.into_iter().map(resolved).collect()
}

/// Waits until something is mounted on each of `volumes`, at most until `end`.
async fn mounted(volumes: &[PathBuf], end: Instant) -> Result<(), RequestRefusal> {
    let table = MountTable::open().map_err(RequestRefusal::Mounts)?;
    let mut reminder = Reminder::start();
    loop {
        let points = table.points().map_err(RequestRefusal::Mounts)?;
        let Some(missing) = volumes.iter().find(|volume| !points.contains(volume)) else { break };
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(RequestRefusal::Volume { path: missing.clone(), waited: reminder.waited() });
        }
        tokio::select! {
            changed = table.changed() => changed.map_err(RequestRefusal::Mounts)?,
            () = reminder.due() => log::warn!(
                "tunnel KATAAGENT: a container waits for its volume {}: nothing is mounted there; {:.0} s left",
                missing.display(),
                end.saturating_duration_since(Instant::now()).as_secs_f32()
            ),
            // The wait does not rest on the kernel's event alone.
            () = sleep(left.min(LOOK_AGAIN)) => {}
        }
    }
    if reminder.was_due() {
        let waited = reminder.waited().as_secs_f32();
        log::info!("tunnel KATAAGENT: the volumes of a container came after {waited:.1} s, it goes on");
    }
    Ok(())
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
