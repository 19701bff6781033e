//! The pods directory of cloud-api-adaptor: which sandboxes there are, and the TLS keys of each.
//!
//! cloud-api-adaptor writes `<sandbox id>/apf.json` (up to v0.14 `daemon.json`) when a sandbox is created, in place, and
//! leaves it there when the pod is gone. So a file counts once it can be parsed, a fault once it has lasted, and thousands of
//! directories may be left over from pods long gone: of these only a hash of the server name is kept.
//!
//! ```text
//! watch: inotify --hint--> scan: files, apf --> known --> changes
//!        tick    --all---^       living
//! ```

mod apf;
mod changes;
mod files;
mod known;
mod living;
mod scan;
mod watch;

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use secure_comms_protocol::PodId;
use tokio::sync::{Notify, watch as channel};
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep_until, timeout};

pub use self::apf::{ApfError, parse};
pub use self::changes::{Change, Changes};
use self::known::{Candidates, Known};
use self::scan::{Found, Scanner, What};
use self::watch::{Hint, Watch};
use super::sandbox::Sandbox;
use crate::health::Health;

/// The name of this part of the service.
pub const HEALTH: &str = "pods directory";

/// A file that is broken or missing for so long is said to be.
const SETTLE: Duration = Duration::from_secs(3);
/// Time between two looks at what may be half written.
const UNSETTLED_TICK: Duration = Duration::from_millis(250);
/// Time between two looks if changes come without an event.
const POLL_TICK: Duration = Duration::from_secs(1);
/// Time between two looks at all sandboxes that are not left over.
const TICK: Duration = Duration::from_secs(5);
/// Time between two looks at everything.
const THOROUGH_TICK: Duration = Duration::from_secs(30);
/// How long the answer of who listens is used.
const LIVING_AGE: Duration = Duration::from_millis(250);
/// A name that is not known causes a look at most once in this time.
const MISS_PAUSE: Duration = Duration::from_secs(1);
/// The longest wait for such a look, and for the first one.
const MISS_WAIT: Duration = Duration::from_secs(10);
/// How many names of those left over are read in one go.
const NAMES_AT_ONCE: usize = 250;
/// Most ids in an error.
const IDS_SAID: usize = 8;

/// The pods directory. A clone is the same.
#[derive(Clone, Debug)]
pub struct PodsDirectory(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    known: Mutex<Known>,
    /// Who listens, and when that was asked. Held while it is asked: of a burst, one asks.
    living: tokio::sync::Mutex<Option<(Instant, Arc<HashSet<PodId>>)>>,
    /// A look is wanted.
    wanted: Notify,
    /// When the last look at all ended.
    looked: channel::Sender<Option<Instant>>,
    /// Whether inotify is used; tests do without.
    events: bool,
}

/// Why no sandbox can be named for a server name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LookupError {
    /// No sandbox has a certificate for it.
    #[error("no sandbox in the pods directory has a certificate for this name")]
    Unknown,
    /// More than one sandbox has it, and not just one of these lives.
    #[error("more than one sandbox has a certificate for this name: {}", ids(.0))]
    Ambiguous(Vec<PodId>),
    /// The sandbox that it is probably of cannot be used.
    #[error("sandbox {id}: {reason}")]
    Broken {
        /// The sandbox.
        id: PodId,
        /// Why, in one line.
        reason: String,
    },
}

fn ids(ids: &[PodId]) -> String {
    let said: Vec<&str> = ids.iter().take(IDS_SAID).map(PodId::as_str).collect();
    let more = if ids.len() > IDS_SAID { " and more" } else { "" };
    format!("{}{more}", said.join(", "))
}

impl PodsDirectory {
    /// The directory at this path, which need not be there yet. Nothing is read before [`Self::run`].
    ///
    /// The path must be the one that cloud-api-adaptor uses: who listens is listed by path.
    pub fn open(path: impl Into<PathBuf>) -> Self {
        Self::with(path.into(), SETTLE, true)
    }

    fn with(path: PathBuf, settle: Duration, events: bool) -> Self {
        Self(Arc::new(Inner {
            path,
            known: Mutex::new(Known::new(settle)),
            living: tokio::sync::Mutex::default(),
            wanted: Notify::new(),
            looked: channel::Sender::new(None),
            events,
        }))
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// The sandbox with a certificate for this name (SNI), in any case of letters. Of several, the only one that lives.
    /// A name that is not known yet is looked for at once, and before the first look at the directory has ended, that is
    /// waited for: 10 seconds at most.
    ///
    /// # Errors
    /// There is none, or there are several, or it cannot be used.
    pub async fn by_server_name(&self, server_name: &str) -> Result<Arc<Sandbox>, LookupError> {
        let server_name = server_name.to_ascii_lowercase();
        let found = match self.resolve(&server_name).await {
            Err(LookupError::Unknown) if self.look_again().await => self.resolve(&server_name).await,
            found => found,
        };
        match (found, self.known().broken(&server_name)) {
            (Err(LookupError::Unknown), Some((id, reason))) => Err(LookupError::Broken { id, reason }),
            (found, _) => found,
        }
    }

    /// The sandbox of this id; `None` if it is not known, broken from the beginning, or left over.
    pub fn by_id(&self, id: &PodId) -> Option<Arc<Sandbox>> {
        self.known().sandbox(id)
    }

    /// All sandboxes that are not left over and not broken from the beginning, in no order.
    pub fn list(&self) -> Vec<Arc<Sandbox>> {
        self.known().sandboxes().collect()
    }

    /// How many directories are known, and how many of them are left over from pods long gone.
    pub fn counts(&self) -> (usize, usize) {
        self.known().counts()
    }

    /// Whether cloud-api-adaptor listens on the sandbox's `agent.ttrpc`. The answer may be 0.25 seconds old. If it can't be
    /// found out: no.
    pub async fn living(&self, id: &PodId) -> bool {
        self.listeners().await.contains(id)
    }

    /// What becomes of the sandboxes: first all that are there, then the changes.
    pub fn changes(&self) -> Changes {
        self.known().subscribe()
    }

    /// Follows the directory until `stop` becomes true. To be called once.
    pub async fn run(&self, health: Health, mut stop: channel::Receiver<bool>) {
        let follower = Follower {
            directory: self,
            watch: Watch::new(&self.0.path),
            health,
            thorough: Instant::now(),
            again: Vec::new(),
            nameless: Vec::new(),
            polls: false,
            sockets_said: false,
            said: None,
        };
        tokio::select! {
            // An error: the sender is gone, which also ends it.
            _ = stop.wait_for(|stop| *stop) => {}
            () = follower.run() => {}
        }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn blocking<T: Send + 'static>(
        &self,
        job: impl FnOnce(&Scanner<'_>) -> T + Send + 'static,
    ) -> io::Result<T> {
        let inner = Arc::clone(&self.0);
        let job = move || job(&Scanner { path: &inner.path, known: &inner.known });
        spawn_blocking(job).await.map_err(io::Error::other)
    }

    async fn resolve(&self, server_name: &str) -> Result<Arc<Sandbox>, LookupError> {
        let Candidates { mut seen, mut left_over } = self.known().candidates(server_name);
        if seen.len() + left_over.len() > 1 {
            let living = self.listeners().await;
            if seen.iter().map(|sandbox| &sandbox.id).chain(&left_over).any(|id| living.contains(id)) {
                seen.retain(|sandbox| living.contains(&sandbox.id));
                left_over.retain(|id| living.contains(id));
            } else if !seen.is_empty() {
                left_over.clear();
            }
            let ids = seen.iter().map(|sandbox| &sandbox.id).chain(&left_over);
            if ids.clone().count() > 1 {
                return Err(LookupError::Ambiguous(ids.cloned().collect()));
            }
        }
        match (seen.pop(), left_over.pop()) {
            (Some(sandbox), _) => Ok(sandbox),
            (None, Some(id)) => self.read_left_over(id, server_name).await,
            (None, None) => Err(LookupError::Unknown),
        }
    }

    async fn read_left_over(&self, id: PodId, server_name: &str) -> Result<Arc<Sandbox>, LookupError> {
        let of = id.clone();
        let read = self.blocking(move |scanner| scanner.read(&of)).await.and_then(|read| read);
        let broken = |reason| Err(LookupError::Broken { id, reason });
        match read {
            Ok(Some(Ok(sandbox))) => match &sandbox.tls {
                Some(tls) if tls.server_name == server_name => Ok(Arc::new(sandbox)),
                // Another name has the same hash, or the file has changed.
                _ => Err(LookupError::Unknown),
            },
            Ok(Some(Err(fault))) => broken(fault.reason),
            Ok(None) => Err(LookupError::Unknown),
            Err(error) => broken(error.to_string()),
        }
    }

    /// Waits for a look at the directory that begins now; not if the last one is not long ago.
    async fn look_again(&self) -> bool {
        let mut looked = self.0.looked.subscribe();
        let last = *looked.borrow_and_update();
        if last.is_some_and(|last| last.elapsed() < MISS_PAUSE) {
            return false;
        }
        self.0.wanted.notify_one();
        matches!(timeout(MISS_WAIT, looked.changed()).await, Ok(Ok(())))
    }

    async fn listeners(&self) -> Arc<HashSet<PodId>> {
        let mut last = self.0.living.lock().await;
        if let Some((_, living)) = last.as_ref().filter(|(asked, _)| asked.elapsed() < LIVING_AGE) {
            return Arc::clone(living);
        }
        let asked = Instant::now();
        // An error counts as nobody, as it is documented; the follower says it.
        let living = self.blocking(|scanner| living::living(scanner.path)).await;
        let living = Arc::new(living.and_then(|living| living).unwrap_or_default());
        *last = Some((asked, Arc::clone(&living)));
        living
    }
}

/// Follows the directory.
struct Follower<'a> {
    directory: &'a PodsDirectory,
    watch: Watch,
    health: Health,
    /// When everything is looked at again.
    thorough: Instant,
    /// Sandboxes to look at without a wait.
    again: Vec<PodId>,
    /// Sandboxes left over whose names are to be read.
    nameless: Vec<PodId>,
    polls: bool,
    sockets_said: bool,
    said: Option<String>,
}

impl Follower<'_> {
    async fn run(mut self) {
        let mut looked = Instant::now();
        let mut what = What::Thorough;
        loop {
            if !matches!(what, What::These(_)) {
                looked = Instant::now();
            }
            if matches!(what, What::Thorough) {
                self.thorough = looked + THOROUGH_TICK;
                if self.directory.0.events {
                    self.watch.start();
                }
            }
            self.look(what).await;
            what = self.next(looked).await;
        }
    }

    /// Waits until something has to be looked at.
    async fn next(&mut self, looked: Instant) -> What {
        if !self.again.is_empty() {
            return What::These(std::mem::take(&mut self.again));
        }
        if !self.nameless.is_empty() {
            let rest = self.nameless.split_off(self.nameless.len().min(NAMES_AT_ONCE));
            let ids = std::mem::replace(&mut self.nameless, rest);
            // An error is a panic in the job, which has been reported.
            self.directory.blocking(move |scanner| scanner.name(&ids)).await.ok();
        }
        let unsettled = self.directory.known().unsettled();
        let all = looked + if self.polls { POLL_TICK } else { TICK };
        let soon = match (self.nameless.is_empty(), unsettled.is_empty()) {
            (false, _) => Instant::now(),
            (true, false) => Instant::now() + UNSETTLED_TICK,
            (true, true) => all,
        };
        tokio::select! {
            biased;
            () = self.directory.0.wanted.notified() => What::All,
            hint = self.watch.changed() => match hint {
                Hint::These(ids) => What::These(ids),
                Hint::All => What::All,
            },
            () = sleep_until(all.min(soon)) => {
                let now = Instant::now();
                if now >= self.thorough {
                    What::Thorough
                } else if now >= all {
                    What::All
                } else {
                    What::These(unsettled)
                }
            }
        }
    }

    async fn look(&mut self, what: What) {
        let all = !matches!(what, What::These(_));
        let found = self.directory.blocking(move |scanner| scanner.scan(what)).await.and_then(|found| found);
        match found {
            Ok(found) => {
                let waiting = self.directory.known().waiting();
                self.again = self.watch.set(found.root, waiting);
                self.polls = !self.directory.0.events || self.watch.fault().is_some() || found.root.is_none();
                if all {
                    self.report(&found);
                }
                self.nameless.extend(found.nameless);
            }
            Err(error) => {
                self.polls = true;
                let path = self.directory.0.path.display();
                self.fails(format!(
                    "reading the pods directory {path}: {error}; make it a directory that we may read"
                ));
            }
        }
        if all {
            self.directory.0.looked.send_replace(Some(Instant::now()));
        }
    }

    fn report(&mut self, found: &Found) {
        if let Some(error) = &found.sockets
            && !self.sockets_said
        {
            self.sockets_said = true;
            tracing::warn!(
                "pods directory: reading the list of unix sockets: {error}; old sandboxes count as left over"
            );
        }
        let path = self.directory.0.path.display();
        if let Some((id, error)) = &found.unreadable {
            self.fails(format!(
                "pods directory {path}: reading sandbox {id}: {error}; give us the right to read it"
            ));
        } else if found.too_many {
            let max = files::ENTRIES_MAX;
            self.fails(format!(
                "pods directory {path}: it has more than {max} sandboxes; remove those of pods long gone"
            ));
        } else {
            self.said = None;
            self.health.works(HEALTH);
        }
    }

    fn fails(&mut self, fault: String) {
        if self.said.as_ref() != Some(&fault) {
            tracing::warn!("{fault}");
            self.said = Some(fault.clone());
        }
        self.health.fails(HEALTH, fault);
    }
}

#[cfg(test)]
mod tests;
