//! The Attestation phase: attempts to get this pod's keys from the KBS, one after the other, each through one peer.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use secure_comms_protocol::control::KeyProgress;
use secure_comms_protocol::limits::{
    KBS_FIRST_BYTE, KBS_FIRST_BYTE_CONTESTED, KBS_FIRST_BYTE_MIN, KBS_PAUSE_MIN, KEY_FETCH, RETRY_MAX,
};
use secure_comms_protocol::{Attestation, InitDataDigest, PodId, TunnelName, resource};
use secure_comms_tunnel::netns::{self, Namespace, NamespaceError};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use zeroize::Zeroizing;

use super::attempt_queue::{AttemptQueue, Next};
use super::kbs_fetch::{self, Fault, FetchError};
use crate::access::sources::Source;
use crate::agent::Agent;
use crate::os::log_limits::{Repeated, UNPROVEN};
use crate::os::progress::with_progress;
use crate::peers::deadlines::{FirstByte, KbsDeadlines};
use crate::peers::peer::Peer;
use secure_comms_keys::{KeyError, PodKeys};

/// Why an attempt brought no keys.
#[derive(Debug, thiserror::Error)]
enum AttemptError {
    /// `api-server-rest` could not be reached.
    #[error("connecting to api-server-rest at {address}: {source}")]
    Connect { address: SocketAddr, source: NamespaceError },
    /// `api-server-rest` did not return the resource, or not in time.
    #[error("{0}")]
    Fetch(#[from] FetchError),
    /// A resource is not a key.
    #[error("the keys from the KBS: {0}")]
    Keys(#[from] KeyError),
    /// The peer of the attempt is to blame.
    #[error("{0}")]
    Peer(&'static str),
}

/// `api-server-rest`, the guest component that fetches resources from the KBS.
#[derive(Clone, Debug)]
pub(crate) struct GuestApi {
    /// The network namespace it listens in; none for our own.
    pub(crate) namespace: Option<Namespace>,
    /// The address it listens on.
    pub(crate) address: SocketAddr,
    /// The resource of a pod's keys.
    pub(crate) resource: KeyResource,
}

/// How a pod's keys are kept in the KBS.
#[derive(Clone, Debug)]
pub(crate) enum KeyResource {
    /// As one resource, under the digest of the VM's init-data if there is any.
    Joint(Option<InitDataDigest>),
    /// As the two resources of versions before 0.2.
    Separate,
}

/// Why a peer whose KBS stream stays empty loses the attempt.
const SILENT: &str = "the attestation peer offers the KBS and brings no answer from it";

impl GuestApi {
    /// Fetches a pod's keys. Each fetch is a full attestation.
    ///
    /// As one resource: an attacker on the path to the KBS can make an answer of his own, but can't read a true one. So he can keep
    /// both keys from us or replace both, and never mix them.
    async fn keys(&self, pod: &PodId) -> Result<PodKeys, AttemptError> {
        let digest = match &self.resource {
            KeyResource::Joint(digest) => digest.as_ref(),
            KeyResource::Separate => return self.separate_keys(pod).await,
        };
        let keys = self.resource(resource::pod_keys(pod, digest)).await?;
        Ok(PodKeys::from_resource(&keys)?)
    }

    async fn separate_keys(&self, pod: &PodId) -> Result<PodKeys, AttemptError> {
        let host = self.resource(resource::separate::pod_private_key(pod)).await?;
        let worker_node = self.resource(resource::separate::WORKER_NODE_PUBLIC_KEY.to_owned()).await?;
        Ok(PodKeys::parse(&host, &worker_node)?)
    }

    async fn resource(&self, path: String) -> Result<Zeroizing<Vec<u8>>, AttemptError> {
        let fetch = async {
            let connect = netns::connect(self.namespace.as_ref(), self.address).await;
            let stream = connect.map_err(|source| AttemptError::Connect { address: self.address, source })?;
            Ok(kbs_fetch::fetch(stream, &path).await?)
        };
        let fetch = with_progress(format!("fetching {path} through api-server-rest"), KEY_FETCH, fetch);
        let late = |_| Err(FetchError::new(&path, Fault::TimedOut).into());
        timeout(KEY_FETCH, fetch).await.unwrap_or_else(late)
    }
}

/// Makes attempts until one brings keys; returns them, and the pod that they belong to. Each uses one peer that offers the KBS, by the order and with the pauses of the
/// [`AttemptQueue`].
///
/// Cancellation: ends the current attempt; its routes and its peer's exemption from eviction stay for the caller to clear.
pub(crate) async fn get_keys(agent: &Agent, guest: &GuestApi) -> (PodKeys, PodId) {
    let sources = &agent.limits.sources;
    let mut queue = AttemptQueue::new(sources.clone());
    let mut failure = Repeated::new("getting the keys from the KBS").throttled(&UNPROVEN);
    let mut pause = KBS_PAUSE_MIN;
    for attempt in 1.. {
        let peer = next_peer(agent, &mut queue).await;
        // An eligible peer has named its pod.
        let Some(pod) = peer.pod.get() else { continue };
        let source = Source::of(peer.connection.address);
        let attempt_of = AttemptPeer { peer: &peer, pod, source };
        // Short at first, so that a lost answer costs little; longer after each miss, so that a slow KBS can answer.
        let deadlines = KbsDeadlines {
            first_byte: after_failures(agent, source, KBS_FIRST_BYTE_MIN),
            pause,
            // A late notification from a stream of this attempt must not end the next one.
            silent: Arc::default(),
            paused: Arc::default(),
            first: Arc::default(),
        };
        match try_peer(agent, guest, attempt_of, &mut queue, &deadlines).await {
            Ok(keys) => {
                failure.succeeded();
                agent.attempt.progress.send_replace(Some(KeyProgress { attempt, error: None }));
                return (keys, pod.clone());
            }
            Err(error) => {
                // An error that the KBS has answered with is none of the peer's.
                if matches!(error, AttemptError::Peer(_)) {
                    sources.attempt_failed(source, Instant::now());
                }
                if deadlines.paused.load(Ordering::Relaxed) {
                    pause = (pause * 2).min(KEY_FETCH);
                }
                failure.failed(&error);
                let error = error.to_string();
                report_pause(&peer, queue.failed(peer.connection.id, &error, Instant::now()));
                agent.attempt.failed(attempt, error);
            }
        }
    }
    std::future::pending().await
}

/// A limit on a silence, doubled for each attempt that the source has failed, up to [`KBS_FIRST_BYTE`].
fn after_failures(agent: &Agent, source: Source, limit: Duration) -> Duration {
    let failures = agent.limits.sources.failures(source, Instant::now());
    limit.saturating_mul(2_u32.saturating_pow(failures)).min(KBS_FIRST_BYTE)
}

/// Logs that a peer pauses for longer than the usual retries, each time that the pause grows.
fn report_pause(peer: &Peer<Attestation>, longer: Option<Duration>) {
    if let Some(pause) = longer.filter(|pause| *pause > RETRY_MAX) {
        log::log!(
            peer.connection.log_level(log::Level::Info),
            "connection from {}: the same answers again: attempts through it are up to {} s apart from now on; a new \
             connection is used at once",
            peer.connection.address,
            pause.as_secs()
        );
    }
}

fn is_eligible(peer: &Peer<Attestation>) -> bool {
    peer.pod.get().is_some()
        && peer.offers(&TunnelName::kbs())
        && !peer.is_closing()
        && !peer.credits.is_gone()
}

fn id_and_source(peer: &Peer<Attestation>) -> (u64, Source) {
    (peer.connection.id, Source::of(peer.connection.address))
}

/// Waits for the peer of the next attempt.
async fn next_peer(agent: &Agent, queue: &mut AttemptQueue) -> Arc<Peer<Attestation>> {
    let mut changes = agent.peers.attestation.changes();
    loop {
        let peers = agent.peers.attestation.all();
        queue.update(&peers.iter().map(|peer| id_and_source(peer)).collect::<Vec<_>>(), Instant::now());
        let find = |id| peers.iter().find(|peer| peer.connection.id == id && is_eligible(peer));
        let later = match queue.next(Instant::now(), |id| find(id).is_some()) {
            Next::Now(id) => {
                if let Some(peer) = find(id) {
                    if queue.begin(id, Instant::now())
                        && let Some(pod) = peer.pod.get()
                    {
                        // Once for each peer; results of its attempts are logged when they change.
                        let address = peer.connection.address;
                        let level = peer.connection.log_level(log::Level::Info);
                        log::log!(level, "pod {pod}: getting the keys from the KBS through {address}");
                    }
                    return peer.clone();
                }
                None
            }
            Next::Later(at) => Some(at),
            Next::None => None,
        };
        let pause = async {
            match later {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = pause => {}
            // The sender lives in the agent.
            changed = changes.changed() => drop(changed),
        }
    }
}

/// The peer of an attempt, and the pod that it has named.
#[derive(Clone, Copy)]
struct AttemptPeer<'a> {
    peer: &'a Peer<Attestation>,
    pod: &'a PodId,
    source: Source,
}

/// Makes one attempt. Always waits for the end of the fetch, because two must not run in parallel. When the peer fails,
/// its streams are refused, so that the rest of the fetch fails fast.
async fn try_peer(
    agent: &Agent,
    guest: &GuestApi,
    of: AttemptPeer<'_>,
    queue: &mut AttemptQueue,
    deadlines: &KbsDeadlines,
) -> Result<PodKeys, AttemptError> {
    let AttemptPeer { peer, pod, .. } = of;
    let routes = &agent.tunnels.routes;
    agent.attempt.set_peer(Some(peer.connection.id));
    routes.set_attestation(peer, deadlines);
    let fetch = guest.keys(pod);
    tokio::pin!(fetch);
    let fetched = tokio::select! {
        result = &mut fetch => Ok(result),
        reason = watch_for_failure(agent, of, queue, deadlines) => Err(reason),
    };
    let result = match fetched {
        Ok(result) => result,
        Err(reason) => {
            let level = peer.connection.log_level(log::Level::Info);
            log::log!(level, "connection from {}: {reason}", peer.connection.address);
            routes.refuse_attestation();
            agent.attempt.set_peer(None);
            peer.close_gracefully(reason);
            // The keys may have arrived before the peer left.
            fetch.await.map_err(|_| AttemptError::Peer(reason))
        }
    };
    agent.attempt.set_peer(None);
    routes.clear();
    result
}

/// Waits until the peer has failed the attempt; returns the reason. Keeps the routes up to date with its offers.
async fn watch_for_failure(
    agent: &Agent,
    AttemptPeer { peer, source, .. }: AttemptPeer<'_>,
    queue: &mut AttemptQueue,
    deadlines: &KbsDeadlines,
) -> &'static str {
    let mut changes = agent.peers.attestation.changes();
    let overtime = sleep(KBS_FIRST_BYTE);
    // Only while others wait; then a silence is not waited for to the end.
    let silence = deadlines.silent_for(after_failures(agent, source, KBS_FIRST_BYTE_CONTESTED));
    tokio::pin!(overtime, silence);
    let (mut late, mut silent) = (false, false);
    loop {
        tokio::select! {
            () = peer.credits.gone() => return "the attestation peer left in the middle of its attempt",
            () = deadlines.silent.notified() => return SILENT,
            () = &mut overtime, if !late => late = true,
            () = &mut silence, if !silent => silent = true,
            _ = changes.changed() => agent.tunnels.routes.set_attestation(peer, deadlines),
        }
        if !late && !silent {
            continue;
        }
        let peers = agent.peers.attestation.all();
        queue.update(&peers.iter().map(|peer| id_and_source(peer)).collect::<Vec<_>>(), Instant::now());
        let eligible = |id| peers.iter().any(|other| other.connection.id == id && is_eligible(other));
        if late && peers.iter().any(|other| is_eligible(other) && queue.is_newcomer(other.connection.id)) {
            return "the attestation peer took long, and another has come";
        }
        // It may have answered since, and then it is not silent.
        let has_answered = *deadlines.first.borrow() == FirstByte::Arrived;
        if silent && !has_answered && queue.is_contested(source, Instant::now(), eligible) {
            return SILENT;
        }
    }
}

#[cfg(test)]
#[path = "attestation_tests.rs"]
mod tests;
