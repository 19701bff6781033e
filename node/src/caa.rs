//! The way in of an unmodified cloud-api-adaptor (CAA): its dial to a VM is redirected to us, and held until the pod can be
//! used.
//!
//! ```text
//! apf.json appears --> directory: sandbox, names, TLS keys --> prepare
//! CAA dials VM:15150 --rules (nftables)--> front: ClientHello --> which sandbox, which VM --> life: start, up, Check
//!                                            \--- handshake finished --> relay <==> KATAAGENT stream
//! ```

pub mod check;
pub mod directory;
pub mod front;
mod identity;
mod life;
mod looks;
pub mod rules;
mod sandbox;
pub mod strict;
#[cfg(test)]
pub(crate) mod testing;

use std::path::PathBuf;
use std::time::Duration;

use secure_comms_adaptor::store::StoreError;
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinError, JoinSet};

use self::front::{Front, FrontError, FrontLimits};
use self::life::Lives;
use self::rules::RulesSettings;
use self::strict::{Identities, StrictError};

use crate::health::Health;
use crate::init_data::InitDataPolicy;
use crate::metrics::Metrics;
use crate::pods::Pods;

pub use self::directory::{Change, Changes, LookupError, PodsDirectory};
pub use self::identity::{IdentityError, STRICT_SERVER_NAME, TlsIdentity, Whose};
pub use self::sandbox::Sandbox;

/// Settings of the way in of cloud-api-adaptor.
#[derive(Clone, Debug)]
pub struct CaaSettings {
    /// Where cloud-api-adaptor writes what it knows of its sandboxes.
    pub pods_directory: PathBuf,
    /// The port of the VMs that it dials.
    pub forwarder_port: u16,
    /// Our port on the loopback addresses, to which its dials are redirected.
    pub listen_port: u16,
    /// Directory with our own CA and certificates (`caa-certs`), in the strict variant; `None`: each pod's are in its
    /// `apf.json`.
    pub certificates: Option<PathBuf>,
    /// How long a pod stays after the runtime's connection has ended: it may connect again.
    pub grace: Duration,
    /// How long a pod may take from its first dial, or from its file without a dial, until it can be used.
    pub start_deadline: Duration,
}

impl Default for CaaSettings {
    fn default() -> Self {
        Self {
            pods_directory: PathBuf::from("/run/peerpod/pods"),
            forwarder_port: 15150,
            listen_port: 15151,
            certificates: None,
            grace: Duration::from_secs(60),
            start_deadline: Duration::from_secs(600),
        }
    }
}

/// Error of the way in of cloud-api-adaptor.
#[derive(Debug, thiserror::Error)]
pub enum CaaError {
    /// Its dials cannot be served.
    #[error(transparent)]
    Front(#[from] FrontError),
    /// There are no certificates for the strict variant.
    #[error("read the certificates for cloud-api-adaptor")]
    Strict(#[from] StrictError),
    /// The pods of earlier processes cannot be listed.
    #[error("list the pods in the store")]
    Store(#[from] StoreError),
    /// A part of it ended unexpectedly.
    #[error("a part of the service for cloud-api-adaptor ended unexpectedly: report it")]
    Part(#[source] JoinError),
}

/// Dials that wait for their lives to look at them.
const DIALS_QUEUED: usize = 64;

/// Serves the pods of cloud-api-adaptor until `stop` becomes true. The adaptor has resumed its pods before.
///
/// # Errors
/// Its port cannot be listened at, or the store cannot be read.
///
/// # Cancellation
/// Dropping the future cuts the connections of cloud-api-adaptor: the runtime then ends its pods.
pub async fn run(
    settings: CaaSettings,
    init_data: InitDataPolicy,
    pods: Pods,
    health: Health,
    metrics: Metrics,
    stop: watch::Receiver<bool>,
) -> Result<(), CaaError> {
    // What the rules redirect to has to be there before them.
    let front = Front::bind(settings.listen_port, FrontLimits::default(), metrics.clone()).await?;
    let rules = RulesSettings { forwarder_port: settings.forwarder_port, listen_port: front.port() };
    let directory = PodsDirectory::open(&settings.pods_directory);
    let identities = Identities::open(directory.clone(), settings.certificates.as_deref())?;
    let changes = directory.changes();
    let lives = Lives::new(&settings, init_data, pods, (changes, identities), metrics.clone()).await?;
    let (dials, held) = mpsc::channel(DIALS_QUEUED);
    let mut parts = JoinSet::new();
    parts.spawn(front.run(dials, stop.clone()));
    parts.spawn(rules::keep(rules, health.clone(), metrics, stop.clone()));
    parts.spawn({
        let stop = stop.clone();
        async move { directory.run(health, stop).await }
    });
    parts.spawn(lives.run(held, stop));
    while let Some(ended) = parts.join_next().await {
        ended.map_err(CaaError::Part)?;
    }
    Ok(())
}
