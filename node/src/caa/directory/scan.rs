//! Looks at the pods directory. All of it blocks, and runs on a thread for that.

use std::collections::HashSet;
use std::io::{self, ErrorKind};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use secure_comms_protocol::PodId;

use super::apf;
use super::files::{Content, Place, Root, Stamp};
use super::known::{Before, Fault, Known};
use super::living::living;
use crate::caa::identity::IdentityError;
use crate::caa::sandbox::Sandbox;

/// A sandbox without a listener is left over when its file is as old as this: StartVM takes at most 10 minutes.
const LEFT_OVER_AGE: Duration = Duration::from_secs(15 * 60);

/// What is said of a sandbox that lives without a file.
const NO_FILE: &str = "cloud-api-adaptor listens on agent.ttrpc, but neither apf.json nor daemon.json is there: this release \
                       of cloud-api-adaptor has another layout; use the strict variant (caa-certs), or another release";

/// What is looked at.
#[derive(Debug)]
pub(super) enum What {
    /// These sandboxes only.
    These(Vec<PodId>),
    /// The directory, and all sandboxes in it that are not left over. What a dial causes: any process of the node can make
    /// one, and thousands may be left over.
    Served,
    /// Also whether those left over have changed.
    All,
    /// Also which of all live.
    Thorough,
}

/// What a look has found.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// Device and inode of the pods directory; `None`: it is not there.
    pub(super) root: Option<(u64, u64)>,
    /// Sandboxes that were left over long ago; their names are to be read.
    pub(super) nameless: Vec<PodId>,
    /// There are more sandboxes than are looked at.
    pub(super) too_many: bool,
    /// What could not be asked of the kernel.
    pub(super) sockets: Option<io::Error>,
    /// The first sandbox that could not be looked at.
    pub(super) unreadable: Option<(PodId, io::Error)>,
}

pub(super) struct Scanner<'a> {
    pub(super) path: &'a Path,
    pub(super) known: &'a Mutex<Known>,
}

impl Scanner<'_> {
    /// Looks, and says what has changed.
    ///
    /// # Errors
    /// The pods directory is there, and cannot be read.
    pub(super) fn scan(&self, what: What) -> io::Result<Found> {
        let root = match Root::open(self.path) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                self.known().all_missing(Instant::now());
                return Ok(Found::default());
            }
            root => root?,
        };
        let mut look = Look { scanner: self, root, living: None, found: Found::default() };
        look.found.root = Some(look.root.identity);
        let thorough = matches!(what, What::Thorough);
        let ids = match what {
            What::These(ids) => ids,
            What::Served => {
                let ids = look.list()?;
                let known = self.known();
                ids.into_iter().filter(|id| !matches!(known.before(id), Before::LeftOver(_))).collect()
            }
            What::All | What::Thorough => look.list()?,
        };
        for id in ids {
            if let Err(error) = look.at(&id, thorough) {
                look.found.unreadable.get_or_insert((id, error));
            }
        }
        Ok(look.found)
    }

    /// Reads the server names of sandboxes that are left over.
    pub(super) fn name(&self, ids: &[PodId]) {
        let Ok(root) = Root::open(self.path) else { return };
        for id in ids {
            // What cannot be read has no name that could be asked for.
            if let Ok(Content::Text(_, _, text)) = root.read(id)
                && let Some(name) = apf::name_in(&text)
            {
                self.known().name(id, &name);
            }
        }
    }

    /// Reads one sandbox, without a change of what is known.
    pub(super) fn read(&self, id: &PodId) -> io::Result<Option<Result<Sandbox, Fault>>> {
        let content = Root::open(self.path)?.read(id)?;
        Ok(parse(id, &content))
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Look<'a> {
    scanner: &'a Scanner<'a>,
    root: Root,
    /// Asked for once in a look, if at all.
    living: Option<HashSet<PodId>>,
    found: Found,
}

impl Look<'_> {
    /// All in the directory, and all that were.
    fn list(&mut self) -> io::Result<Vec<PodId>> {
        let (ids, too_many) = self.root.ids()?;
        self.found.too_many = too_many;
        let there: HashSet<&PodId> = ids.iter().collect();
        let gone = self.scanner.known().all().into_iter().filter(|id| !there.contains(id));
        let gone: Vec<PodId> = if too_many { Vec::new() } else { gone.collect() };
        Ok(ids.into_iter().chain(gone).collect())
    }

    fn lives(&mut self, id: &PodId) -> bool {
        if self.living.is_none() {
            let answer = living(self.scanner.path).map_err(|error| self.found.sockets = Some(error));
            self.living = Some(answer.unwrap_or_default());
        }
        self.living.as_ref().is_some_and(|living| living.contains(id))
    }

    fn at(&mut self, id: &PodId, thorough: bool) -> io::Result<()> {
        let before = self.scanner.known().before(id);
        let left_over = matches!(before, Before::LeftOver(_));
        let place = self.root.look(id)?;
        let (Place::Empty(stamp) | Place::File(stamp) | Place::Refused(stamp)) = place else {
            self.scanner.known().nothing(id, Instant::now());
            return Ok(());
        };
        let asks = thorough || !matches!(before, Before::Seen(_));
        let unchanged = before == Before::LeftOver(stamp);
        // A list of the sockets is asked for only if the answer matters.
        if left_over && unchanged && !thorough {
            return Ok(());
        }
        if asks && (unchanged || is_old(&stamp)) && !self.lives(id) {
            if !unchanged {
                self.scanner.known().leave(id.clone(), stamp);
                self.found.nameless.push(id.clone());
            }
            return Ok(());
        }
        match place {
            Place::Empty(_) => {
                self.scanner.known().empty(id, Instant::now());
                if thorough && self.lives(id) {
                    self.scanner.known().without_file(id, NO_FILE, Instant::now());
                }
                Ok(())
            }
            _ if before == Before::Seen(Some(stamp)) => Ok(()),
            _ => self.read(id),
        }
    }

    fn read(&self, id: &PodId) -> io::Result<()> {
        let content = self.root.read(id)?;
        let now = Instant::now();
        let parsed = parse(id, &content);
        let mut known = self.scanner.known();
        match (&content, parsed) {
            (Content::Nothing, _) | (_, None) => known.empty(id, now),
            (Content::Text(stamp, _, text), Some(Ok(sandbox))) => {
                let hash = known.hash(text);
                known.good(*stamp, hash, sandbox);
            }
            (Content::Text(stamp, _, text), Some(Err(fault))) => {
                let hash = known.hash(text);
                known.bad(id, *stamp, hash, fault, now);
            }
            (Content::Refused(stamp, reason), Some(Err(fault))) => {
                let hash = known.hash(reason.as_bytes());
                known.bad(id, *stamp, hash, fault, now);
            }
            (Content::Refused(..), Some(Ok(_))) => {}
        }
        Ok(())
    }
}

/// What a content says; `None`: there is none.
fn parse(id: &PodId, content: &Content) -> Option<Result<Sandbox, Fault>> {
    let (stamp, name, text) = match content {
        Content::Nothing => return None,
        Content::Refused(_, reason) => {
            return Some(Err(Fault { reason: reason.clone(), server_name: None }));
        }
        Content::Text(stamp, name, text) => (stamp, name, text),
    };
    Some(apf::parse(text, id.clone(), stamp.written()).map_err(|error| {
        let server_name = match &error {
            apf::ApfError::Identity(IdentityError::Mismatch(name)) => Some(name.clone()),
            _ => apf::name_in(text),
        };
        Fault { reason: format!("{name}: {error}"), server_name }
    }))
}

/// Whether a file is so old that its sandbox is left over, if it does not live.
fn is_old(stamp: &Stamp) -> bool {
    SystemTime::now().duration_since(stamp.written()).is_ok_and(|age| age >= LEFT_OVER_AGE)
}
