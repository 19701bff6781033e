//! Watches of the pods directory and of the sandboxes whose file is awaited. They only make a look come sooner.

use std::collections::{BTreeSet, HashMap};
use std::future::pending;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd as _, AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor};
use secure_comms_protocol::PodId;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::sleep;

/// Pause after an event: a writer causes many.
const EVENT_PAUSE: Duration = Duration::from_millis(10);
/// Most sandboxes that are watched; those beyond are only looked at from time to time.
const WATCHES_MAX: usize = 1024;
/// Most reads of events in one go; each has some 100.
const READS_MAX: usize = 100;

/// What has to be looked at.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Hint {
    These(Vec<PodId>),
    All,
}

/// The watches; none if the kernel has none left.
pub(super) struct Watch {
    path: PathBuf,
    inotify: Option<AsyncFd<Instance>>,
    /// The pods directory's watch, and its device and inode.
    root: Option<(WatchDescriptor, (u64, u64))>,
    ids: HashMap<PodId, WatchDescriptor>,
    by_watch: HashMap<WatchDescriptor, PodId>,
    fault: Option<io::Error>,
}

struct Instance(Inotify);

impl AsRawFd for Instance {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl Watch {
    /// No watch yet.
    pub(super) fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            inotify: None,
            root: None,
            ids: HashMap::new(),
            by_watch: HashMap::new(),
            fault: None,
        }
    }

    /// Begins to watch, if it does not yet.
    pub(super) fn start(&mut self) {
        if self.inotify.is_some() {
            return;
        }
        match instance() {
            Ok(inotify) => self.inotify = Some(inotify),
            Err(error) => self.fault = Some(error),
        }
    }

    /// Why changes may come without an event; `None`: all is watched.
    pub(super) fn fault(&self) -> Option<&io::Error> {
        self.fault.as_ref()
    }

    /// Watches the pods directory, of this device and inode (`None`: it is not there), and these sandboxes. Returns those that
    /// are watched from now on: they may have changed just before.
    pub(super) fn set(&mut self, root: Option<(u64, u64)>, mut ids: Vec<PodId>) -> Vec<PodId> {
        let Some(inotify) = &self.inotify else { return Vec::new() };
        let inotify = &inotify.get_ref().0;
        self.fault = None;
        if self.root.map(|(_, identity)| identity) != root {
            // An error: the kernel has removed the watch with its directory.
            self.root.take().map(|(watch, _)| inotify.rm_watch(watch).ok());
            if let Some(identity) = root {
                match inotify.add_watch(&self.path, of_root()) {
                    Ok(watch) => self.root = Some((watch, identity)),
                    Err(errno) => self.fault = Some(errno.into()),
                }
            }
        }
        ids.truncate(WATCHES_MAX);
        let gone: Vec<PodId> = self.ids.keys().filter(|id| !ids.contains(id)).cloned().collect();
        for id in gone {
            if let Some(watch) = self.ids.remove(&id) {
                self.by_watch.remove(&watch);
                // As above.
                inotify.rm_watch(watch).ok();
            }
        }
        ids.retain(|id| !self.ids.contains_key(id));
        ids.retain(|id| match inotify.add_watch(&self.path.join(id.as_str()), of_sandbox()) {
            Ok(watch) => {
                self.ids.insert(id.clone(), watch);
                self.by_watch.insert(watch, id.clone());
                true
            }
            // It is gone, or no directory: the next look sees it.
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => false,
            Err(errno) => {
                self.fault = Some(errno.into());
                false
            }
        });
        ids
    }

    /// Waits for events. Dropping the future loses none.
    pub(super) async fn changed(&mut self) -> Hint {
        loop {
            let Some(inotify) = &self.inotify else { pending().await };
            let ready = inotify.readable().await.map(|mut ready| ready.retain_ready());
            sleep(EVENT_PAUSE).await;
            // Cleared only now, and what is there then read without a wait: a future that is dropped in the pause loses nothing.
            match ready.and_then(|()| self.read()) {
                Ok(Hint::These(ids)) if ids.is_empty() => {}
                Ok(hint) => return hint,
                Err(error) => {
                    self.fail(error);
                    return Hint::All;
                }
            }
        }
    }

    fn fail(&mut self, error: io::Error) {
        (self.inotify, self.root, self.fault) = (None, None, Some(error));
        self.ids.clear();
        self.by_watch.clear();
    }

    fn read(&mut self) -> io::Result<Hint> {
        let (mut ids, mut all) = (BTreeSet::new(), false);
        for _ in 0..READS_MAX {
            let Some(inotify) = &self.inotify else { return Ok(Hint::All) };
            // Clears the readiness once there are no more.
            let events = inotify.try_io(Interest::READABLE, |instance| Ok(instance.0.read_events()?));
            let events = match events {
                Ok(events) => events,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    return Ok(if all { Hint::All } else { Hint::These(ids.into_iter().collect()) });
                }
                Err(error) => return Err(error),
            };
            for event in events {
                match self.concerns(&event) {
                    Some(id) => drop(ids.insert(id)),
                    None => all |= self.is_of_all(&event),
                }
            }
        }
        // The rest is read with the next call, and adds nothing to this.
        Ok(Hint::All)
    }

    /// The sandbox that an event is about.
    fn concerns(&mut self, event: &InotifyEvent) -> Option<PodId> {
        if self.root.is_some_and(|(watch, _)| watch == event.wd) {
            return event.name.as_ref()?.to_str()?.parse().ok();
        }
        if event.mask.contains(AddWatchFlags::IN_IGNORED) {
            let id = self.by_watch.remove(&event.wd)?;
            self.ids.remove(&id);
            return Some(id);
        }
        self.by_watch.get(&event.wd).cloned()
    }

    /// Whether an event without a sandbox is about all of them: the pods directory has moved, or events were lost.
    fn is_of_all(&mut self, event: &InotifyEvent) -> bool {
        let lost = event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW);
        let of_root = self.root.is_some_and(|(watch, _)| watch == event.wd);
        let over = AddWatchFlags::IN_IGNORED | AddWatchFlags::IN_DELETE_SELF | AddWatchFlags::IN_MOVE_SELF;
        if of_root && event.mask.contains(AddWatchFlags::IN_IGNORED) {
            self.root = None;
        }
        lost || (of_root && event.mask.intersects(over))
    }
}

fn instance() -> io::Result<AsyncFd<Instance>> {
    let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
    #[expect(
        deprecated,
        reason = "its successor is unsafe for types that change their file; Instance does not"
    )]
    AsyncFd::try_with_interest(Instance(inotify), Interest::READABLE).map_err(|error| error.into_parts().1)
}

fn of_root() -> AddWatchFlags {
    AddWatchFlags::IN_CREATE
        | AddWatchFlags::IN_MOVED_TO
        | AddWatchFlags::IN_MOVED_FROM
        | AddWatchFlags::IN_DELETE
        | AddWatchFlags::IN_DELETE_SELF
        | AddWatchFlags::IN_MOVE_SELF
        | AddWatchFlags::IN_ONLYDIR
}

fn of_sandbox() -> AddWatchFlags {
    AddWatchFlags::IN_CLOSE_WRITE
        | AddWatchFlags::IN_CREATE
        | AddWatchFlags::IN_MOVED_TO
        | AddWatchFlags::IN_ATTRIB
        | AddWatchFlags::IN_DELETE_SELF
        | AddWatchFlags::IN_ONLYDIR
        | AddWatchFlags::IN_DONT_FOLLOW
}
