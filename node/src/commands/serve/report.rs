//! What the service manager learns: readiness, a status line, and that the service lives.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use secure_comms_adaptor::pod::PodState;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

use crate::health::Health;
use crate::pods::Pods;
use crate::systemd::{Notifier, watchdog_interval};

/// Longest wait for all parts until the service is called ready: a service manager would end the service, and with it
/// pods that could do without the part.
const READY_PATIENCE: Duration = Duration::from_secs(30);
/// Shortest time between two changes of the status.
const STATUS_PAUSE: Duration = Duration::from_secs(1);
/// Longest time until the status is made once more, if no event says that it changes.
const STATUS_TICK: Duration = Duration::from_secs(10);

/// Keeps the service manager informed until it is dropped.
pub(super) struct Reporter {
    // Dropping it ends the tasks.
    _tasks: JoinSet<()>,
}

impl Reporter {
    pub(super) fn start(notifier: &Arc<Notifier>, pods: &Pods, health: &Health) -> Self {
        let mut tasks = JoinSet::new();
        tasks.spawn(status(Arc::clone(notifier), pods.clone(), health.clone()));
        if let Some(interval) = watchdog_interval() {
            tasks.spawn(watchdog(Arc::clone(notifier), pods.clone(), interval));
        }
        Self { _tasks: tasks }
    }
}

/// Says that the service is ready once no part has a fault: the sockets listen, the rules are in place.
pub(super) async fn ready(pods: &Pods, health: &Health, notifier: &Notifier) {
    let mut changes = health.subscribe();
    let works = changes.wait_for(|parts| parts.values().all(Option::is_none));
    // Bound first: the guard of the value must not be held while the health is read.
    let in_time = matches!(timeout(READY_PATIENCE, works).await, Ok(Ok(_)));
    if in_time {
        tracing::info!("serve: ready");
    } else {
        let faults = health.faults();
        let faults: Vec<String> = faults.iter().map(|(part, fault)| format!("{part}: {fault}")).collect();
        let seconds = READY_PATIENCE.as_secs();
        tracing::error!(
            "serve: not all parts work after {seconds} s; serving without: {}",
            faults.join("; ")
        );
    }
    // The last one may be of the start: it would stand next to "active".
    notifier.status(&status_line(pods, health));
    notifier.ready();
}

/// Keeps the status. Never returns.
async fn status(notifier: Arc<Notifier>, pods: Pods, health: Health) {
    let (mut events, mut faults) = (pods.events(), health.subscribe());
    loop {
        notifier.status(&status_line(&pods, &health));
        sleep(STATUS_PAUSE).await;
        tokio::select! {
            // Also if events were missed. Their sender is in `pods`.
            _ = events.recv() => {}
            // Its sender is in `health`.
            _ = faults.changed() => {}
            () = sleep(STATUS_TICK) => {}
        }
        events = events.resubscribe();
    }
}

/// `12 pods: 10 up, 1 connecting, 1 down; rules: nft is missing`
fn status_line(pods: &Pods, health: &Health) -> String {
    let all = pods.list();
    let mut phases = BTreeMap::new();
    for pod in &all {
        *phases.entry(rank(&pod.snapshot.state)).or_insert(0_usize) += 1;
    }
    let phases: Vec<String> = phases.iter().map(|((_, word), count)| format!("{count} {word}")).collect();
    let mut line = match all.len() {
        0 => "no pods".to_owned(),
        1 => format!("1 pod: {}", phases.join(", ")),
        count => format!("{count} pods: {}", phases.join(", ")),
    };
    let faults = health.faults();
    if let Some((part, fault)) = faults.first() {
        line.push_str(&format!("; {part}: {fault}"));
    }
    if faults.len() > 1 {
        line.push_str(&format!(" (and {} more)", faults.len() - 1));
    }
    line
}

/// The word for a state, and its place in the status.
fn rank(state: &PodState) -> (u8, &'static str) {
    match state {
        PodState::Up { .. } => (0, "up"),
        PodState::Down { .. } => (1, "down"),
        PodState::Connecting { .. } => (2, "connecting"),
        PodState::Attesting { .. } | PodState::Upgrading => (3, "attesting"),
        PodState::Preparing | PodState::Prepared => (4, "prepared"),
        PodState::Failed { .. } => (5, "failed"),
        PodState::Ending { .. } => (6, "ending"),
        PodState::NotPrepared | PodState::Stopped => (7, "not served"),
    }
}

/// Says that the service lives, as long as it does: a task of the runtime can look at the pods. Never returns.
async fn watchdog(notifier: Arc<Notifier>, pods: Pods, every: Duration) {
    let mut ticks = interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let pods = pods.clone();
        // Another task, so that it may run on another thread.
        let looked = tokio::spawn(async move { drop(pods.list()) });
        if looked.await.is_ok() {
            notifier.watchdog();
            notifier.send_late();
        }
    }
}
