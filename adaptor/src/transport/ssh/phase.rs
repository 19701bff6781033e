//! The phases as the client sees them: how the agent's host key is checked, and what its streams may hold.

use russh::keys::PublicKey;
use secure_comms_protocol::limits::CreditLimits;
use secure_comms_protocol::{Attestation, Kubernetes, Phase};

use secure_comms_keys::PodPublic;

/// A phase as the client sees it.
pub(crate) trait ClientPhase: Phase {
    /// What the agent's host key is checked against. The Kubernetes phase has no value that skips the check.
    type Host: Copy + Send + Sync + 'static;
    /// Credit limits of a connection.
    const CREDIT: CreditLimits;
    /// Whether the agent may have this host key.
    fn trusts(host: &Self::Host, shown: &PublicKey) -> bool;
}

/// Any host key: the Attestation phase authenticates neither end.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AnyHost;

impl ClientPhase for Attestation {
    type Host = AnyHost;
    const CREDIT: CreditLimits = CreditLimits::ATTESTATION;

    fn trusts(_: &AnyHost, _: &PublicKey) -> bool {
        true
    }
}

impl ClientPhase for Kubernetes {
    type Host = PodPublic;
    const CREDIT: CreditLimits = CreditLimits::KUBERNETES;

    fn trusts(host: &PodPublic, shown: &PublicKey) -> bool {
        // Compared in constant time. A key that is not Ed25519 cannot be the pod's.
        PodPublic::from_ssh(shown).is_ok_and(|shown| shown == *host)
    }
}
