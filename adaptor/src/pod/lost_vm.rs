//! Recognises a VM that can no longer serve its pod, because it latched other keys.
//!
//! None of the evidence is proven: any SSH server can forge it. So one finding is only shown. A start ends when all
//! addresses of the pod have given the same finding for a while ([`LostLimits`]), and nothing else in between.

use std::time::Duration;

use secure_comms_protocol::PhaseName;
use tokio::time::Instant;

/// Findings in a row at each address. One can come from an agent that restarts at that moment, or from a stranger that
/// got the first connections.
const ROUNDS: u32 = 3;
/// The time between the first and the last of them: longer than an agent's restart.
const TIME_MIN: Duration = Duration::from_secs(10);
/// Its part of the start's deadline: a stranger must go on for that long, and a VM that is lost still fails the start
/// well before the deadline.
const DEADLINE_PART: u32 = 3;

/// The evidence at each address that ends a start.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LostLimits {
    pub(crate) rounds: u32,
    pub(crate) time: Duration,
}

impl LostLimits {
    /// For a start with this long a deadline.
    pub(crate) fn for_start(deadline: Duration) -> Self {
        Self { rounds: ROUNDS, time: TIME_MIN.max(deadline / DEADLINE_PART) }
    }
}

/// How often, and since when, an address has shown a lost VM and nothing else.
#[derive(Debug, Default)]
pub(super) struct LostFindings {
    rounds: u32,
    first_and_last: Option<(Instant, Instant)>,
}

impl LostFindings {
    /// Records the outcome of a connection attempt; anything but a lost VM discards the findings before it.
    pub(super) fn record(&mut self, lost: bool) {
        if !lost {
            *self = Self::default();
            return;
        }
        let now = Instant::now();
        let (first, _) = self.first_and_last.unwrap_or((now, now));
        self.first_and_last = Some((first, now));
        self.rounds = self.rounds.saturating_add(1);
    }

    /// Whether the last attempt found a lost VM.
    pub(super) fn found(&self) -> bool {
        self.rounds > 0
    }

    /// Whether the findings end a start.
    pub(super) fn suffice(&self, limits: LostLimits) -> bool {
        let time = self.first_and_last.map_or(Duration::ZERO, |(first, last)| last - first);
        self.rounds >= limits.rounds && time >= limits.time
    }
}

/// Collects the evidence that a VM is lost to its pod: over a KBS without TLS, a stranger may have posed as the KBS and
/// given the VM other keys.
///
/// It takes three attempts in a row: a host key that is not the pod's, a refusal to attest because the agent is in the
/// Kubernetes phase, and the same host key again. Without the third attempt, an agent that gets its keys between the
/// first two would count as lost.
#[derive(Debug, Default)]
pub(super) enum LostVmDetector {
    #[default]
    NoEvidence,
    WrongKey(String),
    WrongKeyThenRefused(String),
}

impl LostVmDetector {
    /// Records a host key that is not the pod's; true if the VM is lost.
    pub(super) fn wrong_host_key(&mut self, shown: &str) -> bool {
        let lost = matches!(self, Self::WrongKeyThenRefused(before) if before == shown);
        *self = Self::WrongKey(shown.to_owned());
        lost
    }

    /// Records a refusal to attest; `latched_in` is the phase that the agent says it cannot leave.
    pub(super) fn attestation_refused(&mut self, latched_in: Option<PhaseName>) {
        *self = match std::mem::take(self) {
            Self::WrongKey(key) if latched_in == Some(PhaseName::Kubernetes) => {
                Self::WrongKeyThenRefused(key)
            }
            _ => Self::NoEvidence,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_wrong_key_before_and_after_a_refusal_is_a_lost_vm() {
        let mut detector = LostVmDetector::default();
        detector.attestation_refused(Some(PhaseName::Kubernetes));
        assert!(!detector.wrong_host_key("k"));
        assert!(!detector.wrong_host_key("k"));
        detector.attestation_refused(Some(PhaseName::Kubernetes));
        assert!(detector.wrong_host_key("k"));
    }

    #[test]
    fn an_agent_that_moved_on_between_attempts_is_not_lost() {
        let mut detector = LostVmDetector::default();
        assert!(!detector.wrong_host_key("ephemeral"));
        detector.attestation_refused(Some(PhaseName::Kubernetes));
        assert!(!detector.wrong_host_key("another"));
        for hint in [None, Some(PhaseName::Attestation)] {
            detector.attestation_refused(hint);
            assert!(!detector.wrong_host_key("another"));
        }
    }

    #[test]
    fn a_third_of_the_deadline_and_ten_seconds_are_required() {
        let time = |deadline| LostLimits::for_start(Duration::from_secs(deadline)).time.as_secs();
        assert_eq!([0, 12, 30, 60, 300].map(time), [10, 10, 10, 20, 100]);
        assert!(LostLimits::for_start(Duration::MAX).time > Duration::from_secs(1 << 40));
    }

    #[tokio::test(start_paused = true)]
    async fn findings_suffice_only_over_rounds_and_time() {
        let limits = LostLimits::for_start(Duration::from_secs(60));
        let mut findings = LostFindings::default();
        for _ in 0..100 {
            findings.record(true);
        }
        assert!(findings.found() && !findings.suffice(limits), "no time has passed");
        tokio::time::sleep(Duration::from_secs(19)).await;
        findings.record(true);
        assert!(!findings.suffice(limits));
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(!findings.suffice(limits), "the time counts up to the last finding");
        findings.record(true);
        assert!(findings.suffice(limits));

        let mut findings = LostFindings::default();
        findings.record(true);
        tokio::time::sleep(Duration::from_secs(100)).await;
        findings.record(true);
        assert!(!findings.suffice(limits), "two findings are not enough");
    }

    #[tokio::test(start_paused = true)]
    async fn another_finding_discards_the_findings_before_it() {
        let limits = LostLimits::for_start(Duration::from_secs(30));
        let mut findings = LostFindings::default();
        for lost in [true, true, true, false, true, true] {
            findings.record(lost);
            tokio::time::sleep(Duration::from_secs(6)).await;
        }
        assert!(findings.found() && !findings.suffice(limits));
        findings.record(true);
        assert!(findings.suffice(limits));
    }
}
