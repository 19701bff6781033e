//! `connect`: serves one pod in the foreground, and prints a line on stdout for each event.

use std::convert::Infallible;
use std::future::pending;
use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;

use secure_comms_adaptor::kbs::{KbsClient, KbsError};
use secure_comms_adaptor::key_source::KeySource;
use secure_comms_adaptor::pod::PodEvent;
use secure_comms_adaptor::store::{DirectoryStore, StoreError};
use secure_comms_adaptor::{Adaptor, AdaptorError, Config, Deadline, Endpoint};
use secure_comms_keys::text::escape;
use secure_comms_protocol::PodId;
use secure_comms_protocol::resource::pod_private_key;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::timeout;

use crate::settings::ConnectSettings;

/// Time limit for deleting the pod after a signal: a service manager kills the process soon after.
const DELETE_TIMEOUT: Duration = Duration::from_secs(20);

/// Error of `connect`.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The pod was not prepared, not started or not stopped.
    #[error(transparent)]
    Adaptor(#[from] AdaptorError),
    /// The store cannot be opened.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The KBS client cannot be set up.
    #[error(transparent)]
    Kbs(#[from] KbsError),
    /// The signal handlers cannot be installed.
    #[error("wait for signals")]
    Signals(#[source] io::Error),
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

/// The signals that end the program: SIGTERM and SIGINT.
struct Signals {
    term: Signal,
    int: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self { term: signal(SignalKind::terminate())?, int: signal(SignalKind::interrupt())? })
    }

    async fn any(&mut self) {
        tokio::select! {
            _ = self.term.recv() => {}
            _ = self.int.recv() => {}
        }
    }
}

/// Brings the pod up, and keeps its channel up until SIGTERM or SIGINT.
///
/// Prints one line on stdout for each endpoint and event. Must run in a tokio runtime with I/O and time enabled.
///
/// # Errors
/// The store or the KBS client cannot be set up, the pod did not come up before the deadline, or it could not be
/// deleted at the end.
///
/// # Cancellation
/// Dropping the future cuts the pod's connection. Its keys stay in the store and in the KBS.
pub async fn run(settings: ConnectSettings) -> Result<(), ConnectError> {
    // The publication and the start share it.
    let deadline = Deadline::after(settings.deadline);
    let mut signals = Signals::new().map_err(ConnectError::Signals)?;
    let adaptor = build_adaptor(&settings)?;
    let restored = adaptor.restore_listeners(&settings.pod).await;
    // Runs next to the start and the connection, until the end.
    let publish = publish_restored(&adaptor, &settings.pod, matches!(restored, Ok(Some(_))));
    tokio::pin!(publish);
    let started = tokio::select! {
        started = bring_up(&adaptor, &settings, restored, deadline) => started,
        never = &mut publish => match never {},
        () = signals.any() => return end(&adaptor, &settings).await,
    };
    if let Err(error) = started {
        // The cause of the failed start is what the operator needs: a failing cleanup is only logged.
        if let Err(cleanup) = end(&adaptor, &settings).await {
            tracing::error!("cleaning up after the failed start: {cleanup}");
        }
        return Err(error.into());
    }
    tokio::select! {
        () = signals.any() => {}
        never = &mut publish => match never {},
    }
    end(&adaptor, &settings).await
}

fn build_adaptor(settings: &ConnectSettings) -> Result<Adaptor, ConnectError> {
    let store = Arc::new(DirectoryStore::open(&settings.store)?);
    let key_source = match &settings.key_source {
        KeySource::Kbs(kbs) => KeySource::Kbs(KbsClient::new(kbs, settings.deadline)?),
        KeySource::UserData => KeySource::UserData,
    };
    let config = Config {
        inbounds: settings.inbounds.clone(),
        outbounds: settings.outbounds.clone(),
        rekey_bytes: settings.rekey_bytes,
        observer: Arc::new(print_event),
    };
    Ok(Adaptor::new(store, key_source, config))
}

/// Prepares the pod unless its listeners were restored, prints its endpoints, and starts it.
async fn bring_up(
    adaptor: &Adaptor,
    settings: &ConnectSettings,
    restored: Result<Option<Vec<Endpoint>>, AdaptorError>,
    deadline: Deadline,
) -> Result<(), AdaptorError> {
    let endpoints = match restored? {
        Some(endpoints) => endpoints,
        None => adaptor.prepare(&settings.pod, deadline).await?,
    };
    for endpoint in endpoints {
        print_line(&format!("inbound {} listens on {}", endpoint.name, endpoint.local));
    }
    adaptor.start(&settings.pod, &settings.addresses, deadline).await
}

/// Publishes the keys of a restored pod, and retries for as long as the KBS is unreachable. Never returns.
async fn publish_restored(adaptor: &Adaptor, pod: &PodId, restored: bool) -> Infallible {
    if restored {
        // Each call logs why the KBS is unreachable.
        while let Err(error) = adaptor.publish_keys(pod).await {
            if !matches!(error, AdaptorError::Kbs(KbsError::Unreachable { .. })) {
                tracing::error!("pod {pod}: publishing its keys again: {:#}", anyhow::Error::from(error));
                break;
            }
        }
    }
    pending().await
}

async fn end(adaptor: &Adaptor, settings: &ConnectSettings) -> Result<(), ConnectError> {
    if !settings.delete_on_exit {
        adaptor.suspend(&settings.pod).await;
        return Ok(());
    }
    match timeout(DELETE_TIMEOUT, adaptor.stop(&settings.pod)).await {
        Ok(stopped) => Ok(stopped?),
        Err(_) => Err(ConnectError::Delete {
            pod: settings.pod.clone(),
            resource: pod_private_key(&settings.pod),
            seconds: DELETE_TIMEOUT.as_secs(),
        }),
    }
}

fn print_event(pod: &PodId, event: &PodEvent) {
    print_line(&format!("pod {pod}: {event}"));
}

/// Writes one whole line to stdout. A closed stdout is ignored; a full pipe that is not read blocks the program.
fn print_line(text: &str) {
    let mut out = io::stdout().lock();
    let _ = writeln!(out, "{}", escape(text)).and_then(|()| out.flush());
}
