//! Waiting for the daemon config's file, apf.json. It is written from the VM's user data, at any time during the boot.

use std::fs::File;
use std::future::pending;
use std::io::{self, ErrorKind, IsTerminal, Read};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use secure_comms_protocol::limits::START_EXTENSION;
use serde::de::IgnoredAny;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, sleep, timeout};
use zeroize::Zeroizing;

use super::daemon_config::DaemonConfig;
use super::user_data::UserDataMode;
use crate::os::log_limits::Repeated;
use crate::os::systemd::Notifier;

/// The largest daemon config, in bytes.
const SIZE_MAX: usize = 1024 * 1024;

/// Time between two looks for the file, if no event comes first.
const POLL: Duration = Duration::from_secs(1);
/// Pause after an event: a writer causes many.
const EVENT_PAUSE: Duration = Duration::from_millis(10);
/// The wait is mentioned after this time, and then after twice the time.
const MENTION_FIRST: Duration = Duration::from_secs(15);
/// The longest time between two such lines.
const MENTION_MAX: Duration = Duration::from_secs(15 * 60);

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
/// The file exists and is not a daemon config.
pub async fn wait_for(
    path: &Path,
    mode: UserDataMode,
    notifier: &Notifier,
) -> Result<DaemonConfig, DaemonConfigError> {
    let mut wait = Wait::new(path, notifier);
    loop {
        // Before the file is read, so that a write in between is an event.
        let watch = wait.watch();
        let state = match look(path, mode)? {
            Found::Complete(config) => {
                wait.ended();
                return Ok(*config);
            }
            Found::Missing => "it is not there yet".to_owned(),
            Found::Truncated(error) => format!("it is not complete yet: {error}"),
        };
        wait.report(&state);
        wait.changed(watch).await;
    }
}

/// The wait for the file, and what is reported of it.
struct Wait<'a> {
    path: &'a Path,
    notifier: &'a Notifier,
    began: Instant,
    state: Repeated,
    waited: bool,
    /// Whether a failure to watch was reported.
    polls: bool,
    /// When systemd's timeout is extended next.
    extend: Instant,
    /// How long the wait was, or will be, when it is mentioned again.
    mention: Duration,
}

impl<'a> Wait<'a> {
    fn new(path: &'a Path, notifier: &'a Notifier) -> Self {
        // A terminal has no manager that would end the wait.
        let hint = if std::io::stderr().is_terminal() { " (Ctrl-C ends this)" } else { "" };
        let began = Instant::now();
        Self {
            path,
            notifier,
            began,
            state: Repeated::new(format!("waiting for the daemon config {}{hint}", path.display())),
            waited: false,
            polls: false,
            extend: began,
            mention: MENTION_FIRST,
        }
    }

    /// A watch, if the kernel has one left: it only makes the next look come sooner.
    fn watch(&mut self) -> Option<AsyncFd<OwnedFd>> {
        match watch(self.path) {
            Ok(watch) => Some(watch),
            Err(error) => {
                if !self.polls {
                    log::info!(
                        "daemon config {} is looked for every second: inotify: {error}",
                        self.path.display()
                    );
                }
                self.polls = true;
                None
            }
        }
    }

    fn report(&mut self, state: &str) {
        self.waited = true;
        self.state.failed(&state);
        let (path, waited) = (self.path.display(), self.began.elapsed());
        if waited >= self.mention {
            log::warn!("still waiting for the daemon config {path} after {} s: {state}", waited.as_secs());
            self.mention = (self.mention * 2).min(self.mention + MENTION_MAX);
        }
        self.notifier.status(&format!("waiting for the daemon config {path}: {state}"));
        if Instant::now() >= self.extend {
            self.notifier.extend_start(START_EXTENSION);
            self.extend = Instant::now() + START_EXTENSION / 2;
        }
    }

    /// Returns when the file may have changed. Never rests on an event alone: there is none for a mount over the directory, for
    /// the target of a symbolic link, or for a directory further up that is replaced.
    async fn changed(&self, watch: Option<AsyncFd<OwnedFd>>) {
        let event = async {
            match &watch {
                Some(watch) => drop(watch.readable().await),
                None => pending().await,
            }
        };
        // An error of the watch counts as an event; the next look follows at once, but not in a loop without a pause.
        if timeout(POLL, event).await.is_ok() {
            sleep(EVENT_PAUSE).await;
        }
    }

    fn ended(&self) {
        if self.waited {
            let waited = self.began.elapsed().as_secs_f64();
            log::info!("daemon config {} found after {waited:.1} s", self.path.display());
        }
    }
}

fn look(path: &Path, mode: UserDataMode) -> Result<Found, DaemonConfigError> {
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
    let text = without_mark(text);
    match DaemonConfig::read(&text, mode) {
        Ok(config) => Ok(Found::Complete(Box::new(config))),
        Err(error) if ends_early(&text) => Ok(Found::Truncated(error)),
        Err(source) => Err(DaemonConfigError::Parse { path: path.to_owned(), source }),
    }
}

/// Whether the text is the beginning of valid JSON. The error of our own visitor does not show it.
fn ends_early(text: &[u8]) -> bool {
    serde_json::from_slice::<IgnoredAny>(text).is_err_and(|error| error.is_eof())
}

/// The text as UTF-8 without a byte order mark, as editors and shells of other systems write it. Half a mark is no text yet.
fn without_mark(mut text: Zeroizing<Vec<u8>>) -> Zeroizing<Vec<u8>> {
    match &**text {
        [0xef, 0xbb, 0xbf, ..] => {
            // In place: a copy would have to be wiped as well.
            text.rotate_left(3);
            let length = text.len().saturating_sub(3);
            text.truncate(length);
            text
        }
        [0xff, 0xfe, rest @ ..] => from_utf16(rest, u16::from_le_bytes),
        [0xfe, 0xff, rest @ ..] => from_utf16(rest, u16::from_be_bytes),
        [0xef] | [0xef, 0xbb] | [0xff] | [0xfe] => Zeroizing::default(),
        _ => text,
    }
}

fn from_utf16(text: &[u8], unit: fn([u8; 2]) -> u16) -> Zeroizing<Vec<u8>> {
    // A last half of a unit is a file that is not complete.
    let units = text.chunks_exact(2).filter_map(|pair| pair.try_into().ok()).map(unit);
    // Sized for the worst case, because a buffer that grows leaves copies behind.
    let mut utf8 = Zeroizing::new(Vec::with_capacity(text.len() * 2));
    for character in char::decode_utf16(units) {
        let character = character.unwrap_or(char::REPLACEMENT_CHARACTER);
        utf8.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes());
    }
    utf8
}

/// Watches the nearest existing directory above the file. Readable once the file may have been created or changed.
fn watch(path: &Path) -> io::Result<AsyncFd<OwnedFd>> {
    let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
    let events = AddWatchFlags::IN_CLOSE_WRITE
        | AddWatchFlags::IN_CREATE
        | AddWatchFlags::IN_MOVED_TO
        | AddWatchFlags::IN_ATTRIB
        | AddWatchFlags::IN_DELETE_SELF
        | AddWatchFlags::IN_MOVE_SELF
        | AddWatchFlags::IN_ONLYDIR;
    for directory in path.ancestors().skip(1) {
        // The last ancestor of a relative path.
        let directory = if directory.as_os_str().is_empty() { Path::new(".") } else { directory };
        match inotify.add_watch(directory, events) {
            Ok(_) => {
                #[expect(
                    deprecated,
                    reason = "its successor is unsafe for types that change their file; OwnedFd does not"
                )]
                return AsyncFd::with_interest(OwnedFd::from(inotify), Interest::READABLE);
            }
            Err(Errno::ENOENT) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Err(ErrorKind::NotFound.into())
}

#[cfg(test)]
#[path = "file_tests.rs"]
mod tests;
