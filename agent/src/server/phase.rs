//! What differs between the peers of the two phases.

use std::sync::Arc;

use secure_comms_protocol::limits::{CreditLimits, KEYS_REPORT};
use secure_comms_protocol::{Attestation, Control, Kubernetes, Phase};
use secure_comms_tunnel::Outbounds;
use secure_comms_tunnel::intercept::{Interceptor, PassThrough};
use tokio::time::timeout;

use crate::access::limiter::Place;
use crate::agent::Agent;
use crate::connection::Connection;
use crate::kata::KataAgent;
use crate::peers::peer::{Peer, Peers};

/// A phase, as the agent serves its peers.
pub(super) trait AgentPhase: Phase {
    /// Flow-control limits of a connection.
    const LIMITS: CreditLimits;
    /// The interceptor in one of its tunnels.
    type Interceptor: Interceptor;
    /// The peers of the phase.
    fn peers(agent: &Agent) -> &Peers<Self>
    where
        Self: Sized;
    /// The outbounds of the phase.
    fn outbounds(agent: &Agent) -> Arc<Outbounds<Self, Self::Interceptor>>
    where
        Self: Sized;
    /// Reserves a place for a connection of this generation; none if the phase is over.
    fn reserve(agent: &Agent, connection: &Connection, generation: u64) -> Option<Reservation>;
    /// Sends the messages that the phase repeats, until there will be no more.
    fn repeat_messages(agent: &Agent, peer: &Peer<Self>) -> impl Future<Output = ()> + Send
    where
        Self: Sized;
}

/// A place among the peers of a phase, given back on drop.
pub(super) enum Reservation {
    /// One of a limited number.
    Limited { _place: Place },
    /// The phase has no limit.
    Unlimited,
}

impl AgentPhase for Attestation {
    const LIMITS: CreditLimits = CreditLimits::ATTESTATION;
    type Interceptor = PassThrough;

    fn peers(agent: &Agent) -> &Peers<Self> {
        &agent.peers.attestation
    }

    fn outbounds(agent: &Agent) -> Arc<Outbounds<Self>> {
        agent.tunnels.attestation.clone()
    }

    fn reserve(agent: &Agent, connection: &Connection, generation: u64) -> Option<Reservation> {
        let exempt = agent.attempt.peer();
        agent.policy.allows_attestation(generation).then(|| Reservation::Limited {
            _place: agent.limits.attesting.admit_evicting(connection.clone(), exempt),
        })
    }

    /// `keys`, on every change and at least every [`KEYS_REPORT`], so that an operator sees why a pod is not attested.
    async fn repeat_messages(agent: &Agent, peer: &Peer<Self>) {
        let mut progress = agent.attempt.progress.subscribe();
        loop {
            let latest = progress.borrow_and_update().clone();
            if let Some(latest) = latest {
                peer.outbox.send(Control::Keys(latest));
            }
            if let Ok(Err(_)) = timeout(KEYS_REPORT, progress.changed()).await {
                return;
            }
        }
    }
}

impl AgentPhase for Kubernetes {
    const LIMITS: CreditLimits = CreditLimits::KUBERNETES;
    type Interceptor = KataAgent;

    fn peers(agent: &Agent) -> &Peers<Self> {
        &agent.peers.kubernetes
    }

    fn outbounds(agent: &Agent) -> Arc<Outbounds<Self, KataAgent>> {
        agent.tunnels.kubernetes.clone()
    }

    /// The newest connection replaces the others: the adaptor was restarted, or its older connection is half dead.
    fn reserve(agent: &Agent, _: &Connection, _: u64) -> Option<Reservation> {
        for older in agent.peers.kubernetes.all().into_iter().filter(|peer| !peer.is_closing()) {
            log::info!("connection from {}: replaced by a newer one", older.connection.address);
            older.close_gracefully("replaced by a newer connection of the worker node");
        }
        Some(Reservation::Unlimited)
    }

    async fn repeat_messages(_: &Agent, _: &Peer<Self>) {}
}
