//! The Attestation phase: one attempt after the other to get this pod's keys from the KBS, each through one peer.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use secure_comms_keys::{KeyError, PodKeys};
use secure_comms_protocol::control::KeyProgress;
use secure_comms_protocol::limits::{KBS_FIRST_BYTE, KBS_FIRST_BYTE_MIN, KBS_PAUSE_MIN, KEY_FETCH};
use secure_comms_protocol::{Attestation, PodId, TunnelName, resource};
use secure_comms_tunnel::Backoff;
use secure_comms_tunnel::netns::{self, Namespace, NamespaceError};
use tokio::time::{sleep, timeout};
use zeroize::Zeroizing;

use crate::guest::{self, FetchError};
use crate::log::Repeated;
use crate::peers::Peer;
use crate::routes::Hurry;
use crate::session::Agent;

/// Why an attempt brought no keys.
#[derive(Debug, thiserror::Error)]
pub enum AttemptError {
    /// `api-server-rest` could not be reached.
    #[error("connecting to api-server-rest at {address}: {source}")]
    Connect {
        /// Where it should be.
        address: SocketAddr,
        /// The cause.
        source: NamespaceError,
    },
    /// It did not hand the resource over.
    #[error("fetching {path} through api-server-rest: {source}")]
    Fetch {
        /// The resource.
        path: String,
        /// The cause.
        source: FetchError,
    },
    /// It took too long.
    #[error("fetching {path} through api-server-rest: no answer within {} s", KEY_FETCH.as_secs())]
    TimedOut {
        /// The resource.
        path: String,
    },
    /// What it handed over is no key.
    #[error("the keys from the KBS: {0}")]
    Keys(#[from] KeyError),
    /// The peer whose attempt it was is to blame.
    #[error("{0}")]
    Peer(&'static str),
}

/// The guest components that fetch resources, as seen by the agent.
#[derive(Clone, Debug)]
pub struct Guest {
    /// The namespace that `api-server-rest` runs in; none for our own.
    pub namespace: Option<Namespace>,
    /// Its address there.
    pub address: SocketAddr,
}

/// Why a peer loses its turn whose KBS stream stays empty.
const SILENT: &str = "the attestation peer offers the KBS and brings no answer from it";

impl Guest {
    /// Fetches a pod's keys: each is a full attestation.
    async fn keys(&self, pod: &PodId) -> Result<PodKeys, AttemptError> {
        let host = self.resource(resource::pod_private_key(pod)).await?;
        let worker_node = self.resource(resource::WORKER_NODE_PUBLIC_KEY.to_owned()).await?;
        Ok(PodKeys::parse(&host, &worker_node)?)
    }

    async fn resource(&self, path: String) -> Result<Zeroizing<Vec<u8>>, AttemptError> {
        let fetch = async {
            let connect = netns::connect(self.namespace.as_ref(), self.address).await;
            let stream = connect.map_err(|source| AttemptError::Connect { address: self.address, source })?;
            guest::fetch(stream, &path)
                .await
                .map_err(|source| AttemptError::Fetch { path: path.clone(), source })
        };
        match timeout(KEY_FETCH, fetch).await {
            Ok(result) => result,
            Err(_) => Err(AttemptError::TimedOut { path }),
        }
    }
}

/// Attempts until one brings keys. Each belongs to one peer, the next to the next that offers the KBS: those that had
/// no turn yet come first.
pub async fn run(agent: &Agent, guest: &Guest) -> PodKeys {
    let mut backoff = Backoff::default();
    let mut failure = Repeated::new("getting the keys from the KBS");
    let mut last = 0;
    // An answer that was lost must not cost long; a KBS that is slow gets its time yet.
    let mut hurry = Hurry {
        first_byte: KBS_FIRST_BYTE_MIN,
        pause: KBS_PAUSE_MIN,
        silent: Arc::default(),
        paused: Arc::default(),
    };
    for attempt in 1.. {
        let peer = candidate(agent, last).await;
        last = peer.connection.id;
        match try_peer(agent, guest, &peer, &hurry).await {
            Ok(keys) => {
                failure.succeeded();
                agent.progress.send_replace(Some(KeyProgress { attempt, error: None }));
                return keys;
            }
            Err(error) => {
                if matches!(error, AttemptError::Peer(SILENT)) {
                    hurry.first_byte = (hurry.first_byte * 2).min(KBS_FIRST_BYTE);
                }
                if hurry.paused.swap(false, Ordering::Relaxed) {
                    hurry.pause = (hurry.pause * 2).min(KEY_FETCH);
                }
                // What a stream of this attempt has told late must not end the next one.
                hurry.silent = Arc::default();
                failure.failed(&error);
                agent.progress.send_replace(Some(KeyProgress { attempt, error: Some(error.to_string()) }));
            }
        }
        tokio::select! {
            () = backoff.pause() => {}
            // Somebody new need not wait for what others did wrong.
            () = newcomer(agent) => backoff.reset(),
        }
    }
    std::future::pending().await
}

fn eligible(peer: &Peer<Attestation>) -> bool {
    peer.pod.get().is_some()
        && peer.offers(&TunnelName::kbs())
        && !peer.is_dismissed()
        && !peer.credits.is_gone()
}

/// The next peer whose turn it is, once there is one.
async fn candidate(agent: &Agent, last: u64) -> Arc<Peer<Attestation>> {
    let mut changes = agent.attestation.changes();
    loop {
        let peers: Vec<_> = agent.attestation.all().into_iter().filter(|peer| eligible(peer)).collect();
        let next = peers
            .iter()
            .find(|peer| !peer.was_tried())
            .or_else(|| peers.iter().find(|peer| peer.connection.id > last))
            .or_else(|| peers.first());
        if let Some(peer) = next {
            if !peer.mark_tried()
                && let Some(pod) = peer.pod.get()
            {
                // Once for each peer; how its attempts go is told when it changes.
                log::info!("pod {pod}: getting the keys from the KBS through {}", peer.connection.address);
            }
            return peer.clone();
        }
        // The sender lives in the agent.
        drop(changes.changed().await);
    }
}

/// Waits for a peer that had no turn yet.
async fn newcomer(agent: &Agent) {
    let mut changes = agent.attestation.changes();
    while !agent.attestation.all().iter().any(|peer| eligible(peer) && !peer.was_tried()) {
        drop(changes.changed().await);
    }
}

/// One attempt. The fetch is always waited for, for a second one must not start beside it; a peer that has failed
/// loses its turn, and what is left of the fetch then fails fast.
async fn try_peer(
    agent: &Agent,
    guest: &Guest,
    peer: &Peer<Attestation>,
    hurry: &Hurry,
) -> Result<PodKeys, AttemptError> {
    let Some(pod) = peer.pod.get() else { return Err(AttemptError::Peer("the peer named no pod")) };
    agent.set_attempt(Some(peer.connection.id));
    agent.routes.attest(peer, hurry);
    let fetch = guest.keys(pod);
    tokio::pin!(fetch);
    let blame = tokio::select! {
        result = &mut fetch => Ok(result),
        why = lost(agent, peer, hurry) => Err(why),
    };
    let result = match blame {
        Ok(result) => result,
        Err(why) => {
            log::info!("connection from {}: {why}", peer.connection.address);
            agent.routes.refuse();
            agent.set_attempt(None);
            peer.dismiss(why);
            // The keys may have been on their way when the peer left.
            fetch.await.map_err(|_| AttemptError::Peer(why))
        }
    };
    agent.set_attempt(None);
    agent.routes.hold();
    result
}

/// Waits until the peer has lost its turn; why.
async fn lost(agent: &Agent, peer: &Peer<Attestation>, hurry: &Hurry) -> &'static str {
    let mut changes = agent.attestation.changes();
    let overtime = sleep(KBS_FIRST_BYTE);
    tokio::pin!(overtime);
    let mut late = false;
    loop {
        tokio::select! {
            () = peer.credits.gone() => return "the attestation peer left in the middle of its attempt",
            () = hurry.silent.notified() => return SILENT,
            () = &mut overtime, if !late => late = true,
            _ = changes.changed() => agent.routes.attest(peer, hurry),
        }
        let others = || agent.attestation.all().iter().any(|other| eligible(other) && !other.was_tried());
        if late && others() {
            return "the attestation peer took long, and another has come";
        }
    }
}
