//! What keeps pods from being used, as their launchers say it: also of a pod that has no channel yet.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use secure_comms_adaptor::pod::{PodSnapshot, PodState};
use secure_comms_keys::text::one_line;
use secure_comms_protocol::PodId;

use super::launch::Launch;

/// Pods with an obstacle that are remembered.
const PODS_MAX: usize = 1024;
/// How long a pod without a channel is shown after its launcher has last spoken of it: longer than cloud-api-adaptor waits
/// for a start. Its file may stay there.
const SHOWN: Duration = Duration::from_secs(900);
/// The longest text, in bytes.
const TEXT_MAX: usize = 1000;

/// What keeps a pod from being used.
#[derive(Clone, Debug)]
pub(super) struct Obstacle {
    launch: Launch,
    since: SystemTime,
    said: Instant,
    pub(super) reason: String,
}

impl Obstacle {
    /// A pod that is not served because of it.
    pub(super) fn snapshot(&self) -> PodSnapshot {
        PodSnapshot {
            state: PodState::Failed { reason: self.reason.clone() },
            since: self.since,
            labels: self.launch.to_labels(),
            addresses: Vec::new(),
            endpoints: Vec::new(),
            init_data: None,
            session: None,
        }
    }
}

/// The obstacles of all pods.
#[derive(Debug, Default)]
pub(super) struct Obstacles(Mutex<HashMap<PodId, Obstacle>>);

impl Obstacles {
    /// `None`: nothing keeps the pod from being used. Of too many pods the last ones are not remembered.
    pub(super) fn set(&self, id: &PodId, launch: &Launch, reason: Option<String>) {
        let mut all = self.lock();
        let Some(reason) = reason else {
            all.remove(id);
            return;
        };
        let since = all.get(id).map_or_else(SystemTime::now, |obstacle| obstacle.since);
        if all.len() < PODS_MAX || all.contains_key(id) {
            let reason = one_line(&reason, TEXT_MAX);
            all.insert(id.clone(), Obstacle { launch: launch.clone(), since, said: Instant::now(), reason });
        }
    }

    pub(super) fn get(&self, id: &PodId) -> Option<Obstacle> {
        self.current(Instant::now()).get(id).cloned()
    }

    pub(super) fn all(&self) -> Vec<(PodId, Obstacle)> {
        self.current(Instant::now()).iter().map(|(id, obstacle)| (id.clone(), obstacle.clone())).collect()
    }

    /// Without those that are shown no longer.
    fn current(&self, now: Instant) -> MutexGuard<'_, HashMap<PodId, Obstacle>> {
        let mut all = self.lock();
        all.retain(|_, obstacle| now.saturating_duration_since(obstacle.said) < SHOWN);
        all
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<PodId, Obstacle>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Launcher;
    use super::*;

    #[test]
    fn a_pod_without_a_channel_shows_what_keeps_it_down() {
        let obstacles = Obstacles::default();
        let id: PodId = "pod-1".parse().unwrap();
        let launch = Launch::now(Launcher::Caa, Some("default/web".parse().unwrap()));
        obstacles.set(&id, &launch, Some("no rule matches\npod".to_owned()));
        let snapshot = obstacles.get(&id).unwrap().snapshot();
        assert!(matches!(&snapshot.state, PodState::Failed { reason } if !reason.contains('\n')));
        assert_eq!(Launch::of_labels(&snapshot.labels), launch);
        obstacles.set(&id, &launch, None);
        assert!(obstacles.get(&id).is_none());
    }

    #[test]
    fn a_pod_that_is_not_spoken_of_is_shown_no_longer() {
        let obstacles = Obstacles::default();
        let launch = Launch::now(Launcher::Caa, None);
        obstacles.set(&"pod-1".parse().unwrap(), &launch, Some("its key does not fit".to_owned()));
        let now = Instant::now();
        assert_eq!(obstacles.current(now + SHOWN / 2).len(), 1);
        assert!(obstacles.current(now + SHOWN).is_empty());
    }

    #[test]
    fn obstacles_are_bounded() {
        let obstacles = Obstacles::default();
        let launch = Launch::now(Launcher::Caa, None);
        for number in 0..2000 {
            let id = format!("pod-{number}").parse().unwrap();
            obstacles.set(&id, &launch, Some("x".repeat(5000)));
        }
        assert_eq!(obstacles.all().len(), PODS_MAX);
        let cut = one_line(&"x".repeat(5000), TEXT_MAX);
        assert!(obstacles.all().iter().all(|(_, obstacle)| obstacle.reason == cut));
    }
}
