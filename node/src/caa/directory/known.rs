//! What is known of the sandboxes, and what is said of them. No input or output.

use std::collections::HashMap;
use std::hash::{BuildHasher as _, RandomState};
use std::sync::Arc;
use std::time::{Duration, Instant};

use secure_comms_protocol::PodId;

use super::changes::{Change, Changes, Receivers};
use super::files::Stamp;
use crate::caa::sandbox::Sandbox;

/// What is wrong with a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    /// Why it cannot be used, in one line.
    pub(super) reason: String,
    /// The server name of its certificate, if that much could be read.
    pub(super) server_name: Option<String>,
}

/// The sandboxes.
#[derive(Debug)]
pub(super) struct Known {
    seen: HashMap<PodId, Seen>,
    /// Directories of pods long gone: there may be thousands, so that little is kept of each.
    left_over: HashMap<PodId, LeftOver>,
    /// Those left over by the hash of their server name.
    named: HashMap<u64, Vec<PodId>>,
    hasher: RandomState,
    receivers: Receivers,
    /// How long a file may be broken or missing before it is said: it is not written in one piece.
    settle: Duration,
}

#[derive(Debug)]
struct LeftOver {
    stamp: Stamp,
    name: Option<u64>,
}

#[derive(Debug, Default)]
struct Seen {
    /// The last good content, and its hash.
    sandbox: Option<(Arc<Sandbox>, u64)>,
    /// What was read last.
    stamp: Option<Stamp>,
    fault: Option<Faulty>,
    /// Since when there is no file.
    missing: Option<Instant>,
}

#[derive(Debug)]
struct Faulty {
    fault: Fault,
    content: u64,
    since: Instant,
    reported: bool,
}

/// What was known of a sandbox before a look at it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Before {
    Unknown,
    LeftOver(Stamp),
    /// What was read last; `None`: it has to be read.
    Seen(Option<Stamp>),
}

/// Candidates for a server name.
#[derive(Debug, Default)]
pub(super) struct Candidates {
    pub(super) seen: Vec<Arc<Sandbox>>,
    pub(super) left_over: Vec<PodId>,
}

impl Candidates {
    pub(super) fn is_empty(&self) -> bool {
        self.seen.is_empty() && self.left_over.is_empty()
    }
}

impl Known {
    pub(super) fn new(settle: Duration) -> Self {
        Self {
            seen: HashMap::new(),
            left_over: HashMap::new(),
            named: HashMap::new(),
            hasher: RandomState::new(),
            receivers: Receivers::default(),
            settle,
        }
    }

    /// A hash of what a file holds.
    pub(super) fn hash(&self, content: &[u8]) -> u64 {
        self.hasher.hash_one(content)
    }

    pub(super) fn before(&self, id: &PodId) -> Before {
        if let Some(left_over) = self.left_over.get(id) {
            return Before::LeftOver(left_over.stamp);
        }
        let Some(seen) = self.seen.get(id) else { return Before::Unknown };
        let unsettled = seen.missing.is_some() || seen.fault.as_ref().is_some_and(|fault| !fault.reported);
        Before::Seen(seen.stamp.filter(|_| !unsettled))
    }

    /// A file was read, and is good.
    pub(super) fn good(&mut self, stamp: Stamp, content: u64, sandbox: Sandbox) {
        let id = sandbox.id.clone();
        self.forget_left_over(&id);
        let seen = self.seen.entry(id).or_default();
        (seen.stamp, seen.fault, seen.missing) = (Some(stamp), None, None);
        let changes = match &seen.sandbox {
            Some((_, known)) if *known == content => return,
            known => known.is_some(),
        };
        let sandbox = Arc::new(sandbox);
        seen.sandbox = Some((Arc::clone(&sandbox), content));
        let change = if changes { Change::Changed(sandbox) } else { Change::Appeared(sandbox) };
        self.receivers.send(&change);
    }

    /// A file was read, and cannot be used; said once it has been so for a while.
    pub(super) fn bad(&mut self, id: &PodId, stamp: Stamp, content: u64, fault: Fault, now: Instant) {
        self.forget_left_over(id);
        let seen = self.seen.entry(id.clone()).or_default();
        (seen.stamp, seen.missing) = (Some(stamp), None);
        match &mut seen.fault {
            Some(known) if known.content == content => known.fault = fault,
            known => *known = Some(Faulty { fault, content, since: now, reported: false }),
        }
        self.settle(id, now);
    }

    /// The directory is there, the file is not.
    pub(super) fn empty(&mut self, id: &PodId, now: Instant) {
        self.forget_left_over(id);
        self.seen.entry(id.clone()).or_default().missing.get_or_insert(now);
        self.settle(id, now);
    }

    /// The directory has no file, though the sandbox lives: it is of a layout that is not known.
    pub(super) fn without_file(&mut self, id: &PodId, reason: &str, now: Instant) {
        let settled = |seen: &&mut Seen| {
            seen.sandbox.is_none()
                && seen.missing.is_some_and(|since| now.duration_since(since) >= self.settle)
        };
        let Some(seen) = self.seen.get_mut(id).filter(settled) else { return };
        if seen.fault.is_none() {
            let fault = Fault { reason: reason.to_owned(), server_name: None };
            seen.fault = Some(Faulty { fault, content: 0, since: now, reported: true });
            self.receivers.send(&Change::Broken { id: id.clone(), reason: reason.to_owned() });
        }
    }

    /// There is no such directory.
    pub(super) fn nothing(&mut self, id: &PodId, now: Instant) {
        self.forget_left_over(id);
        let Some(seen) = self.seen.get_mut(id) else { return };
        seen.missing.get_or_insert(now);
        self.settle(id, now);
        // Kept until its end was said.
        if self.seen.get(id).is_some_and(|seen| seen.sandbox.is_none() && seen.fault.is_none()) {
            self.seen.remove(id);
        }
    }

    /// The pods directory is not there: no sandbox is.
    pub(super) fn all_missing(&mut self, now: Instant) {
        let ids: Vec<PodId> = self.seen.keys().chain(self.left_over.keys()).cloned().collect();
        for id in ids {
            self.nothing(&id, now);
        }
    }

    /// The sandbox is left over: its pod is long gone.
    pub(super) fn leave(&mut self, id: PodId, stamp: Stamp) {
        let name = self
            .seen
            .remove(&id)
            .and_then(|seen| seen.sandbox)
            .and_then(|(sandbox, _)| sandbox.tls.as_ref().map(|tls| tls.server_name.clone()));
        self.forget_left_over(&id);
        self.left_over.insert(id.clone(), LeftOver { stamp, name: None });
        if let Some(name) = name {
            self.name(&id, &name);
        }
    }

    /// The server name of a sandbox that is left over.
    pub(super) fn name(&mut self, id: &PodId, name: &str) {
        let hash = self.hash(name.as_bytes());
        if let Some(left_over) = self.left_over.get_mut(id)
            && left_over.name.is_none()
        {
            left_over.name = Some(hash);
            self.named.entry(hash).or_default().push(id.clone());
        }
    }

    fn forget_left_over(&mut self, id: &PodId) {
        let Some(hash) = self.left_over.remove(id).and_then(|left_over| left_over.name) else { return };
        if let Some(ids) = self.named.get_mut(&hash) {
            ids.retain(|known| known != id);
            if ids.is_empty() {
                self.named.remove(&hash);
            }
        }
    }

    /// Says what has been broken or missing for long enough.
    fn settle(&mut self, id: &PodId, now: Instant) {
        let settle = self.settle;
        let settled = |since: Instant| now.duration_since(since) >= settle;
        let Some(seen) = self.seen.get_mut(id) else { return };
        if seen.missing.is_some_and(settled) {
            let said = seen.sandbox.take().is_some() | seen.fault.take().is_some_and(|fault| fault.reported);
            seen.stamp = None;
            if said {
                self.receivers.send(&Change::Gone(id.clone()));
            }
            return;
        }
        if seen.missing.is_none()
            && let Some(fault) = seen.fault.as_mut().filter(|fault| !fault.reported && settled(fault.since))
        {
            fault.reported = true;
            let reason = fault.fault.reason.clone();
            self.receivers.send(&Change::Broken { id: id.clone(), reason });
        }
    }

    /// Those that have to be looked at again soon.
    pub(super) fn unsettled(&self) -> Vec<PodId> {
        let unsettled = |seen: &Seen| {
            (seen.missing.is_some() && (seen.sandbox.is_some() || seen.fault.is_some()))
                || seen.fault.as_ref().is_some_and(|fault| !fault.reported)
        };
        self.seen.iter().filter(|(_, seen)| unsettled(seen)).map(|(id, _)| id.clone()).collect()
    }

    /// Those whose file is not there or not good: their directories are watched.
    pub(super) fn waiting(&self) -> Vec<PodId> {
        let waits = |seen: &Seen| seen.sandbox.is_none() || seen.fault.is_some() || seen.missing.is_some();
        self.seen.iter().filter(|(_, seen)| waits(seen)).map(|(id, _)| id.clone()).collect()
    }

    /// How many are known, and how many of these are left over.
    pub(super) fn counts(&self) -> (usize, usize) {
        (self.seen.len() + self.left_over.len(), self.left_over.len())
    }

    /// How many of those left over are found by a name.
    #[cfg(test)]
    pub(super) fn named(&self) -> usize {
        self.named.values().map(Vec::len).sum()
    }

    /// All of them, also those left over.
    pub(super) fn all(&self) -> Vec<PodId> {
        self.seen.keys().chain(self.left_over.keys()).cloned().collect()
    }

    pub(super) fn sandbox(&self, id: &PodId) -> Option<Arc<Sandbox>> {
        self.seen.get(id)?.sandbox.as_ref().map(|(sandbox, _)| Arc::clone(sandbox))
    }

    pub(super) fn sandboxes(&self) -> impl Iterator<Item = Arc<Sandbox>> {
        self.seen.values().filter_map(|seen| seen.sandbox.as_ref()).map(|(sandbox, _)| Arc::clone(sandbox))
    }

    pub(super) fn candidates(&self, server_name: &str) -> Candidates {
        let has =
            |sandbox: &Arc<Sandbox>| sandbox.tls.as_ref().is_some_and(|tls| tls.server_name == server_name);
        Candidates {
            seen: self.sandboxes().filter(has).collect(),
            left_over: self.named.get(&self.hash(server_name.as_bytes())).cloned().unwrap_or_default(),
        }
    }

    /// The sandbox with a broken file that this server name is probably of: by the certificate, if that could be read, or by
    /// the digits of its id with which cloud-api-adaptor's names end. For an error only.
    pub(super) fn broken(&self, server_name: &str) -> Option<(PodId, String)> {
        let suits = |id: &PodId, fault: &Fault| match &fault.server_name {
            Some(name) => name == server_name,
            None => {
                let digits = id.as_str().get(..8).unwrap_or(id.as_str()).to_ascii_lowercase();
                server_name.rsplit_once('-').is_some_and(|(_, end)| end == digits)
            }
        };
        let mut faults = self.seen.iter().filter_map(|(id, seen)| Some((id, &seen.fault.as_ref()?.fault)));
        faults.find(|(id, fault)| suits(id, fault)).map(|(id, fault)| (id.clone(), fault.reason.clone()))
    }

    /// A receiver of changes, which begins with what is there.
    pub(super) fn subscribe(&mut self) -> Changes {
        let appeared = self.seen.values().filter_map(|seen| seen.sandbox.as_ref());
        let appeared = appeared.map(|(sandbox, _)| Change::Appeared(Arc::clone(sandbox)));
        let reported = |fault: &&Faulty| fault.reported;
        let broken = self.seen.iter().filter_map(|(id, seen)| {
            let fault = seen.fault.as_ref().filter(reported)?;
            Some(Change::Broken { id: id.clone(), reason: fault.fault.reason.clone() })
        });
        self.receivers.add(appeared.chain(broken))
    }
}
