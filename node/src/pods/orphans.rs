//! Records of the store that no launcher will end: what is left of pods that were begun and never used, of commands that
//! were killed, and of deletions that do not succeed.

use std::fmt;
use std::time::{Duration, SystemTime};

use secure_comms_adaptor::pod::{PodSnapshot, PodState};
use secure_comms_adaptor::store::StoreError;
use secure_comms_adaptor::{Adaptor, AdaptorError, PodRecord, with_causes};
use secure_comms_protocol::PodId;

use super::launch::Launch;

/// A pod that was never started becomes an orphan after this time.
const NEVER_STARTED: Duration = Duration::from_secs(24 * 3600);
/// A pod without a launcher, and one whose deletion does not succeed, becomes an orphan after this time.
const LEFT_ALONE: Duration = Duration::from_secs(3600);

/// Why a record is an orphan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OrphanReason {
    /// No launcher of this service began it, and it is not up: another command did, as `connect` or `user-data`.
    NoLauncher,
    /// It was prepared more than a day ago, and never started.
    NeverStarted,
    /// It has been ending for more than an hour.
    Ending {
        /// Error of the last deletion; `None` if this process has not tried yet.
        last_error: Option<String>,
    },
}

impl OrphanReason {
    /// Its word in the API and in tables.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::NoLauncher => "NoLauncher",
            Self::NeverStarted => "NeverStarted",
            Self::Ending { .. } => "Ending",
        }
    }
}

impl fmt::Display for OrphanReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoLauncher => f.write_str("no launcher of this service began it, and it is not up"),
            Self::NeverStarted => f.write_str("prepared more than a day ago, and never started"),
            Self::Ending { last_error: None } => f.write_str("ending for more than an hour"),
            Self::Ending { last_error: Some(error) } => write!(f, "ending for more than an hour: {error}"),
        }
    }
}

/// A record that no launcher will end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Orphan {
    /// The pod.
    pub id: PodId,
    /// Who launched it, and its name in Kubernetes, where that is known.
    pub launch: Launch,
    /// Since when it is what the reason says.
    pub since: SystemTime,
    /// Why it is one.
    pub reason: OrphanReason,
}

/// Error of collecting an orphan.
#[derive(Debug, thiserror::Error)]
pub enum CollectError {
    /// The pod is no orphan, or has no record.
    #[error("pod {0} is no orphan: to end it, stop it")]
    NoOrphan(PodId),
    /// The store cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The pod was not ended.
    #[error(transparent)]
    Adaptor(#[from] AdaptorError),
}

pub(super) async fn list(adaptor: &Adaptor, now: SystemTime) -> Result<Vec<Orphan>, StoreError> {
    let mut all = Vec::new();
    for record in adaptor.records().await? {
        let id = record.id.clone();
        match check(adaptor, record, now).await {
            Ok(orphan) => all.extend(orphan),
            // It is one pod's fault.
            Err(error) => {
                tracing::warn!("pod {id}: it is left out of the orphans: {}", with_causes(&error));
            }
        }
    }
    Ok(all)
}

pub(super) async fn find(
    adaptor: &Adaptor,
    id: &PodId,
    now: SystemTime,
) -> Result<Option<Orphan>, StoreError> {
    match adaptor.record(id).await? {
        Some(record) => check(adaptor, record, now).await,
        None => Ok(None),
    }
}

async fn check(adaptor: &Adaptor, record: PodRecord, now: SystemTime) -> Result<Option<Orphan>, StoreError> {
    let snapshot = adaptor.snapshot(&record.id);
    match judge(record, snapshot.as_ref(), now) {
        // Its owner ends it.
        Some(orphan) if adaptor.is_held_elsewhere(&orphan.id).await? => Ok(None),
        judged => Ok(judged),
    }
}

/// What a record is, by its own age and the state of the pod.
fn judge(record: PodRecord, snapshot: Option<&PodSnapshot>, now: SystemTime) -> Option<Orphan> {
    let launch = Launch::of_labels(&record.labels);
    let older = |since: SystemTime, limit| now.duration_since(since).is_ok_and(|age| age >= limit);
    let state = snapshot.map(|snapshot| &snapshot.state);
    let idle_since = snapshot.map(|snapshot| snapshot.since).or(record.made);
    let (since, reason) = if let Some(since) = record.ending {
        let last_error = match state {
            Some(PodState::Ending { last_error }) => last_error.clone(),
            _ => None,
        };
        (older(since, LEFT_ALONE).then_some(since)?, OrphanReason::Ending { last_error })
    } else if matches!(state, Some(PodState::Up { .. })) {
        return None;
    } else if launch.launcher.is_none() {
        (idle_since.filter(|since| older(*since, LEFT_ALONE))?, OrphanReason::NoLauncher)
    } else if !record.started {
        (record.made.filter(|since| older(*since, NEVER_STARTED))?, OrphanReason::NeverStarted)
    } else {
        return None;
    };
    Some(Orphan { id: record.id, launch, since, reason })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::pods::Launcher;

    const HOUR: Duration = Duration::from_secs(3600);

    fn judged(change: impl FnOnce(&mut PodRecord), state: Option<PodState>) -> Option<OrphanReason> {
        let now = SystemTime::now();
        let mut record = PodRecord {
            id: "a".parse().unwrap(),
            labels: Launch::now(Launcher::Caa, None).to_labels(),
            made: Some(now - 48 * HOUR),
            started: true,
            ending: None,
        };
        change(&mut record);
        let snapshot = state.map(|state| PodSnapshot {
            state,
            since: now - 2 * HOUR,
            labels: BTreeMap::new(),
            addresses: Vec::new(),
            endpoints: Vec::new(),
            init_data: None,
            session: None,
        });
        judge(record, snapshot.as_ref(), now).map(|orphan| orphan.reason)
    }

    fn up() -> Option<PodState> {
        Some(PodState::Up { instance: "i".to_owned() })
    }

    fn down() -> Option<PodState> {
        Some(PodState::Down { reason: "x".to_owned() })
    }

    #[test]
    fn a_pod_of_a_launcher_is_no_orphan() {
        assert_eq!(judged(|_| {}, up()), None);
        assert_eq!(judged(|_| {}, down()), None);
        assert_eq!(judged(|_| {}, None), None);
    }

    #[test]
    fn a_pod_without_launcher_is_one_unless_it_is_up() {
        assert_eq!(judged(|record| record.labels.clear(), up()), None);
        assert_eq!(judged(|record| record.labels.clear(), down()), Some(OrphanReason::NoLauncher));
        assert_eq!(judged(|record| record.labels.clear(), None), Some(OrphanReason::NoLauncher));
        let young = |record: &mut PodRecord| {
            record.labels.clear();
            record.made = Some(SystemTime::now());
        };
        assert_eq!(judged(young, None), None);
    }

    #[test]
    fn a_pod_that_was_never_started_is_one_after_a_day() {
        let age = |hours: u32| {
            move |record: &mut PodRecord| {
                record.started = false;
                record.made = Some(SystemTime::now() - hours * HOUR);
            }
        };
        assert_eq!(judged(age(25), Some(PodState::Prepared)), Some(OrphanReason::NeverStarted));
        assert_eq!(judged(age(23), None), None);
    }

    #[test]
    fn a_deletion_that_does_not_succeed_is_one() {
        let ending =
            |hours: u32| move |record: &mut PodRecord| record.ending = Some(SystemTime::now() - hours * HOUR);
        let last_error = Some("the KBS is down".to_owned());
        let state = Some(PodState::Ending { last_error: last_error.clone() });
        assert_eq!(judged(ending(2), state), Some(OrphanReason::Ending { last_error }));
        assert_eq!(judged(ending(0), None), None);
    }
}
