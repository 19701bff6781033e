//! `serve`: the service of a node. Serves all of its pods until SIGTERM or SIGINT.
//!
//! ```text
//! store, KBS --> adaptor --> pods --resumed--> caa, api, metrics: until one fails, or a signal --> drain
//!                             \--> report: the service manager
//! ```

mod drain;
mod hang;
mod own_thread;
mod report;

use std::future::pending;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use secure_comms_adaptor::kbs::{KbsClient, KbsError};
use secure_comms_adaptor::key_source::KeySource;
use secure_comms_adaptor::pod::PodEvent;
use secure_comms_adaptor::store::DirectoryStore;
use secure_comms_adaptor::{Adaptor, AdaptorError, Config};
use secure_comms_protocol::PodId;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::{JoinError, JoinSet};

use self::own_thread::OwnThread;
use self::report::Reporter;
use super::{open_store, print};
use crate::api::{self, ApiSettings, VmTunnels};
use crate::caa::{self, rules};
use crate::doctor;
use crate::health::Health;
use crate::metrics::{self, Metrics, MetricsSettings};
use crate::pods::{Events, Pods};
use crate::settings::ServeSettings;
use crate::signals::{EndSignal, Signals};
use crate::systemd::{Notifier, NotifyError};

/// Longest that a call to the KBS may take.
const KBS_TIME: Duration = Duration::from_secs(60);
/// The part of the health that is the service itself.
const PART: &str = "service";

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
    /// A thread of the service's own cannot be started.
    #[error("start a thread")]
    Thread(#[source] io::Error),
    /// The signal handlers cannot be installed.
    #[error("wait for signals")]
    Signals(#[source] io::Error),
    /// The service manager cannot be notified.
    #[error(transparent)]
    Notify(#[from] NotifyError),
    /// A part of the service ended.
    #[error("{0:#}")]
    Part(anyhow::Error),
}

/// All that runs.
struct Service {
    settings: ServeSettings,
    store: Arc<DirectoryStore>,
    pods: Pods,
    health: Health,
    metrics: Metrics,
    /// Of the API, the metrics and the probes: they answer while the pods' threads compute.
    viewers: OwnThread,
}

/// What the parts return: an error ends the service.
type Parts = JoinSet<anyhow::Result<()>>;

/// Serves the node's pods until SIGTERM or SIGINT; a second signal ends it at once, and is returned. Must run in a tokio
/// runtime with I/O and time enabled.
///
/// # Errors
/// The store or the KBS client cannot be set up, or a part of the service failed.
///
/// # Cancellation
/// Dropping the future cuts the connections of all pods. Their keys stay in the store and in the KBS.
pub async fn run(settings: ServeSettings) -> Result<Option<EndSignal>, ServeError> {
    let mut signals = Signals::new().map_err(ServeError::Signals)?;
    let notifier = Arc::new(Notifier::from_env()?);
    for warning in &settings.warnings {
        tracing::warn!("{warning}");
    }
    let service = Service::new(settings)?;
    let (stop, stopped) = watch::channel(false);
    let _hang = hang::watch(&service.pods).map_err(ServeError::Thread)?;
    let reporter = Reporter::start(&notifier, &service.pods, &service.health);
    let mut parts = Parts::new();
    let ended = tokio::select! {
        signal = end_signal(&mut signals) => Ok(signal),
        error = service.serve(&mut parts, &stopped, &notifier) => Err(error),
    };
    // It would overwrite what the end says.
    drop(reporter);
    service.say_what_the_end_costs(&ended, &notifier);
    stop.send_replace(true);
    let interrupted = tokio::select! {
        () = drain::drain(&service.pods, &mut parts) => None,
        signal = end_signal(&mut signals) => {
            tracing::warn!("{signal} during the end: open streams are cut");
            Some(signal)
        }
    };
    ended.map(|_| interrupted)
}

impl Service {
    fn new(settings: ServeSettings) -> Result<Self, ServeError> {
        let store = Arc::new(open_store(&settings.store).map_err(ServeError::Store)?);
        let (events, metrics) = (Events::default(), Metrics::default());
        let adaptor = build_adaptor(Arc::clone(&store), &settings, &events, &metrics)?;
        let pods = Pods::new(adaptor, events);
        let counted = metrics.clone();
        pods.observe_orders(move |pod, order| counted.ordered(pod, order));
        let viewers = OwnThread::start("viewers").map_err(ServeError::Thread)?;
        Ok(Self { settings, store, pods, health: Health::default(), metrics, viewers })
    }

    /// Resumes the pods and runs the parts. Returns only when one of them has failed.
    async fn serve(
        &self,
        parts: &mut Parts,
        stopped: &watch::Receiver<bool>,
        notifier: &Notifier,
    ) -> ServeError {
        self.health.fails(PART, "pods are being resumed");
        // The probes answer all the while.
        self.start_metrics(parts, stopped);
        let resumed = match self.pods.resume_all().await {
            Ok(resumed) => resumed,
            Err(error) => return error.into(),
        };
        tracing::info!("serve: pods resumed: {}", resumed.len());
        self.start_launchers(parts, stopped);
        self.health.works(PART);
        let ready = async {
            report::ready(&self.pods, &self.health, notifier).await;
            pending().await
        };
        tokio::select! {
            error = failed(parts) => error,
            never = ready => never,
        }
    }

    fn start_metrics(&self, parts: &mut Parts, stopped: &watch::Receiver<bool>) {
        let Some(listen) = self.settings.metrics_listen else { return };
        let settings = MetricsSettings { listen, each_pod: self.settings.metrics_pods };
        let (pods, health, metrics) = (self.pods.clone(), self.health.clone(), self.metrics.clone());
        let stop = stopped.clone();
        let metrics = async move {
            metrics::run(settings, pods, health, metrics, stop).await;
            Ok(())
        };
        parts.spawn_on(metrics, self.viewers.runtime());
    }

    fn start_launchers(&self, parts: &mut Parts, stopped: &watch::Receiver<bool>) {
        let (pods, health, metrics) = (&self.pods, &self.health, &self.metrics);
        let without_trustee = matches!(self.settings.key_source, KeySource::UserData);
        let vm_tunnels = without_trustee.then(|| VmTunnels {
            store: Arc::clone(&self.store) as _,
            inbounds: self.settings.agent.inbounds.clone(),
            outbounds: self.settings.agent.outbounds.clone(),
        });
        let settings = ApiSettings {
            socket: self.settings.socket.clone(),
            allowed_uids: self.settings.allowed_uids.clone(),
            vm_tunnels,
        };
        health.fails(api::PART, "it does not listen yet");
        let api = api::run(settings, pods.clone(), health.clone(), metrics.clone(), stopped.clone());
        parts.spawn_on(async move { api.await.map_err(anyhow::Error::from) }, self.viewers.runtime());
        let Some(settings) = self.settings.caa.clone() else { return };
        health.fails(rules::PART, "the nftables rules are not in place yet");
        health.fails(caa::directory::HEALTH, "the directory is not read yet");
        let init_data = self.settings.init_data.clone();
        let caa =
            caa::run(settings, init_data, pods.clone(), health.clone(), metrics.clone(), stopped.clone());
        parts.spawn(async move { caa.await.map_err(anyhow::Error::from) });
    }

    fn say_what_the_end_costs(&self, ended: &Result<EndSignal, ServeError>, notifier: &Notifier) {
        let cost = self.pods.stop_cost();
        notifier.stopping();
        notifier.status(&format!("ending: {cost}"));
        match ended {
            Ok(signal) => tracing::info!("serve: {signal}: ending: {cost}; a second signal ends at once"),
            Err(_) => tracing::error!("serve: a part has failed: ending: {cost}"),
        }
    }
}

/// Takes the nftables rules away that an earlier process has left.
///
/// # Errors
/// nftables cannot be changed, or a service runs: it would put them back at once.
pub async fn remove_rules() -> anyhow::Result<()> {
    if let Some(port) = rules::redirected_to().await?
        && doctor::something_listens(port).context("look for a service that runs")?
    {
        anyhow::bail!(
            "the rules stay: something listens at port {port}, to which they redirect: a service that runs would put them \
             back at once, and streams of its pods would end; end it first (systemctl stop secure-comms-adaptor)"
        );
    }
    let text = if rules::remove().await? {
        "the nftables table inet secure-comms-adaptor is removed: cloud-api-adaptor's dials go to the VMs, which do not \
         answer them; connections that live go on only if another nat chain is on the node\n"
    } else {
        "there is no nftables table inet secure-comms-adaptor\n"
    };
    print(text.as_bytes())
}

/// Waits until a part fails. One that has ended without an error was stopped.
async fn failed(parts: &mut Parts) -> ServeError {
    while let Some(ended) = parts.join_next().await {
        if let Err(error) = flat(ended) {
            return ServeError::Part(error);
        }
    }
    ServeError::Part(anyhow::anyhow!("all parts have ended: report the bug"))
}

fn flat(ended: Result<anyhow::Result<()>, JoinError>) -> anyhow::Result<()> {
    ended.unwrap_or_else(|error| Err(anyhow::anyhow!("a part ended by a panic: report the bug: {error}")))
}

/// The next signal that ends the service. SIGHUP does not: the rules for init-data are read for each pod, and all else at the
/// start.
async fn end_signal(signals: &mut Signals) -> EndSignal {
    loop {
        match signals.next().await {
            EndSignal::Hup => {
                tracing::info!("serve: SIGHUP: settings are read at the start only: restart to change them");
            }
            signal => return signal,
        }
    }
}

fn build_adaptor(
    store: Arc<DirectoryStore>,
    settings: &ServeSettings,
    events: &Events,
    metrics: &Metrics,
) -> Result<Adaptor, ServeError> {
    let key_source = match &settings.key_source {
        KeySource::Kbs(kbs) => KeySource::Kbs(KbsClient::new(kbs, settings.deadline.min(KBS_TIME))?),
        KeySource::UserData => KeySource::UserData,
    };
    let (observer, metrics) = (events.observer(), metrics.clone());
    let config = Config {
        inbounds: settings.inbounds.clone(),
        outbounds: settings.outbounds.clone(),
        agent: settings.agent.clone(),
        worker_nodes: settings.worker_nodes.clone(),
        old_agents: settings.old_agents,
        kbs_filter: settings.kbs_filter,
        rekey_bytes: settings.rekey_bytes,
        require_pq: settings.require_pq,
        memory: settings.memory,
        observer: Arc::new(move |pod: &PodId, event: &PodEvent| {
            metrics.happened(pod, event);
            observer(pod, event);
        }),
    };
    // The API gives its orders on another thread.
    Ok(Adaptor::new(store, key_source, config).on(Handle::current()))
}
