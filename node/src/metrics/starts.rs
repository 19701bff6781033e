//! What becomes of pods: starts and their phases, losses of connections, resumes, and errors of the KBS.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use secure_comms_adaptor::AdaptorError;
use secure_comms_adaptor::kbs::KbsError;
use secure_comms_adaptor::pod::PodEvent;
use secure_comms_protocol::{KeyProgress, PhaseName, PodId};

use super::Reason;
use crate::pods::Order;

/// Pods whose starts are measured at a time. One more displaces the oldest: nothing may say that a failed one is given up.
const MEASURED_MAX: usize = 10_000;
/// The first phase of a start.
const KEYS: &str = "keys";
/// Bounds of the durations of a start, in seconds.
const START_BUCKETS: [f64; 14] =
    [0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0, 600.0];
/// Bounds of the gaps of resumed sessions, in seconds: the runtime's patience is 33 s.
const GAP_BUCKETS: [f64; 11] = [0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 25.0, 33.0, 60.0];

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Outcome {
    result: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Step {
    phase: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Kind {
    kind: &'static str,
}

type Durations = Family<Step, Histogram, fn() -> Histogram>;

#[derive(Debug)]
pub(super) struct Starts {
    prepares: Family<Outcome, Counter>,
    starts: Family<Outcome, Counter>,
    phases: Durations,
    key_attempts: Family<Outcome, Counter>,
    losses: Family<Reason, Counter>,
    reconnects: Family<Reason, Counter>,
    resumes: Counter,
    gaps: Histogram,
    sessions_over: Counter,
    kbs_errors: Family<Kind, Counter>,
    measured: Mutex<HashMap<PodId, Measured>>,
}

/// How far a pod's start has come, and why its connection was lost.
#[derive(Debug)]
struct Measured {
    added: Instant,
    begun: Option<Instant>,
    /// The phase that it is in, and since when.
    phase: Option<(&'static str, Instant)>,
    lost: Option<&'static str>,
}

fn start_histogram() -> Histogram {
    Histogram::new(START_BUCKETS)
}

impl Starts {
    pub(super) fn new(registry: &mut Registry) -> Self {
        let starts = Self {
            prepares: Family::default(),
            starts: Family::default(),
            phases: Family::new_with_constructor(start_histogram),
            key_attempts: Family::default(),
            losses: Family::default(),
            reconnects: Family::default(),
            resumes: Counter::default(),
            gaps: Histogram::new(GAP_BUCKETS),
            sessions_over: Counter::default(),
            kbs_errors: Family::default(),
            measured: Mutex::default(),
        };
        starts.begin_series();
        starts.register(registry);
        starts
    }

    /// Series that are there from the start: a rate has its first step only then.
    fn begin_series(&self) {
        for result in ["up", "deadline", "failed"] {
            drop(self.starts.get_or_create(&Outcome { result }));
        }
        for result in ["prepared", "deadline", "kbs"] {
            drop(self.prepares.get_or_create(&Outcome { result }));
        }
        for reason in ["timeout", "agent", "reset", "closed", "other"] {
            drop(self.losses.get_or_create(&Reason { reason }));
            drop(self.reconnects.get_or_create(&Reason { reason }));
        }
        for kind in ["refused", "unanswered", "unreachable"] {
            drop(self.kbs_errors.get_or_create(&Kind { kind }));
        }
    }

    fn register(&self, registry: &mut Registry) {
        registry.register(
            "prepares",
            "Orders of launchers to prepare a pod, by their result; each repetition counts",
            self.prepares.clone(),
        );
        registry.register("starts", "Starts that launchers ordered, by their result", self.starts.clone());
        registry.register_with_unit(
            "phase_duration",
            "Time of a start in each phase, and of all of them, from the order to prepare until the pod can be used",
            Unit::Seconds,
            self.phases.clone(),
        );
        registry.register(
            "key_attempts",
            "Attempts of agents to get their keys from the KBS, as far as they say so",
            self.key_attempts.clone(),
        );
        registry.register(
            "channel_losses",
            "Connections in the Kubernetes phase that were lost, by the reason",
            self.losses.clone(),
        );
        registry.register(
            "reconnects",
            "Pods whose Kubernetes phase came up again, by the reason of the loss",
            self.reconnects.clone(),
        );
        registry.register("session_resumes", "Sessions whose streams went on", self.resumes.clone());
        registry.register_with_unit(
            "session_resume_gap",
            "Time from the last sign of the agent until its session went on",
            Unit::Seconds,
            self.gaps.clone(),
        );
        registry.register("sessions_over", "Sessions whose streams were reset", self.sessions_over.clone());
        registry.register("kbs_errors", "Failed requests to the KBS, by their kind", self.kbs_errors.clone());
    }

    pub(super) fn ordered(&self, pod: &PodId, order: &Order<'_>) {
        match order {
            Order::Prepare => self.measure(pod, |measured| {
                // One that is ordered again, as after a failure, is the same start: else an outage of the KBS would not show.
                let now = Instant::now();
                let keys = measured.phase.filter(|(phase, _)| *phase == KEYS).unwrap_or((KEYS, now));
                (measured.begun, measured.phase, measured.lost) =
                    (measured.begun.or(Some(now)), Some(keys), None);
            }),
            Order::Prepared(result) => {
                self.prepares.get_or_create(&Outcome { result: outcome(result, "prepared") }).inc();
                self.failed_at_the_kbs(result);
            }
            Order::Started(result) => {
                self.starts.get_or_create(&Outcome { result: outcome(result, "up") }).inc();
                self.failed_at_the_kbs(result);
            }
            Order::Stopped => {
                self.measured().remove(pod);
            }
        }
    }

    pub(super) fn happened(&self, pod: &PodId, event: &PodEvent) {
        match event {
            PodEvent::Published => self.enter(pod, "vm"),
            PodEvent::Attesting(_) => self.enter(pod, "attestation"),
            PodEvent::Upgrade(_) => self.enter(pod, "kubernetes"),
            PodEvent::Up(_) => self.up(pod),
            PodEvent::Resumed { after, .. } => {
                self.resumes.inc();
                self.gaps.observe(after.as_secs_f64());
                self.up(pod);
            }
            PodEvent::Keys(KeyProgress { error, .. }) => {
                let result = if error.is_none() { "received" } else { "failed" };
                self.key_attempts.get_or_create(&Outcome { result }).inc();
            }
            PodEvent::Down(PhaseName::Kubernetes, why) => {
                let reason = loss(why);
                self.losses.get_or_create(&Reason { reason }).inc();
                self.measure(pod, |measured| measured.lost = Some(reason));
            }
            PodEvent::SessionOver(_) => {
                self.sessions_over.inc();
            }
            PodEvent::WithdrawFailed(_) => self.kbs_error("withdraw"),
            PodEvent::PublishFailed(_) => self.kbs_error("publish"),
            PodEvent::DeleteFailed(_) => self.kbs_error("delete"),
            _ => {}
        }
    }

    /// Ends the phase that the pod's start is in, and begins the next one. A pod that is not being started, or is in that
    /// phase or a later one, as with a second address, stays where it is.
    fn enter(&self, pod: &PodId, next: &'static str) {
        const ORDER: [&str; 4] = [KEYS, "vm", "attestation", "kubernetes"];
        let place = |phase: &str| ORDER.iter().position(|known| *known == phase);
        let mut ended = None;
        if let Some(measured) = self.measured().get_mut(pod)
            && let Some((phase, since)) = measured.phase
            && place(phase) < place(next)
        {
            ended = Some((phase, since));
            measured.phase = Some((next, Instant::now()));
        }
        if let Some((phase, since)) = ended {
            self.observe(phase, since);
        }
    }

    fn up(&self, pod: &PodId) {
        let Some(measured) = self.measured().remove(pod) else { return };
        if let Some((phase, since)) = measured.phase {
            self.observe(phase, since);
        }
        if let Some(begun) = measured.begun {
            self.observe("all", begun);
        }
        if let Some(reason) = measured.lost {
            self.reconnects.get_or_create(&Reason { reason }).inc();
        }
    }

    fn observe(&self, phase: &'static str, since: Instant) {
        self.phases.get_or_create(&Step { phase }).observe(since.elapsed().as_secs_f64());
    }

    fn failed_at_the_kbs(&self, result: &Result<(), &AdaptorError>) {
        if let Err(AdaptorError::Kbs(error)) = result {
            self.kbs_error(kbs_kind(error));
        }
    }

    fn kbs_error(&self, kind: &'static str) {
        self.kbs_errors.get_or_create(&Kind { kind }).inc();
    }

    fn measure(&self, pod: &PodId, change: impl FnOnce(&mut Measured)) {
        let mut all = self.measured();
        if all.len() >= MEASURED_MAX && !all.contains_key(pod) {
            let oldest = all.iter().min_by_key(|(_, measured)| measured.added).map(|(id, _)| id.clone());
            oldest.and_then(|oldest| all.remove(&oldest));
        }
        let new = || Measured { added: Instant::now(), begun: None, phase: None, lost: None };
        change(all.entry(pod.clone()).or_insert_with(new));
    }

    fn measured(&self) -> MutexGuard<'_, HashMap<PodId, Measured>> {
        self.measured.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn outcome(result: &Result<(), &AdaptorError>, good: &'static str) -> &'static str {
    match result {
        Ok(()) => good,
        Err(error) => match error {
            AdaptorError::Store(_) | AdaptorError::Key(_) | AdaptorError::NoKey(_) => "store",
            AdaptorError::Kbs(_) | AdaptorError::NotDeleted { .. } | AdaptorError::Ending { .. } => "kbs",
            AdaptorError::Bind(_) | AdaptorError::Path(_) => "listen",
            AdaptorError::Stopped(_) => "stopped",
            AdaptorError::AlreadyStarted(_) => "already-started",
            AdaptorError::PrepareDeadline { .. } | AdaptorError::Deadline { .. } => "deadline",
            AdaptorError::StartFailed { .. } => "failed",
            AdaptorError::UnexpectedAgent { .. } => "unexpected-agent",
            _ => "other",
        },
    }
}

fn kbs_kind(error: &KbsError) -> &'static str {
    match error {
        KbsError::Refused { .. } => "refused",
        KbsError::Certificate { .. } => "certificate",
        KbsError::Unanswered { .. } => "unanswered",
        KbsError::Unreachable { .. } => "unreachable",
        _ => "other",
    }
}

/// The kind of a loss, in one of few words: the text may quote a stranger.
fn loss(why: &str) -> &'static str {
    let has = |word: &str| why.contains(word);
    if has("timed out") || has("no answer") {
        "timeout"
    } else if has("the agent") {
        "agent"
    } else if has("reset") {
        "reset"
    } else if has("closed") || has("ended") || has("EOF") {
        "closed"
    } else {
        "other"
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::{Form, Metrics, text};
    use super::*;

    fn shown(metrics: &Metrics) -> String {
        text::encode(Form::OpenMetrics, &[&metrics.0.registry]).unwrap()
    }

    #[test]
    fn a_start_is_measured_phase_by_phase() {
        let metrics = Metrics::default();
        let pod: PodId = "p".parse().unwrap();
        let at = "127.0.0.1:2222".parse().unwrap();
        metrics.ordered(&pod, &Order::Prepare);
        for event in [
            PodEvent::Published,
            PodEvent::Attesting(at),
            PodEvent::Attesting(at),
            PodEvent::Keys(KeyProgress { attempt: 1, error: Some("x".into()) }),
            PodEvent::Keys(KeyProgress { attempt: 2, error: None }),
            PodEvent::Upgrade(at),
            PodEvent::Up(at),
        ] {
            metrics.happened(&pod, &event);
        }
        metrics.ordered(&pod, &Order::Started(Ok(())));
        let text = shown(&metrics);
        for phase in ["keys", "vm", "attestation", "kubernetes", "all"] {
            let line = format!("secure_comms_phase_duration_seconds_count{{phase=\"{phase}\"}} 1\n");
            assert!(text.contains(&line), "{line}: {text}");
        }
        assert!(text.contains("secure_comms_starts_total{result=\"up\"} 1\n"), "{text}");
        assert!(text.contains("secure_comms_key_attempts_total{result=\"failed\"} 1\n"), "{text}");
        assert!(metrics.0.starts.measured().is_empty());
    }

    #[test]
    fn a_start_ordered_again_is_measured_from_the_first_order() {
        let metrics = Metrics::default();
        let pod: PodId = "p".parse().unwrap();
        metrics.ordered(&pod, &Order::Prepare);
        let first = {
            let mut all = metrics.0.starts.measured();
            let measured = all.get_mut(&pod).unwrap();
            let hour_ago = Instant::now().checked_sub(Duration::from_secs(3600)).unwrap();
            (measured.begun, measured.phase) = (Some(hour_ago), Some((KEYS, hour_ago)));
            hour_ago
        };
        metrics.ordered(&pod, &Order::Prepare);
        let again = |metrics: &Metrics| {
            let all = metrics.0.starts.measured();
            (all[&pod].begun, all[&pod].phase)
        };
        assert_eq!(again(&metrics), (Some(first), Some((KEYS, first))));
        metrics.happened(&pod, &PodEvent::Published);
        metrics.ordered(&pod, &Order::Prepare);
        let (begun, phase) = again(&metrics);
        assert_eq!((begun, phase.map(|(phase, _)| phase)), (Some(first), Some(KEYS)));
        assert!(phase.unwrap().1 > first, "its keys were published once");
    }

    #[test]
    fn a_deletion_that_fails_is_an_error_of_the_kbs() {
        let metrics = Metrics::default();
        let text = shown(&metrics);
        assert!(text.contains("secure_comms_prepares_total{result=\"prepared\"} 0\n"), "{text}");
        metrics.happened(&"p".parse().unwrap(), &PodEvent::DeleteFailed("503".to_owned()));
        let text = shown(&metrics);
        assert!(text.contains("secure_comms_kbs_errors_total{kind=\"delete\"} 1\n"), "{text}");
    }

    #[test]
    fn a_loss_and_its_resume_are_counted_by_reason() {
        let metrics = Metrics::default();
        let pod: PodId = "p".parse().unwrap();
        let address = "127.0.0.1:2222".parse().unwrap();
        metrics.happened(&pod, &PodEvent::Up(address));
        let why = "connection to 10.0.0.7:2222 timed out; failed over to 10.0.0.8:2222";
        metrics.happened(&pod, &PodEvent::Down(PhaseName::Kubernetes, why.into()));
        let after = Duration::from_millis(700);
        metrics.happened(&pod, &PodEvent::Resumed { address, after, streams: 2 });
        let text = shown(&metrics);
        for line in [
            "secure_comms_channel_losses_total{reason=\"timeout\"} 1\n",
            "secure_comms_reconnects_total{reason=\"timeout\"} 1\n",
            "secure_comms_session_resumes_total 1\n",
            "secure_comms_session_resume_gap_seconds_sum 0.7\n",
        ] {
            assert!(text.contains(line), "{line}: {text}");
        }
        assert!(!text.contains("phase_duration_seconds_count{"), "no start was ordered: {text}");
    }

    #[test]
    fn pods_that_are_measured_are_bounded() {
        let metrics = Metrics::default();
        for number in 0..MEASURED_MAX + 10 {
            metrics.ordered(&format!("p{number}").parse().unwrap(), &Order::Prepare);
        }
        let newest: PodId = format!("p{}", MEASURED_MAX + 9).parse().unwrap();
        let is_measured = |pod: &PodId| metrics.0.starts.measured().contains_key(pod);
        assert_eq!(metrics.0.starts.measured().len(), MEASURED_MAX);
        assert!(is_measured(&newest) && !is_measured(&"p0".parse().unwrap()), "the oldest made room");
        metrics.ordered(&newest, &Order::Stopped);
        assert_eq!(metrics.0.starts.measured().len(), MEASURED_MAX - 1);
    }
}
