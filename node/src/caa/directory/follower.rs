//! Follows the pods directory: when what is looked at, by events and by time.

use std::time::Duration;

use secure_comms_protocol::PodId;
use tokio::time::{Instant, sleep_until};

use super::scan::{Found, What};
use super::watch::{Hint, Watch};
use super::{Look, PodsDirectory, files};
use crate::health::Health;

/// The name of this part of the service.
pub const HEALTH: &str = "pods directory";

/// Time between two looks at what may be half written.
const UNSETTLED_TICK: Duration = Duration::from_millis(250);
/// Time between two looks if changes come without an event.
const POLL_TICK: Duration = Duration::from_secs(1);
/// Time between two looks at all sandboxes that are not left over.
const TICK: Duration = Duration::from_secs(5);
/// Time between two looks at everything.
const THOROUGH_TICK: Duration = Duration::from_secs(30);
/// How many names of those left over are read in one go.
const NAMES_AT_ONCE: usize = 250;

/// Follows the directory.
pub(super) struct Follower<'a> {
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

impl<'a> Follower<'a> {
    pub(super) fn new(directory: &'a PodsDirectory, health: Health) -> Self {
        Self {
            directory,
            watch: Watch::new(&directory.0.path),
            health,
            thorough: Instant::now(),
            again: Vec::new(),
            nameless: Vec::new(),
            polls: false,
            sockets_said: false,
            said: None,
        }
    }

    /// Looks and waits, without an end.
    pub(super) async fn run(mut self) {
        let mut looked = Instant::now();
        let mut what = What::Thorough;
        loop {
            // A look that a dial causes is no such look: dials without a pause must not keep those left over from being looked at.
            if matches!(what, What::All | What::Thorough) {
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
        if let Some(due) = self.due(all) {
            return due;
        }
        tokio::select! {
            biased;
            () = self.directory.0.wanted.notified() => What::Served,
            hint = self.watch.changed() => match hint {
                Hint::These(ids) => What::These(ids),
                Hint::All => What::All,
            },
            () = sleep_until(all.min(soon)) => self.due(all).unwrap_or(What::These(unsettled)),
        }
    }

    /// The look whose time has come, whatever dials want.
    fn due(&self, all: Instant) -> Option<What> {
        let now = Instant::now();
        match (now >= self.thorough, now >= all) {
            (true, _) => Some(What::Thorough),
            (false, true) => Some(What::All),
            (false, false) => None,
        }
    }

    async fn look(&mut self, what: What) {
        let (all, left_over) = (!matches!(what, What::These(_)), matches!(what, What::All | What::Thorough));
        let began = Instant::now();
        let found = self.directory.blocking(move |scanner| scanner.scan(what)).await.and_then(|found| found);
        match found {
            Ok(found) => {
                let waiting = self.directory.known().waiting();
                self.again = self.watch.set(found.root, waiting);
                self.polls = !self.directory.0.events || self.watch.fault().is_some() || found.root.is_none();
                if all {
                    self.report(&found, left_over);
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
            self.directory.0.looked.send_replace(Some(Look { began, ended: Instant::now() }));
        }
    }

    /// `left_over`: whether those left over were looked at too. Otherwise a fault of one of them may still be there.
    fn report(&mut self, found: &Found, left_over: bool) {
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
        } else if left_over {
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
