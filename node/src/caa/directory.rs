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
mod follower;
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
use tokio::time::{Instant, timeout};

pub use self::apf::{ApfError, parse};
pub use self::changes::{Change, Changes};
use self::follower::Follower;
pub use self::follower::HEALTH;
use self::known::{Candidates, Known};
use self::scan::Scanner;
use super::looks::Looks;
use super::sandbox::Sandbox;
use crate::health::Health;

/// A file that is broken or missing for so long is said to be.
const SETTLE: Duration = Duration::from_secs(3);
/// A name that is not known causes a look at most once in this time.
const MISS_PAUSE: Duration = Duration::from_secs(1);
/// The time between two looks that dials cause: any process of the node can make one.
const LOOK_PAUSE: Duration = Duration::from_millis(20);
/// The longest wait for a look that a name causes, and for the first one.
const LOOK_WAIT: Duration = Duration::from_secs(10);
/// Most ids in an error.
const IDS_SAID: usize = 8;

/// The pods directory. A clone is the same.
#[derive(Clone, Debug)]
pub struct PodsDirectory(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    known: Mutex<Known>,
    /// At who listens.
    living: Looks<Arc<HashSet<PodId>>>,
    /// At all sandboxes. The follower makes them.
    looks: Looks<()>,
    /// A look is wanted.
    wanted: Notify,
    /// The last look at all.
    looked: channel::Sender<Option<Look>>,
    /// Whether inotify is used; tests do without.
    events: bool,
}

/// When a look at all began and ended.
#[derive(Clone, Copy, Debug)]
struct Look {
    began: Instant,
    ended: Instant,
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
            living: Looks::new(LOOK_PAUSE),
            looks: Looks::new(LOOK_PAUSE),
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
    ///
    /// The answer rests on a look at the directory that began after the call, for 10 seconds at most: of two sandboxes with one
    /// name the younger may not be known yet. A name of no sandbox causes a look once a second at most.
    ///
    /// # Errors
    /// There is none, or there are several, or it cannot be used.
    pub async fn by_server_name(&self, server_name: &str) -> Result<Arc<Sandbox>, LookupError> {
        let server_name = server_name.to_ascii_lowercase();
        let is_known = !self.known().candidates(&server_name).is_empty();
        if is_known || self.last_look().is_none_or(|last| last.ended.elapsed() >= MISS_PAUSE) {
            self.look().await;
        }
        let found = self.resolve(&server_name).await;
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

    /// The sandboxes on whose `agent.ttrpc` cloud-api-adaptor listens, asked after this call began: an earlier answer would
    /// name the older of two sandboxes with one server name. If it can't be found out: none.
    pub async fn living(&self) -> Arc<HashSet<PodId>> {
        let look = || async {
            // An error counts as no listener, as it is documented; the follower says it.
            let living = self.blocking(|scanner| living::living(scanner.path)).await;
            Arc::new(living.and_then(|living| living).unwrap_or_default())
        };
        self.0.living.after_now(look).await
    }

    /// What becomes of the sandboxes: first all that are there, then the changes.
    pub fn changes(&self) -> Changes {
        self.known().subscribe()
    }

    /// Follows the directory until `stop` becomes true. To be called once.
    pub async fn run(&self, health: Health, mut stop: channel::Receiver<bool>) {
        let follower = Follower::new(self, health);
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
            let living = self.living().await;
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

    fn last_look(&self) -> Option<Look> {
        *self.0.looked.borrow()
    }

    /// Waits for a look at the directory that begins after the call; for [`LOOK_WAIT`] at most.
    pub(super) async fn look(&self) {
        let look = || async {
            let (mut looked, asked) = (self.0.looked.subscribe(), Instant::now());
            self.0.wanted.notify_one();
            // Never an error: the sender is ours.
            drop(looked.wait_for(|last| last.is_some_and(|last| last.began >= asked)).await);
        };
        // What is known then is the best answer there is; the follower says why it can't look.
        timeout(LOOK_WAIT, self.0.looks.after_now(look)).await.ok();
    }
}

#[cfg(test)]
#[path = "../../../fuzz/src/caa_files.rs"]
mod caa_files;
#[cfg(test)]
mod tests;
