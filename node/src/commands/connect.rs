//! `connect`: serves one pod in the foreground, until a signal.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use secure_comms_adaptor::kbs::{KbsClient, KbsError};
use secure_comms_adaptor::key_source::KeySource;
use secure_comms_adaptor::pod::{PodEvent, PodState};
use secure_comms_adaptor::store::{DirectoryStore, Store as _, StoreError};
use secure_comms_adaptor::with_causes;
use secure_comms_adaptor::{Adaptor, AdaptorError, Config, Deadline, Endpoint, PodSpec};
use secure_comms_protocol::resource::pod_keys;
use secure_comms_protocol::{InitDataDigest, PodId};
use tokio::time::timeout;

use super::events::Events;
use super::open_store;
use crate::settings::{ConnectSettings, ExpectedInitData};
use crate::signals::{EndSignal, Signals};

/// Time limit for deleting the pod after a signal: a service manager kills the process soon after.
const DELETE_TIMEOUT: Duration = Duration::from_secs(20);
/// Time limit for writing the last events: their reader may have stopped reading.
const FLUSH: Duration = Duration::from_secs(1);

/// Error of `connect`.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The pod was not prepared, not started or not stopped.
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
    /// The thread that writes the events cannot be started.
    #[error("write events")]
    Events(#[source] io::Error),
    /// The pod was not deleted in time.
    #[error(
        "stop pod {pod}: not done within {seconds} s: delete {resource} from the KBS by hand, or run connect --delete-on-exit again and end it"
    )]
    Delete {
        /// Id of the pod.
        pod: PodId,
        /// The resource that may still be in the KBS.
        resource: String,
        /// The time limit, in seconds.
        seconds: u64,
    },
}

/// Brings the pod up, and keeps its channel up until SIGTERM, SIGINT or SIGHUP. A second signal ends it at once.
///
/// Writes events to standard output if the settings ask for them. Must run in a tokio runtime with I/O and time enabled.
/// Returns the signal that kept it from its work: from bringing the pod up, or from an orderly end.
///
/// # Errors
/// The store or the KBS client cannot be set up, the pod did not come up before the deadline, or it could not be
/// deleted at the end.
///
/// # Cancellation
/// Dropping the future cuts the pod's connection. Its keys stay in the store and in the KBS.
pub async fn run(settings: ConnectSettings) -> Result<Option<EndSignal>, ConnectError> {
    // The publication and the start share it.
    let deadline = Deadline::after(settings.deadline);
    let mut signals = Signals::new().map_err(ConnectError::Signals)?;
    let events = Events::new(settings.events).map_err(ConnectError::Events)?;
    for warning in &settings.warnings {
        tracing::warn!("{warning}");
    }
    let ended = serve(&settings, deadline, &mut signals, &events).await;
    events.flush(FLUSH);
    ended
}

async fn serve(
    settings: &ConnectSettings,
    deadline: Deadline,
    signals: &mut Signals,
    events: &Events,
) -> Result<Option<EndSignal>, ConnectError> {
    let store = Arc::new(open_store(&settings.store).map_err(ConnectError::Store)?);
    // Before this start makes one.
    let known = store.known_pod_key(&settings.pod).await.map_err(AdaptorError::from)?.is_some();
    let adaptor = build_adaptor(store, settings, events)?;
    let restored = tokio::select! {
        restored = restore(&adaptor, settings, deadline) => restored,
        signal = signals.next() => return interrupted(&adaptor, settings, signals, signal).await,
    };
    let started = tokio::select! {
        started = bring_up(&adaptor, settings, events, restored, deadline) => started,
        signal = signals.next() => return interrupted(&adaptor, settings, signals, signal).await,
    };
    if let Err(error) = started {
        let error = ConnectError::from(error);
        end_failed_start(&adaptor, settings, signals, known, &error).await;
        return Err(error);
    }
    let signal = signals.next().await;
    end_after(signal, &adaptor, settings, signals).await
}

/// Ends after a failed start. What failed it is not proven: an SSH server that answered may be the pod's VM, or stand
/// before it. So `--delete-on-exit` deletes only the keys that this start made, and that no VM can have.
async fn end_failed_start(
    adaptor: &Adaptor,
    settings: &ConnectSettings,
    signals: &mut Signals,
    known: bool,
    error: &ConnectError,
) {
    let pod = &settings.pod;
    let reason = match (known, adaptor.was_answered(pod)) {
        // That adaptor's keys are not this one's to speak of.
        _ if matches!(error, ConnectError::Adaptor(AdaptorError::Store(StoreError::Locked { .. }))) => return,
        (_, true) => "an SSH server has answered at its address, so that its VM may have its keys",
        (true, false) => "they are from before this start",
        (false, false) => {
            // The cause of the failed start is what the operator needs: a failing cleanup is only logged.
            if let Err(cleanup) = end(adaptor, settings, signals).await {
                let [cause, cleanup] = [error, &cleanup].map(|error| with_causes(error));
                // The same again if another adaptor drives the pod.
                if cleanup != cause {
                    tracing::error!("cleaning up after the failed start: {cleanup}");
                }
            }
            return;
        }
    };
    if settings.delete_on_exit {
        tracing::warn!(
            "pod {pod}: --delete-on-exit: the start failed, but the keys are kept: {reason}; to bring the pod up, run \
             connect again; to delete the keys, run connect --delete-on-exit again and end it with SIGTERM"
        );
    }
    tokio::select! {
        () = adaptor.suspend(pod) => {}
        signal = signals.next() => tracing::warn!("pod {pod}: {signal} during the end: open streams are cut"),
    }
}

/// Ends after a signal that came during the start.
async fn interrupted(
    adaptor: &Adaptor,
    settings: &ConnectSettings,
    signals: &mut Signals,
    signal: EndSignal,
) -> Result<Option<EndSignal>, ConnectError> {
    let state = adaptor.snapshot(&settings.pod).map(|pod| pod.state);
    if matches!(state, Some(PodState::Up { .. })) {
        // It came up in this moment, and its event has said so.
        return end_after(signal, adaptor, settings, signals).await;
    }
    tracing::info!("pod {}: {signal} before the pod was up: ending", settings.pod);
    Ok(end(adaptor, settings, signals).await?.or(Some(signal)))
}

/// Ends a pod that was up.
async fn end_after(
    signal: EndSignal,
    adaptor: &Adaptor,
    settings: &ConnectSettings,
    signals: &mut Signals,
) -> Result<Option<EndSignal>, ConnectError> {
    tracing::info!("pod {}: {signal}: ending; a second signal ends at once", settings.pod);
    end(adaptor, settings, signals).await
}

fn build_adaptor(
    store: Arc<DirectoryStore>,
    settings: &ConnectSettings,
    events: &Events,
) -> Result<Adaptor, ConnectError> {
    let key_source = match &settings.key_source {
        KeySource::Kbs(kbs) => KeySource::Kbs(KbsClient::new(kbs, settings.deadline)?),
        KeySource::UserData => KeySource::UserData,
    };
    let events = events.clone();
    let config = Config {
        inbounds: settings.inbounds.clone(),
        outbounds: settings.outbounds.clone(),
        agent: settings.agent.clone(),
        worker_nodes: settings.worker_nodes.clone(),
        old_agents: settings.old_agents,
        kbs_filter: settings.kbs_filter,
        rekey_bytes: settings.rekey_bytes,
        require_pq: settings.require_pq,
        memory: secure_comms_adaptor::MEMORY,
        observer: Arc::new(move |pod: &PodId, event: &PodEvent| events.happened(pod, event)),
    };
    Ok(Adaptor::new(store, key_source, config))
}

/// Listens again for the clients of a pod that was started before. Its inbounds may wait for a network namespace.
async fn restore(
    adaptor: &Adaptor,
    settings: &ConnectSettings,
    deadline: Deadline,
) -> Result<Option<Vec<Endpoint>>, AdaptorError> {
    match timeout(deadline.left(), adaptor.restore_listeners(&settings.pod)).await {
        Ok(restored) => restored,
        Err(_) => Err(AdaptorError::PrepareDeadline {
            pod: settings.pod.clone(),
            seconds: settings.deadline.as_secs(),
            waiting_for: "its inbounds".to_owned(),
        }),
    }
}

/// Prepares the pod unless its listeners were restored, logs its endpoints, and starts it.
async fn bring_up(
    adaptor: &Adaptor,
    settings: &ConnectSettings,
    events: &Events,
    restored: Result<Option<Vec<Endpoint>>, AdaptorError>,
    deadline: Deadline,
) -> Result<(), AdaptorError> {
    let restored = restored?;
    warn_if_unbound(adaptor, settings);
    let endpoints = match restored {
        Some(endpoints) if !is_rebound(adaptor, settings) => endpoints,
        _ => adaptor.prepare(&settings.pod, spec(settings), deadline).await?,
    };
    for endpoint in endpoints {
        tracing::info!("pod {}: inbound {} listens on {}", settings.pod, endpoint.name, endpoint.local);
        events.listening(&settings.pod, &endpoint);
    }
    adaptor.start(&settings.pod, &settings.addresses, deadline).await
}

/// The init-data that the adaptor expects of the pod's VM now.
fn known_init_data(adaptor: &Adaptor, settings: &ConnectSettings) -> Option<InitDataDigest> {
    adaptor.snapshot(&settings.pod).and_then(|pod| pod.init_data)
}

fn spec(settings: &ConnectSettings) -> PodSpec {
    PodSpec::bound_to(match &settings.init_data {
        ExpectedInitData::Digest(digest) => Some(digest.clone()),
        ExpectedInitData::AsBefore | ExpectedInitData::Unbound => None,
    })
}

/// Whether other init-data is expected than when the pod was started. Without a flag the earlier one holds.
fn is_rebound(adaptor: &Adaptor, settings: &ConnectSettings) -> bool {
    settings.init_data != ExpectedInitData::AsBefore
        && spec(settings).init_data != known_init_data(adaptor, settings)
}

fn warn_if_unbound(adaptor: &Adaptor, settings: &ConnectSettings) {
    let is_unbound = settings.init_data == ExpectedInitData::AsBefore
        && matches!(settings.key_source, KeySource::Kbs(_))
        && known_init_data(adaptor, settings).is_none();
    if is_unbound {
        tracing::warn!(
            "pod {}: its keys are bound to no VM: no init-data is expected, so anyone who starts a VM that the KBS accepts can \
             fetch them, also the cloud; give the VM's init-data with --init-data, --init-data-digest or --init-data-rules, \
             and use the resource policy of deploy/",
            settings.pod
        );
    }
}

/// Where the pod's key may still be in the KBS.
fn resource(adaptor: &Adaptor, settings: &ConnectSettings) -> String {
    let init_data = known_init_data(adaptor, settings).or_else(|| spec(settings).init_data);
    pod_keys(&settings.pod, init_data.as_ref())
}

/// Ends in good order, or at once on a signal, which it returns.
async fn end(
    adaptor: &Adaptor,
    settings: &ConnectSettings,
    signals: &mut Signals,
) -> Result<Option<EndSignal>, ConnectError> {
    // The snapshot is gone at the end.
    let resource = resource(adaptor, settings);
    tokio::select! {
        ended = end_in_order(adaptor, settings, &resource) => ended.map(|()| None),
        signal = signals.next() => {
            let pod = &settings.pod;
            tracing::warn!("pod {pod}: {signal} during the end: open streams are cut");
            if settings.delete_on_exit {
                tracing::warn!(
                    "pod {pod}: its deletion may be incomplete: delete {resource} from the KBS by hand, or run connect \
                     --delete-on-exit again and end it"
                );
            }
            Ok(Some(signal))
        }
    }
}

async fn end_in_order(
    adaptor: &Adaptor,
    settings: &ConnectSettings,
    resource: &str,
) -> Result<(), ConnectError> {
    if !settings.delete_on_exit {
        adaptor.suspend(&settings.pod).await;
        return Ok(());
    }
    match timeout(DELETE_TIMEOUT, adaptor.stop(&settings.pod)).await {
        Ok(stopped) => Ok(stopped?),
        Err(_) => Err(ConnectError::Delete {
            pod: settings.pod.clone(),
            resource: resource.to_owned(),
            seconds: DELETE_TIMEOUT.as_secs(),
        }),
    }
}
