//! The agent's life: bind -> attest -> keys -> serve -> drain.

use std::future::Future;
use std::io;
use std::sync::Arc;

use secure_comms_keys::{AttestationKey, KeyError};
use secure_comms_protocol::PhaseName;
use secure_comms_protocol::limits::{RETRY_MIN, SHUTDOWN_DRAIN};
use secure_comms_ssh::profile::KeyExchange;
use secure_comms_tunnel::netns::Namespace;
use secure_comms_tunnel::{Inbound, inbound};
use tokio::net::TcpListener;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{interval, sleep, timeout};

use crate::access::latch::{Latch, LatchError};
use crate::access::policy::{AccessPolicy, Attesters, PersistKeys};
use crate::agent::Agent;
use crate::config::flags::StatePlace;
use crate::config::{Config, KeySource};
use crate::os::capabilities::{self, Capability, CapabilityError};
use crate::os::log_limits::{Repeated, report_left_out};
use crate::os::systemd::{Notifier, watchdog_interval};
use crate::phases::attestation::{self, GuestApi, KeyResource};
use crate::phases::kubernetes;
use crate::pod_network::PodNetwork;
use crate::server::Server;

/// Why the agent could not start.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The latched keys exist and can't be used.
    #[error(transparent)]
    Latch(#[from] LatchError),
    /// No host key could be generated.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// An inbound could not be bound.
    #[error(
        "{0}; end what is in its way, or correct its tag (-secure-comms-inbounds, or sc-inbounds of init-data or apf.json)"
    )]
    Bind(#[from] inbound::BindError),
    /// Capabilities that nothing needs any more could not be given up.
    #[error(transparent)]
    Capabilities(#[from] CapabilityError),
    /// The operating system gave no random bytes.
    #[error("naming this agent process: {0}; check that the VM has a source of randomness")]
    Random(String),
    /// The signal handlers could not be set up.
    #[error("setting up: {0}")]
    Io(#[from] io::Error),
}

/// Checks the directory of the latched keys, if keys will be latched: before anything listens, so that a fault of the
/// directory is the first that the log says. Warns if it is not on a tmpfs.
///
/// # Errors
/// The directory or the keys in it can't be used.
pub fn check_state_dir(config: &Config) -> Result<(), RunError> {
    if matches!(config.source, KeySource::Kbs { .. }) {
        Latch::new(&config.state_dir).check(config.state_place == StatePlace::AnyDisk)?;
    }
    Ok(())
}

/// Runs the agent on a bound listener until `shutdown`, then drains its streams for at most [`SHUTDOWN_DRAIN`].
///
/// # Errors
/// The agent could not start, or could not give up its capabilities: it stops then, rather than serve with them.
pub async fn run(
    config: Config,
    listener: TcpListener,
    notifier: Notifier,
    shutdown: impl Future<Output = ()>,
) -> Result<(), RunError> {
    capabilities::check()?;
    let (policy, start) = access_policy(&config)?;
    let agent = Arc::new(Agent::new(&config, policy, instance()?));
    let mut tasks = JoinSet::new();
    tokio::pin!(shutdown);
    let inbounds = tokio::select! {
        inbounds = bind_inbounds(&config) => inbounds?,
        // Binding may wait for a network namespace that is never made; a shutdown must not wait for it too.
        () = &mut shutdown => {
            notifier.stopping("stopping before the start was complete");
            return Ok(());
        }
    };
    for inbound in inbounds {
        if let Some(route) = agent.tunnels.routes.subscribe(inbound.tag()) {
            tasks.spawn(inbound.serve(route));
        }
    }
    let guest = GuestApi {
        namespace: config.pod_namespace.as_deref().map(Namespace::new),
        address: config.guest_api,
        resource: if config.separate_resources {
            KeyResource::Separate
        } else {
            KeyResource::Joint(config.init_data.clone())
        },
    };
    let notifier = Arc::new(notifier);
    let network_status = agent.pod_network.subscribe();
    let (stop, stopped) = oneshot::channel::<()>();
    let network = config.pod_network.clone().map(|network| {
        // Not in `tasks`, which are aborted when this function returns: the network must be undone first. Dropping `stop`
        // starts that.
        tokio::spawn(network.supervise(agent.pod_network.clone(), async { drop(stopped.await) }))
    });
    notifier.ready(&status(&agent, &network_status));
    let server = Arc::new(Server::new(
        agent.clone(),
        config.rekey_bytes,
        KeyExchange::post_quantum(config.require_pq),
    ));
    let accept = tasks.spawn(accept(server, listener));
    tasks.spawn(report_left_out());
    tasks.spawn(run_phases(agent.clone(), guest, start));
    tasks.spawn(report_to_systemd(agent.clone(), network_status, notifier.clone()));
    let fault = tokio::select! {
        () = &mut shutdown => None,
        fault = give_up_capabilities(&agent, config.pod_network.as_ref()) => Some(fault),
    };
    notifier.stopping("stopping: open streams may finish");
    accept.abort();
    drain(&agent).await;
    drop(stop);
    if let Some(network) = network
        && let Err(error) = network.await
    {
        log::error!("undoing the pod network: {error}");
    }
    fault.map_or(Ok(()), |fault| Err(fault.into()))
}

/// Gives up the capabilities of this process as soon as the keys are final and nothing has to enter another network namespace
/// any more. What remains: `CAP_NET_ADMIN`, if there is a pod network, whose repair and undo need it. Returns only a failure.
async fn give_up_capabilities(agent: &Agent, network: Option<&PodNetwork>) -> CapabilityError {
    agent.policy.until_latched().await;
    if let Some(network) = network {
        network.until_open().await;
    }
    let keep: &[Capability] = if network.is_some() { &[Capability::CAP_NET_ADMIN] } else { &[] };
    match capabilities::keep_only(keep).await {
        Ok(left) if left.is_empty() => log::info!("capabilities: none from now on"),
        Ok(left) => {
            let left: Vec<_> = left.iter().map(ToString::to_string).collect();
            log::info!("capabilities: only {} from now on, for the pod network", left.join(", "));
        }
        Err(error) => return error,
    }
    std::future::pending().await
}

/// The phase that the agent starts in.
enum Start {
    /// Attestation: there are no keys.
    Attestation(Attesters),
    /// Kubernetes: the keys are final until the VM reboots.
    Latched,
}

fn access_policy(config: &Config) -> Result<(AccessPolicy, Start), RunError> {
    let latch = Latch::new(&config.state_dir);
    let persist: PersistKeys = {
        let latch = latch.clone();
        Box::new(move |keys| latch.store(keys))
    };
    let attesters = match &config.source {
        KeySource::UserData(keys) => {
            log::info!(
                "Kubernetes phase: host key {} from the user data, no attestation",
                keys.fingerprint()
            );
            return Ok((AccessPolicy::kubernetes(keys.clone(), persist), Start::Latched));
        }
        KeySource::Kbs { worker_node: Some(keys) } => Attesters::Holding(keys.clone()),
        KeySource::Kbs { worker_node: None } => Attesters::Anyone,
    };
    if let Some(keys) = latch.load()? {
        log::info!("Kubernetes phase, latched earlier in this boot: host key {}", keys.fingerprint());
        return Ok((AccessPolicy::kubernetes(keys, persist), Start::Latched));
    }
    let policy = AccessPolicy::attestation(AttestationKey::generate()?.ssh(), attesters.clone(), persist);
    log::info!("Attestation phase: waiting for a worker node");
    Ok((policy, Start::Attestation(attesters)))
}

/// Random hex that names this process to its peers.
fn instance() -> Result<String, RunError> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).map_err(|error| RunError::Random(error.to_string()))?;
    Ok(format!("{:016x}", u64::from_be_bytes(bytes)))
}

async fn bind_inbounds(config: &Config) -> Result<Vec<Inbound>, RunError> {
    let mut inbounds = Vec::with_capacity(config.inbounds.len());
    for tag in &config.inbounds {
        let inbound = Inbound::bind(tag).await?;
        log::info!("inbound {} listens on {}", tag.name, inbound.local());
        inbounds.push(inbound);
    }
    Ok(inbounds)
}

/// Runs the phases, one after the other. Never returns.
async fn run_phases(agent: Arc<Agent>, guest: GuestApi, start: Start) {
    let latch = async {
        if let Start::Attestation(attesters) = start {
            let keys = attestation::get_keys(&agent, &guest).await;
            kubernetes::until_latched(&agent, &guest, &attesters, keys).await;
        }
    };
    tokio::join!(latch, kubernetes::route_to_worker_node(&agent));
}

async fn accept(server: Arc<Server>, listener: TcpListener) {
    let mut failure = Repeated::new("accepting a connection");
    for id in 0.. {
        match listener.accept().await {
            Ok((socket, address)) => {
                failure.succeeded();
                let server = server.clone();
                tokio::spawn(async move { server.serve_connection(socket, id, address).await });
            }
            Err(error) => {
                // Mostly because there are no file descriptors left; connections that end free some.
                failure.failed(&error);
                sleep(RETRY_MIN).await;
            }
        }
    }
}

/// The phase, and what the pod network lacks.
fn status(agent: &Agent, network_status: &watch::Receiver<String>) -> String {
    let phase = phase_status(agent);
    match &*network_status.borrow() {
        up if up.is_empty() => phase.to_owned(),
        network => format!("{phase}; {network}"),
    }
}

fn phase_status(agent: &Agent) -> &'static str {
    let peers = &agent.peers;
    match agent.policy.phase() {
        PhaseName::Attestation if peers.attestation.newest().is_some() => {
            "Attestation phase: getting the keys"
        }
        PhaseName::Attestation => "Attestation phase: waiting for a worker node",
        PhaseName::Kubernetes if agent.has_worker_node() => "Kubernetes phase: serving the worker node",
        PhaseName::Kubernetes => "Kubernetes phase: waiting for the worker node",
    }
}

/// Keeps systemd's STATUS up to date, and sends its watchdog's pings.
async fn report_to_systemd(
    agent: Arc<Agent>,
    mut network_status: watch::Receiver<String>,
    notifier: Arc<Notifier>,
) {
    let mut attestation = agent.peers.attestation.changes();
    let mut kubernetes = agent.peers.kubernetes.changes();
    let mut reported = status(&agent, &network_status);
    let watchdog = async {
        let Some(period) = watchdog_interval() else { return std::future::pending().await };
        let mut ticks = interval(period);
        loop {
            ticks.tick().await;
            notifier.watchdog();
        }
    };
    let follow = async {
        loop {
            tokio::select! {
                changed = attestation.changed() => if changed.is_err() { return },
                changed = kubernetes.changed() => if changed.is_err() { return },
                changed = network_status.changed() => if changed.is_err() { return },
            }
            let now = status(&agent, &network_status);
            if now != reported {
                notifier.status(&now);
                reported = now;
            }
        }
    };
    tokio::join!(watchdog, follow, notifier.send_late());
}

/// Closes the connections after their streams have ended, at most [`SHUTDOWN_DRAIN`] later.
async fn drain(agent: &Agent) {
    let reason = "the agent stops";
    agent.limits.unauthenticated.end_all(reason);
    agent.peers.attestation.close_all(reason);
    agent.tunnels.routes.clear();
    let peers = agent.peers.kubernetes.all();
    let session = agent.sessions.current();
    let idle = async {
        for peer in &peers {
            peer.credits.idle().await;
        }
        if let Some(session) = &session {
            session.streams.credits().idle().await;
        }
    };
    // Streams that are still open then are counted below.
    drop(timeout(SHUTDOWN_DRAIN, idle).await);
    // Its connections receive the reason here.
    let of_session = session.and_then(|session| session.end(reason)).unwrap_or_default();
    match peers.iter().map(|peer| peer.credits.open_streams()).sum::<usize>() + of_session {
        0 => log::info!("stopped"),
        open => log::warn!("stopped with {open} streams open"),
    }
    for peer in &peers {
        peer.close_gracefully(reason);
    }
    // close_gracefully cuts peers that stay; the timeout is for an SSH session that hangs in spite of that.
    let closed =
        async { tokio::join!(agent.peers.kubernetes.until_empty(), agent.peers.attestation.until_empty()) };
    drop(timeout(SHUTDOWN_DRAIN, closed).await);
}
