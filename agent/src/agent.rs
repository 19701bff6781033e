//! The state that all connections and phases share. No logic beyond keeping its parts consistent.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use secure_comms_protocol::control::{Empty, KeyProgress};
use secure_comms_protocol::limits::{
    ATTESTATION_PEERS_KEPT, ATTESTATION_PEERS_MAX, FAREWELLS_MAX, GUESTS_MAX, STATUS_REPORTS_MAX,
    UNAUTHENTICATED_KEPT, UNAUTHENTICATED_MAX, WAITING_KEPT, WAITING_MAX,
};
use secure_comms_protocol::{AgentConfig, Attestation, Control, Kubernetes, PodId};
use secure_comms_tunnel::Outbounds;
use tokio::sync::{Semaphore, watch};

use crate::access::limiter::{ConnectionLimiter, Preference};
use crate::access::policy::AccessPolicy;
use crate::access::sources::Sources;
use crate::config::{Announced, Config};
use crate::kata::{self, KataAgent};
use crate::peers::peer::Peers;
use crate::peers::routes::Routes;
use crate::peers::sessions::{AdaptorSession, Sessions};

/// The shared state.
#[derive(Debug)]
pub(crate) struct Agent {
    /// Who may come in.
    pub(crate) policy: AccessPolicy,
    /// How many may come in.
    pub(crate) limits: Limits,
    /// Who is in.
    pub(crate) peers: PhasePeers,
    /// The session with the adaptor.
    pub(crate) sessions: Sessions,
    /// What peers and local clients can reach.
    pub(crate) tunnels: Tunnels,
    /// How getting the keys goes.
    pub(crate) attempt: Attempt,
    /// Random hex that names this process to its peers.
    pub(crate) instance: String,
    /// What hello announces of the configuration.
    pub(crate) announced: Announced,
    /// The only pod that an adaptor may name, if flags or init-data say so.
    pub(crate) expected_pod: Option<PodId>,
    /// When this process started.
    pub(crate) started: Instant,
    /// The failing step of the pod network, empty if it is up; and whether there is one.
    pub(crate) pod_network: watch::Sender<String>,
    has_pod_network: bool,
    /// The pod whose keys the KBS released; none before, and where the keys came from the user data or the latch.
    pod: Mutex<Option<PodId>>,
}

/// Limits on connections.
#[derive(Debug)]
pub(crate) struct Limits {
    /// Connections whose client has sent nothing yet, or that wait for admission: they cost next to nothing.
    pub(crate) waiting: Arc<ConnectionLimiter>,
    /// Connections that have not authenticated.
    pub(crate) unauthenticated: Arc<ConnectionLimiter>,
    /// Peers of the Attestation phase.
    pub(crate) attesting: Arc<ConnectionLimiter>,
    /// Peers of the Kubernetes phase that have not said a hello with a pod id.
    pub(crate) guests: Arc<ConnectionLimiter>,
    /// What is known of the sources of connections.
    pub(crate) sources: Arc<Sources>,
    /// Statuses that are put together at a time.
    pub(crate) reports: Semaphore,
    /// Connections that receive why they end. Others are cut at once.
    pub(crate) farewells: Semaphore,
}

impl Limits {
    fn new() -> Self {
        let sources = Arc::<Sources>::default();
        let proven = |kept| Preference::Proven(kept, sources.clone());
        let unfailed = Preference::Unfailed(ATTESTATION_PEERS_KEPT, sources.clone());
        Self {
            waiting: ConnectionLimiter::new(WAITING_MAX, proven(WAITING_KEPT)),
            unauthenticated: ConnectionLimiter::new(UNAUTHENTICATED_MAX, proven(UNAUTHENTICATED_KEPT)),
            attesting: ConnectionLimiter::new(ATTESTATION_PEERS_MAX, unfailed),
            guests: ConnectionLimiter::new(GUESTS_MAX, Preference::None),
            reports: Semaphore::new(STATUS_REPORTS_MAX),
            farewells: Semaphore::new(FAREWELLS_MAX),
            sources,
        }
    }
}

/// The authenticated peers by phase.
#[derive(Debug, Default)]
pub(crate) struct PhasePeers {
    /// Peers of the Attestation phase.
    pub(crate) attestation: Peers<Attestation>,
    /// Peers of the Kubernetes phase: the adaptor, guests, and peers that are about to close.
    pub(crate) kubernetes: Peers<Kubernetes>,
}

/// The tunnels of both phases.
#[derive(Debug)]
pub(crate) struct Tunnels {
    /// Where the clients of inbounds are sent.
    pub(crate) routes: Routes,
    /// The outbounds of the Attestation phase.
    pub(crate) attestation: Arc<Outbounds<Attestation>>,
    /// The outbounds of the Kubernetes phase.
    pub(crate) kubernetes: Arc<Outbounds<Kubernetes, KataAgent>>,
}

/// The attempt to get the keys: through whom, and with what result.
#[derive(Debug)]
pub(crate) struct Attempt {
    peer: Mutex<Option<u64>>,
    last_error: Mutex<Option<String>>,
    /// The result of the last attempt; none before the first has ended.
    pub(crate) progress: watch::Sender<Option<KeyProgress>>,
}

impl Attempt {
    /// Sets the connection id of the peer that serves the current attempt.
    pub(crate) fn set_peer(&self, peer: Option<u64>) {
        *self.peer.lock().unwrap_or_else(PoisonError::into_inner) = peer;
    }

    /// Publishes that an attempt has failed.
    pub(crate) fn failed(&self, attempt: u64, error: String) {
        *self.last_error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.clone());
        self.progress.send_replace(Some(KeyProgress { attempt, error: Some(error) }));
    }

    /// The error of the last attempt that failed, even if a later one succeeded.
    pub(crate) fn last_error(&self) -> Option<String> {
        self.last_error.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The connection id of the peer that serves the current attempt. New connections do not evict it.
    pub(crate) fn peer(&self) -> Option<u64> {
        *self.peer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Agent {
    /// An agent without peers.
    pub(crate) fn new(config: &Config, policy: AccessPolicy, instance: String) -> Self {
        Self {
            policy,
            limits: Limits::new(),
            peers: PhasePeers::default(),
            sessions: Sessions::default(),
            tunnels: Tunnels {
                routes: Routes::new(&config.inbounds),
                attestation: Arc::new(Outbounds::new(&config.outbounds)),
                kubernetes: Arc::new(kata::outbounds(
                    &config.outbounds,
                    config.pod_namespace.as_deref(),
                    &config.mount_prefixes,
                    &config.volumes_socket,
                )),
            },
            attempt: Attempt {
                peer: Mutex::default(),
                last_error: Mutex::default(),
                progress: watch::Sender::new(None),
            },
            instance,
            announced: config.announced.clone(),
            expected_pod: config.pod_id.clone(),
            started: Instant::now(),
            pod_network: watch::Sender::default(),
            has_pod_network: config.pod_network.is_some(),
            pod: Mutex::default(),
        }
    }

    /// The state of the pod network: `up`, or the failing step; none without a pod network.
    pub(crate) fn pod_network_state(&self) -> Option<String> {
        let state = self.pod_network.borrow().clone();
        self.has_pod_network.then(|| if state.is_empty() { "up".to_owned() } else { state })
    }

    /// Sets the pod whose keys are in use.
    pub(crate) fn set_pod(&self, pod: PodId) {
        *self.pod.lock().unwrap_or_else(PoisonError::into_inner) = Some(pod);
    }

    /// The pod whose keys are in use, if the agent knows it.
    pub(crate) fn pod(&self) -> Option<PodId> {
        self.pod.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The configuration in use, for `hello` and the status; none before the keys are here.
    pub(crate) fn config(&self) -> Option<AgentConfig> {
        let worker_nodes = self.policy.worker_nodes()?;
        Some(self.announced.with_keys(self.pod().as_ref(), worker_nodes))
    }

    /// The pod that this VM is for, as far as it is known.
    pub(crate) fn own_pod(&self) -> Option<PodId> {
        self.pod().or_else(|| self.expected_pod.clone())
    }

    /// Whether there is a session, or a peer, that local clients can be sent to.
    pub(crate) fn has_worker_node(&self) -> bool {
        self.sessions.current().is_some() || self.peers.kubernetes.serving().is_some()
    }

    /// Ends a session and logs it. No effect on one that has ended.
    pub(crate) fn end_session(&self, session: &Arc<AdaptorSession>, reason: &str) {
        let Some(streams) = session.end(reason) else { return };
        self.sessions.forget(session);
        self.peers.kubernetes.notify_changed();
        match streams {
            0 => log::info!("session: ended: {reason}; no stream was open"),
            _ => log::warn!("session: ended: {reason}; streams that were reset: {streams}"),
        }
    }

    /// Sends every attestation peer the result of the attempt and the invitation to come back as `kubernetes`.
    pub(crate) fn announce_upgrade(&self) {
        let progress = self.attempt.progress.borrow().clone();
        for peer in self.peers.attestation.all() {
            // In this order; the phase's own report may come too late.
            if let Some(progress) = &progress {
                peer.outbox.send(Control::Keys(progress.clone()));
            }
            peer.outbox.send(Control::Upgrade(Empty {}));
        }
    }
}

impl PhasePeers {
    /// Removes the peer of a connection that has ended.
    pub(crate) fn remove(&self, id: u64) {
        self.attestation.remove(id);
        self.kubernetes.remove(id);
    }
}
