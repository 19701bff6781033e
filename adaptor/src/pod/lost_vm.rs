//! Recognises a VM that can no longer serve its pod, because it latched other keys.

use secure_comms_protocol::PhaseName;

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
}
