//! `connect`: one pod in the foreground, and a line on stdout for whatever happens to it.

use std::convert::Infallible;
use std::future::pending;
use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;

use secure_comms_keys::text::escape;
use secure_comms_protocol::PodId;
use secure_comms_protocol::resource::pod_private_key;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::timeout;

use crate::adaptor::{Adaptor, AdaptorError, Config, KeySource};
use crate::kbs::{KbsClient, KbsError};
use crate::pod::PodEvent;
use crate::settings::{Settings, Trust};
use crate::store::{DirectoryStore, StoreError};

/// How long forgetting the pod may take once we were told to end: whoever ends us will not wait much longer.
const FORGET: Duration = Duration::from_secs(20);

/// Why `connect` failed.
#[derive(Debug, thiserror::Error)]
pub enum ConnectFailed {
    /// The pod was not prepared, not started or not stopped.
    #[error(transparent)]
    Adaptor(#[from] AdaptorError),
    /// The store can't be opened.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The KBS client can't be set up.
    #[error(transparent)]
    Kbs(#[from] KbsError),
    /// Signals can't be awaited.
    #[error("wait for signals")]
    Signals(#[source] io::Error),
    /// The pod could not be forgotten in time.
    #[error(
        "stop pod {pod}: not done within {seconds} s: delete {resource} from the KBS by hand, or run connect and end it once more"
    )]
    Forget {
        /// The pod.
        pod: PodId,
        /// What is left in the KBS.
        resource: String,
        /// How long it was tried, in seconds.
        seconds: u64,
    },
}

/// SIGTERM and SIGINT.
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

/// Brings the pod up and keeps its channel up until SIGTERM or SIGINT.
///
/// # Errors
/// What was last seen when the deadline passed.
pub async fn run(settings: Settings) -> Result<(), ConnectFailed> {
    let mut signals = Signals::new().map_err(ConnectFailed::Signals)?;
    let store = Arc::new(DirectoryStore::open(&settings.store)?);
    let keys = match &settings.trust {
        Trust::Kbs(kbs) => KeySource::Kbs(Box::new(KbsClient::new(kbs, settings.deadline)?)),
        Trust::UserData => KeySource::UserData,
    };
    let config = Config {
        inbounds: settings.inbounds.clone(),
        outbounds: settings.outbounds.clone(),
        rekey_bytes: settings.rekey_bytes,
        observer: Arc::new(tell),
    };
    let adaptor = Adaptor::new(store, keys, config);
    let known = adaptor.reopen(&settings.pod).await;
    // Beside all else, to the end.
    let republish = republish(&adaptor, &settings.pod, matches!(known, Ok(Some(_))));
    tokio::pin!(republish);
    let come_up = async {
        let endpoints = match known? {
            Some(endpoints) => endpoints,
            None => adaptor.prepare(&settings.pod).await?,
        };
        for endpoint in endpoints {
            line(&format!("inbound {} listens on {}", endpoint.name, endpoint.local));
        }
        adaptor.start(&settings.pod, &settings.addresses, settings.deadline).await
    };
    let came_up = tokio::select! {
        came_up = come_up => came_up,
        never = &mut republish => match never {},
        () = signals.any() => return end(&adaptor, &settings).await,
    };
    if let Err(error) = came_up {
        // What the start made goes too, where the operator asked for that; why it failed is what they need to read.
        if let Err(left) = end(&adaptor, &settings).await {
            tracing::error!("after the failed start: {left}");
        }
        return Err(error.into());
    }
    tokio::select! {
        () = signals.any() => {}
        never = &mut republish => match never {},
    }
    end(&adaptor, &settings).await
}

/// Publishes the keys of a pod that was started before, however long the KBS is away.
async fn republish(adaptor: &Adaptor, pod: &PodId, known: bool) -> Infallible {
    if known {
        // Until the KBS answers; that it did not for as long as a start may take is told each time.
        while let Err(error) = adaptor.republish(pod).await {
            if !matches!(error, AdaptorError::Kbs(KbsError::Unreachable { .. })) {
                tracing::error!("pod {pod}: publishing its keys once more: {:#}", anyhow::Error::from(error));
                break;
            }
        }
    }
    pending().await
}

async fn end(adaptor: &Adaptor, settings: &Settings) -> Result<(), ConnectFailed> {
    if !settings.delete_on_exit {
        adaptor.close(&settings.pod).await;
        return Ok(());
    }
    match timeout(FORGET, adaptor.stop(&settings.pod)).await {
        Ok(stopped) => Ok(stopped?),
        Err(_) => Err(ConnectFailed::Forget {
            pod: settings.pod.clone(),
            resource: pod_private_key(&settings.pod),
            seconds: FORGET.as_secs(),
        }),
    }
}

fn tell(pod: &PodId, event: &PodEvent) {
    line(&format!("pod {pod}: {event}"));
}

/// One whole line at a time; nobody has to read them.
fn line(text: &str) {
    let mut out = io::stdout().lock();
    let _ = writeln!(out, "{}", escape(text)).and_then(|()| out.flush());
}
