//! `serve`: the service of a node. Serves all of its pods until SIGTERM or SIGINT.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use secure_comms_adaptor::kbs::{KbsClient, KbsError};
use secure_comms_adaptor::key_source::KeySource;
use secure_comms_adaptor::store::DirectoryStore;
use secure_comms_adaptor::{Adaptor, AdaptorError, Config};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::{open_store, print};
use crate::caa::rules;
use crate::health::Health;
use crate::metrics::Metrics;
use crate::pods::{Events, Pods};
use crate::settings::ServeSettings;
use crate::signals::{EndSignal, Signals};

/// Time limit for a pod's streams to end.
const SUSPEND: Duration = Duration::from_secs(10);

/// Error of `serve`.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The pods of earlier processes cannot be listed.
    #[error(transparent)]
    Adaptor(#[from] AdaptorError),
    /// The store cannot be opened.
    #[error("{0:#}")]
    Store(anyhow::Error),
    /// The KBS client cannot be set up.
    #[error(transparent)]
    Kbs(#[from] KbsError),
    /// The signal handlers cannot be installed.
    #[error("wait for signals")]
    Signals(#[source] io::Error),
    /// A part of the service ended.
    #[error("{0:#}")]
    Part(anyhow::Error),
}

/// Serves the node's pods until SIGTERM or SIGINT. Must run in a tokio runtime with I/O and time enabled.
///
/// # Errors
/// The store or the KBS client cannot be set up, or a part of the service failed.
///
/// # Cancellation
/// Dropping the future cuts the connections of all pods. Their keys stay in the store and in the KBS.
pub async fn run(settings: ServeSettings) -> Result<(), ServeError> {
    let mut signals = Signals::new().map_err(ServeError::Signals)?;
    for warning in &settings.warnings {
        tracing::warn!("{warning}");
    }
    let store = Arc::new(open_store(&settings.store).map_err(ServeError::Store)?);
    let events = Events::default();
    let adaptor = build_adaptor(store, &settings, &events)?;
    let pods = Pods::new(adaptor, events);
    let (health, metrics) = (Health::default(), Metrics::default());
    let resumed = pods.adaptor().resume_all().await?;
    tracing::info!("resumed {} pods", resumed.len());
    let (stop, stopped) = watch::channel(false);
    let mut parts = start_parts(&settings, &pods, &health, &metrics, &stopped);
    let ended = tokio::select! {
        signal = end_signal(&mut signals) => {
            tracing::info!("{signal}: ending; a second signal ends at once");
            Ok(())
        }
        Some(ended) = parts.join_next() => ended.unwrap_or_else(|error| Err(error.into())),
    };
    stop.send_replace(true);
    tokio::select! {
        () = drain(&pods, &mut parts) => {}
        signal = end_signal(&mut signals) => tracing::warn!("{signal} during the end: open streams are cut"),
    }
    ended.map_err(ServeError::Part)
}

/// Takes the nftables rules away that an earlier process has left.
///
/// # Errors
/// nftables cannot be changed.
pub async fn remove_rules() -> anyhow::Result<()> {
    let text = if rules::remove().await? {
        "the nftables table inet secure-comms-adaptor is removed: cloud-api-adaptor's dials go to the VMs, which do not \
         answer them; connections that live go on only if another nat chain is on the node\n"
    } else {
        "there is no nftables table inet secure-comms-adaptor\n"
    };
    print(text.as_bytes())
}

/// The parts, each of which runs until it is stopped.
fn start_parts(
    _settings: &ServeSettings,
    _pods: &Pods,
    _health: &Health,
    _metrics: &Metrics,
    stopped: &watch::Receiver<bool>,
) -> JoinSet<anyhow::Result<()>> {
    let mut parts = JoinSet::new();
    let mut stop = stopped.clone();
    // Keeps the set from being empty.
    parts.spawn(async move { stop.wait_for(|stop| *stop).await.map(|_| ()).map_err(anyhow::Error::from) });
    parts
}

/// The next signal that ends the service. SIGHUP does not.
async fn end_signal(signals: &mut Signals) -> EndSignal {
    loop {
        match signals.next().await {
            EndSignal::Hup => tracing::info!("SIGHUP: nothing is read again: restart to change settings"),
            signal => return signal,
        }
    }
}

/// Waits for the parts, and suspends all pods.
async fn drain(pods: &Pods, parts: &mut JoinSet<anyhow::Result<()>>) {
    while parts.join_next().await.is_some() {}
    let mut suspensions = JoinSet::new();
    for pod in pods.list() {
        let pods = pods.clone();
        suspensions.spawn(async move {
            if timeout(SUSPEND, pods.adaptor().suspend(&pod.id)).await.is_err() {
                tracing::warn!("pod {}: its streams have not ended in time: they are cut", pod.id);
            }
        });
    }
    while suspensions.join_next().await.is_some() {}
}

fn build_adaptor(
    store: Arc<DirectoryStore>,
    settings: &ServeSettings,
    events: &Events,
) -> Result<Adaptor, ServeError> {
    let key_source = match &settings.key_source {
        KeySource::Kbs(kbs) => KeySource::Kbs(KbsClient::new(kbs, settings.deadline)?),
        KeySource::UserData => KeySource::UserData,
    };
    let config = Config {
        inbounds: settings.inbounds.clone(),
        outbounds: settings.outbounds.clone(),
        agent: settings.agent.clone(),
        worker_nodes: settings.worker_nodes.clone(),
        old_agents: settings.old_agents,
        kbs_filter: settings.kbs_filter,
        rekey_bytes: settings.rekey_bytes,
        require_pq: settings.require_pq,
        observer: events.observer(),
    };
    Ok(Adaptor::new(store, key_source, config))
}
