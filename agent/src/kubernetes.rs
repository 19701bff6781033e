//! The Kubernetes phase: fresh until a worker node has logged in, then latched for the rest of this boot.

use secure_comms_keys::PodKeys;
use secure_comms_protocol::PhaseName;
use secure_comms_protocol::limits::{FRESH, UPGRADE_DRAIN};
use tokio::time::{sleep, timeout};

use crate::attestation::{self, Guest};
use crate::gate::Attesters;
use crate::session::Agent;

/// Enters the phase with `keys` and returns once a worker node has logged in. If none does for [`FRESH`], attestation
/// goes on beside it: keys that a stranger fed us do not last, unless the stranger logs in with them.
pub async fn latch(agent: &Agent, guest: &Guest, attesters: &Attesters, mut keys: PodKeys) {
    loop {
        let fingerprint = keys.fingerprint();
        if agent.gate.open_kubernetes(keys).is_err() {
            break;
        }
        log::info!("Kubernetes phase, fresh: host key {fingerprint}; waiting for the worker node");
        upgrade_attesters(agent).await;
        tokio::select! {
            biased;
            () = agent.gate.latched() => break,
            () = sleep(FRESH) => {}
        }
        if agent.gate.reopen_attestation(attesters.clone()).is_err() {
            break;
        }
        log::warn!("no worker node has logged in for {} s: attestation is open again", FRESH.as_secs());
        // In this order: once a worker node has logged in, nothing of an attempt may touch its routes.
        tokio::select! {
            biased;
            () = agent.gate.latched() => break,
            better = attestation::run(agent, guest) => keys = better,
        }
    }
    agent.set_attempt(None);
    if agent.kubernetes.newest().is_none() {
        // The attempt that the login has ended may have left its routes behind, and the worker node may be late, or
        // gone again.
        agent.routes.hold();
    }
    agent.dismiss_attestation("the agent serves its worker node and attests no more in this boot");
    log::info!("Kubernetes phase, latched: these keys serve until the VM reboots");
}

/// The gate is open: tells the attestation peers to come back as `kubernetes`, and lets them go.
async fn upgrade_attesters(agent: &Agent) {
    // They were shown a host key that is no longer ours.
    agent.unauthenticated.cut_all();
    agent.announce_upgrade();
    // Those that stay are cut.
    drop(timeout(UPGRADE_DRAIN, agent.attestation.none_left()).await);
    agent.dismiss_attestation("the keys are here; come back as user kubernetes");
}

/// Points the routes at the worker node, whenever there is one.
pub async fn serve(agent: &Agent) {
    let mut changes = agent.kubernetes.changes();
    let mut served = false;
    loop {
        match agent.kubernetes.newest() {
            Some(peer) => {
                agent.routes.kubernetes(&peer);
                served = true;
            }
            None if served => agent.routes.hold(),
            // An attempt's routes are not ours to touch.
            None => {}
        }
        debug_assert!(!served || agent.gate.phase() == PhaseName::Kubernetes);
        if changes.changed().await.is_err() {
            return;
        }
    }
}
