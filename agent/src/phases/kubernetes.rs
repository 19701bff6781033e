//! The Kubernetes phase: fresh until a worker node has logged in, then latched until the VM reboots.

use secure_comms_protocol::limits::{FIRST_LOGIN_TIMEOUT, UPGRADE_DRAIN};
use secure_comms_protocol::{PhaseName, PodId};
use tokio::time::{sleep, timeout};

use super::attestation::{self, GuestApi};
use crate::access::policy::Attesters;
use crate::agent::Agent;
use crate::os::progress::with_progress;
use secure_comms_keys::PodKeys;

/// Enters the phase with the keys of a pod, and returns once a worker node has logged in. If none does within [`FIRST_LOGIN_TIMEOUT`], attestation
/// goes on in parallel: keys that a stranger supplied are replaced, unless the stranger logs in with them.
pub(crate) async fn until_latched(
    agent: &Agent,
    guest: &GuestApi,
    attesters: &Attesters,
    keys: (PodKeys, PodId),
) {
    let (mut keys, mut pod) = keys;
    loop {
        let fingerprint = keys.fingerprint();
        if agent.policy.open_kubernetes(keys).is_err() {
            break;
        }
        agent.set_pod(pod);
        log::info!("Kubernetes phase, fresh: host key {fingerprint}; waiting for the worker node");
        upgrade_attesters(agent).await;
        tokio::select! {
            biased;
            () = with_progress("login of the worker node", FIRST_LOGIN_TIMEOUT, agent.policy.until_latched()) => break,
            () = sleep(FIRST_LOGIN_TIMEOUT) => {}
        }
        if agent.policy.reopen_attestation(attesters.clone()).is_err() {
            break;
        }
        log::warn!(
            "no worker node has logged in for {} s: attestation is open again",
            FIRST_LOGIN_TIMEOUT.as_secs()
        );
        // In this order: after a login, an attempt must not touch the routes of the worker node.
        tokio::select! {
            biased;
            () = agent.policy.until_latched() => break,
            better = attestation::get_keys(agent, guest) => (keys, pod) = better,
        }
    }
    agent.attempt.set_peer(None);
    if !agent.has_worker_node() {
        // The login may have cancelled an attempt, whose routes are still set; and the worker node may be late, or gone
        // again.
        agent.tunnels.routes.clear();
    }
    agent.peers.attestation.close_all("the agent serves its worker node and attests no more in this boot");
    log::info!("Kubernetes phase, latched: these keys serve until the VM reboots");
}

/// Asks the attestation peers to come back as `kubernetes`, and closes their connections.
async fn upgrade_attesters(agent: &Agent) {
    // These were shown a host key that is out of use.
    agent.limits.unauthenticated.end_all("the agent has new keys; connect again");
    agent.announce_upgrade();
    // The rest is closed below.
    drop(timeout(UPGRADE_DRAIN, agent.peers.attestation.until_empty()).await);
    agent.peers.attestation.close_all("the keys are here; come back as user kubernetes");
}

/// Routes local clients to the session, also while it has no connection; without one to the adaptor, or to a guest that offers
/// tunnels. Never returns.
pub(crate) async fn route_to_worker_node(agent: &Agent) {
    let mut changes = agent.peers.kubernetes.changes();
    let mut routed = false;
    loop {
        match (agent.sessions.current(), agent.peers.kubernetes.serving()) {
            (Some(session), _) => {
                agent.tunnels.routes.set_session(&session);
                routed = true;
            }
            (None, Some(peer)) => {
                agent.tunnels.routes.set_kubernetes(&peer);
                routed = true;
            }
            (None, None) if routed => agent.tunnels.routes.clear(),
            // The routes may be those of an attempt.
            (None, None) => {}
        }
        debug_assert!(!routed || agent.policy.phase() == PhaseName::Kubernetes);
        if changes.changed().await.is_err() {
            return;
        }
    }
}
