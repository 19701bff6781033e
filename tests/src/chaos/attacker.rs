//! An attacker that tries, all the time, to get through the agent without the keys.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use tokio::time::{sleep, timeout};

use super::hostile_cloud::{BAIT_TUNNEL, LOGIN_KEY};
use crate::attackers::stranger::{Answer, Stranger};

/// Longest wait for an agent that is stopped or has no file descriptors.
const PATIENCE: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(150);
/// Tunnels to the VM, and from it, of the Kubernetes phase; and one that only hostile user data names.
const TO_VM: [&str; 3] = ["KATAAGENT", "VMSERVICE", BAIT_TUNNEL];
const FROM_VM: [&str; 2] = ["NODESERVICE", "KATAAGENT"];

/// Attacks until dropped; calls `opened` with each attempt that succeeded.
pub(super) async fn attack_agent(agent: SocketAddr, directory: &Path, opened: impl Fn(String)) -> Infallible {
    loop {
        // A refusal, a reset or an absent agent is the expected result.
        if let Ok(Ok(stranger)) = timeout(PATIENCE, Stranger::attestation(agent, Answer::Closes)).await {
            attested(stranger, &opened).await;
        }
        if may_log_in(agent, directory).await {
            opened("an attacker with its own key logged in".to_owned());
        }
        sleep(PAUSE).await;
    }
}

/// Anyone may be a peer in the Attestation phase, but not with a tunnel of the Kubernetes phase.
async fn attested(mut stranger: Stranger, opened: &impl Fn(String)) {
    for tunnel in TO_VM {
        if let Ok(Ok(_)) = timeout(PATIENCE, stranger.open(tunnel)).await {
            opened(format!("an unproven peer in the Attestation phase reached {tunnel}"));
        }
    }
    for tunnel in FROM_VM {
        if let Ok(Ok(())) = timeout(PATIENCE, stranger.offer(tunnel)).await {
            opened(format!("an unproven peer in the Attestation phase may serve {tunnel}"));
        }
    }
}

/// Whether the attacker may log in with the key that hostile user data and forged answers name.
pub(super) async fn may_log_in(agent: SocketAddr, directory: &Path) -> bool {
    let key = directory.join(LOGIN_KEY);
    matches!(timeout(PATIENCE, Stranger::kubernetes(agent, &key)).await, Ok(Ok(_)))
}

/// Whether an unproven peer may attest.
pub(super) async fn may_attest(agent: SocketAddr) -> bool {
    matches!(timeout(PATIENCE, Stranger::attestation(agent, Answer::Closes)).await, Ok(Ok(_)))
}
