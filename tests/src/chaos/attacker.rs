//! Somebody who tries every door of the agent that is not theirs, all the time.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::time::{sleep, timeout};

use crate::attackers::stranger::{Answer, Stranger};
use crate::simulators::openssh::OpenSsh;

/// What an agent without files, or one that is stopped, may take.
const PATIENCE: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(150);
/// Tunnels to the VM, and from it, of the Kubernetes phase.
const TO_VM: [&str; 2] = ["KATAAGENT", "VMSERVICE"];
const FROM_VM: [&str; 2] = ["NODESERVICE", "KATAAGENT"];

/// Tries them until dropped; tells of each that opened.
///
/// # Errors
/// It can't make a key.
pub async fn try_doors(agent: SocketAddr, directory: &Path, opened: impl Fn(String)) -> Result<()> {
    let (key, _) = OpenSsh::keygen(directory, "stranger").await.context("the stranger's key")?;
    loop {
        // That it is refused, or cut, or there is no agent: all of that is as it should be.
        if let Ok(Ok(stranger)) = timeout(PATIENCE, Stranger::attestation(agent, Answer::Closes)).await {
            attested(stranger, &opened).await;
        }
        if let Ok(Ok(_)) = timeout(PATIENCE, Stranger::kubernetes(agent, &key)).await {
            opened("a stranger with a key of its own logged in".to_owned());
        }
        sleep(PAUSE).await;
    }
}

/// In the Attestation phase anybody may be; with the tunnels of the other phase, nobody.
async fn attested(mut stranger: Stranger, opened: &impl Fn(String)) {
    for tunnel in TO_VM {
        if let Ok(Ok(_)) = timeout(PATIENCE, stranger.open(tunnel)).await {
            opened(format!("a stranger in the Attestation phase reached {tunnel}"));
        }
    }
    for tunnel in FROM_VM {
        if let Ok(Ok(())) = timeout(PATIENCE, stranger.offer(tunnel)).await {
            opened(format!("a stranger in the Attestation phase may serve {tunnel}"));
        }
    }
}

/// Whether a stranger may attest.
pub async fn may_attest(agent: SocketAddr) -> bool {
    matches!(timeout(PATIENCE, Stranger::attestation(agent, Answer::Closes)).await, Ok(Ok(_)))
}
