//! The agent's life: bind -> attest -> keys -> serve -> drain.

use std::future::Future;
use std::io;
use std::sync::Arc;

use secure_comms_keys::{AttestationKey, KeyError};
use secure_comms_protocol::PhaseName;
use secure_comms_protocol::limits::{RETRY_MIN, SHUTDOWN_DRAIN};
use secure_comms_tunnel::netns::Namespace;
use secure_comms_tunnel::{Inbound, inbound};
use tokio::net::TcpListener;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{interval, sleep, timeout};

use crate::attestation::{self, Guest};
use crate::config::{Config, KeySource};
use crate::gate::{Attesters, Gate, Keep};
use crate::kubernetes;
use crate::latch::{Latch, LatchError};
use crate::log::Repeated;
use crate::notify::{Notifier, watchdog_interval};
use crate::session::Agent;
use crate::ssh::{self, Identity};

/// Why the agent could not start.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The keys of this boot are there and can't be used.
    #[error(transparent)]
    Latch(#[from] LatchError),
    /// No host key could be made.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// An inbound can't listen.
    #[error(
        "{0}; end what is in its way, or correct its tag (-secure-comms-inbounds, or sc-inbounds in apf.json)"
    )]
    Bind(#[from] inbound::BindError),
    /// The operating system gave no random bytes.
    #[error("naming this agent process: {0}; check that the VM has a source of randomness")]
    Random(String),
    /// The signal handlers could not be set up.
    #[error("setting up: {0}")]
    Io(#[from] io::Error),
}

/// Runs the agent on a bound listener until `shutdown`, then lets its streams finish, at most [`SHUTDOWN_DRAIN`].
///
/// # Errors
/// It could not start.
pub async fn run(
    config: Config,
    listener: TcpListener,
    notifier: Notifier,
    shutdown: impl Future<Output = ()>,
) -> Result<(), RunError> {
    let (gate, start) = gate(&config)?;
    let agent = Arc::new(Agent::new(&config, gate, instance()?));
    let mut tasks = JoinSet::new();
    tokio::pin!(shutdown);
    let inbounds = tokio::select! {
        inbounds = bind_inbounds(&config) => inbounds?,
        // A network namespace that does not come is waited for; whoever stops us is not made to wait as well.
        () = &mut shutdown => {
            notifier.stopping("stopping before the start was complete");
            return Ok(());
        }
    };
    for inbound in inbounds {
        if let Some(route) = agent.routes.of(inbound.tag()) {
            tasks.spawn(inbound.serve(route));
        }
    }
    let guest =
        Guest { namespace: config.pod_namespace.as_deref().map(Namespace::new), address: config.guest_api };
    let notifier = Arc::new(notifier);
    let (trouble, told) = watch::channel(String::new());
    let (stop, stopped) = oneshot::channel::<()>();
    let network = config.pod_network.clone().map(|network| {
        // Not one of the tasks, which end when we do: it has things to undo. Dropping `stop` tells it.
        tokio::spawn(network.keep(trouble.clone(), async { drop(stopped.await) }))
    });
    notifier.ready(&status(&agent, &told));
    let accept = tasks.spawn(accept(agent.clone(), listener));
    tasks.spawn(phases(agent.clone(), guest, start));
    tasks.spawn(tell_systemd(agent.clone(), told, notifier.clone()));
    shutdown.await;
    notifier.stopping("stopping: open streams may finish");
    accept.abort();
    drain(&agent).await;
    drop(stop);
    if let Some(network) = network
        && let Err(error) = network.await
    {
        log::error!("undoing the pod network: {error}");
    }
    Ok(())
}

/// Where the agent starts.
enum Start {
    /// Without keys.
    Attestation(Attesters),
    /// With keys that serve for the rest of this boot.
    Latched,
}

fn gate(config: &Config) -> Result<(Gate, Start), RunError> {
    let latch = Latch::new(&config.state_dir);
    let keep: Keep = {
        let latch = latch.clone();
        Box::new(move |keys| latch.store(keys))
    };
    let attesters = match &config.source {
        KeySource::UserData(keys) => {
            log::info!(
                "Kubernetes phase: host key {} from the user data, no attestation",
                keys.fingerprint()
            );
            return Ok((Gate::kubernetes(keys.clone(), keep, config.rekey_bytes), Start::Latched));
        }
        KeySource::Kbs { worker_node: Some(keys) } => Attesters::Holding(keys.clone()),
        KeySource::Kbs { worker_node: None } => Attesters::Anyone,
    };
    if let Some(keys) = latch.load()? {
        log::info!("Kubernetes phase, latched earlier in this boot: host key {}", keys.fingerprint());
        return Ok((Gate::kubernetes(keys, keep, config.rekey_bytes), Start::Latched));
    }
    let identity =
        Identity::new(PhaseName::Attestation, AttestationKey::generate()?.ssh(), config.rekey_bytes);
    log::info!("Attestation phase: waiting for a worker node");
    Ok((
        Gate::attestation(identity, attesters.clone(), keep, config.rekey_bytes),
        Start::Attestation(attesters),
    ))
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

/// The phases, one after the other; never ends.
async fn phases(agent: Arc<Agent>, guest: Guest, start: Start) {
    let latch = async {
        if let Start::Attestation(attesters) = start {
            let keys = attestation::run(&agent, &guest).await;
            kubernetes::latch(&agent, &guest, &attesters, keys).await;
        }
    };
    tokio::join!(latch, kubernetes::serve(&agent));
}

async fn accept(agent: Arc<Agent>, listener: TcpListener) {
    let mut failure = Repeated::new("accepting a connection");
    for id in 0.. {
        match listener.accept().await {
            Ok((socket, address)) => {
                failure.succeeded();
                tokio::spawn(ssh::serve(agent.clone(), socket, id, address));
            }
            Err(error) => {
                // Out of file descriptors, as a rule: connections that end make room.
                failure.failed(&error);
                sleep(RETRY_MIN).await;
            }
        }
    }
}

/// The phase, and what the pod network lacks.
fn status(agent: &Agent, trouble: &watch::Receiver<String>) -> String {
    let phase = phase(agent);
    match &*trouble.borrow() {
        none if none.is_empty() => phase.to_owned(),
        trouble => format!("{phase}; {trouble}"),
    }
}

fn phase(agent: &Agent) -> &'static str {
    match agent.gate.phase() {
        PhaseName::Attestation if agent.attestation.newest().is_some() => {
            "Attestation phase: getting the keys"
        }
        PhaseName::Attestation => "Attestation phase: waiting for a worker node",
        PhaseName::Kubernetes if agent.kubernetes.newest().is_some() => {
            "Kubernetes phase: serving the worker node"
        }
        PhaseName::Kubernetes => "Kubernetes phase: waiting for the worker node",
    }
}

/// Keeps systemd's STATUS true and its watchdog quiet.
async fn tell_systemd(agent: Arc<Agent>, mut trouble: watch::Receiver<String>, notifier: Arc<Notifier>) {
    let (mut attestation, mut kubernetes) = (agent.attestation.changes(), agent.kubernetes.changes());
    let mut told = status(&agent, &trouble);
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
                changed = trouble.changed() => if changed.is_err() { return },
            }
            let now = status(&agent, &trouble);
            if now != told {
                notifier.status(&now);
                told = now;
            }
        }
    };
    tokio::join!(watchdog, follow);
}

/// Nobody new is let in; streams that are open may finish.
async fn drain(agent: &Agent) {
    agent.unauthenticated.cut_all();
    agent.dismiss_attestation("the agent stops");
    agent.routes.hold();
    let peers = agent.kubernetes.all();
    let idle = async {
        for peer in &peers {
            peer.credits.idle().await;
        }
    };
    // What does not finish in time is counted below.
    drop(timeout(SHUTDOWN_DRAIN, idle).await);
    match peers.iter().map(|peer| peer.credits.open_streams()).sum::<usize>() {
        0 => log::info!("stopped"),
        left => log::warn!("stopped with {left} streams open"),
    }
    for peer in &peers {
        peer.dismiss("the agent stops");
    }
    // Every peer that has not left soon is cut; a session that hangs must not keep the process.
    let left = async { tokio::join!(agent.kubernetes.none_left(), agent.attestation.none_left()) };
    drop(timeout(SHUTDOWN_DRAIN, left).await);
}
