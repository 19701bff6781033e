//! The API of the node's service: HTTP on a unix socket, for launchers other than cloud-api-adaptor and for the command
//! line. docs/operations/API.md is its manual.
//!
//! ```text
//! socket --> server: who is it, limits --> routes --> input: checked as a whole --> pods
//!                                            |--> view: what is known of a pod
//!                                            |--> events: kept for a while, each reader at its place
//!                                            \--> problem: errors
//! client: the other end, in the same types
//! ```

mod described;
mod events;
mod input;
mod openapi;
mod patience;
mod problem;
mod routes;
mod server;
mod user_data;
mod view;

pub mod client;
pub mod types;

use axum::routing::get;
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use secure_comms_adaptor::with_causes;
use secure_comms_keys::FileError;
use secure_comms_tunnel::inbound::PrivateListener;
use tokio::sync::watch;

use self::events::History;
use self::routes::Api;
use self::server::{Access, Server};
use crate::health::Health;
use crate::metrics::Metrics;
use crate::pods::Pods;

pub use self::openapi::document;
pub use self::user_data::VmTunnels;

/// Where the API listens by default.
pub const DEFAULT_SOCKET: &str = "/run/secure-comms/adaptor.sock";
/// The API, as a part of the service's health.
pub const PART: &str = "api";

/// Settings of the API.
#[derive(Clone, Debug)]
pub struct ApiSettings {
    /// Path of the unix socket. Its directory is made (0700) if it does not exist.
    pub socket: PathBuf,
    /// Users who may use the API, besides root and our own. If there are any, the socket's mode is 0666, and they must be
    /// able to reach its directory.
    pub allowed_uids: Vec<u32>,
    /// Without Trustee: what the user data of the pod VMs is made from.
    pub vm_tunnels: Option<VmTunnels>,
}

impl Default for ApiSettings {
    fn default() -> Self {
        Self { socket: PathBuf::from(DEFAULT_SOCKET), allowed_uids: Vec::new(), vm_tunnels: None }
    }
}

/// The API cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// The directory of the socket cannot be made.
    #[error("api")]
    Directory(#[source] FileError),
    /// Another process answers on the socket.
    #[error("api: {}: another process listens there: end the other secure-comms-adaptor serve first, or choose another socket", .0.display())]
    InUse(PathBuf),
    /// It cannot listen on the socket.
    #[error("api: listening on {}", .path.display())]
    Listen {
        /// Path of the socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Serves the API until `stop` becomes true. Then requests that are under way have 5 s; waits for a pod end at once with
/// an answer that says so.
///
/// # Errors
/// The socket cannot be bound.
///
/// # Cancellation
/// Dropping the future closes every connection and removes the socket. What was asked of the pods goes on.
pub async fn run(
    settings: ApiSettings,
    pods: Pods,
    health: Health,
    metrics: Metrics,
    stop: watch::Receiver<bool>,
) -> Result<(), ApiError> {
    let listener = match listen(&settings).await {
        Ok(listener) => listener,
        Err(error) => {
            health.fails(PART, with_causes(&error));
            return Err(error);
        }
    };
    tracing::info!("api: listening on {}", settings.socket.display());
    health.works(PART);
    let history = History::new();
    let api = Api::new(pods.clone(), health.clone(), history.clone(), settings.vm_tunnels, stop.clone());
    let server =
        Server::new(api.router(get(openapi::serve)), Access::of(&settings.allowed_uids), health, metrics);
    tokio::select! {
        () = server.serve(listener, stop) => {}
        () = history.record(&pods) => {}
    }
    Ok(())
}

/// Returns when the service ends.
async fn stopped(mut stop: watch::Receiver<bool>) {
    // An error means that the service is gone, too.
    drop(stop.wait_for(|stop| *stop).await);
}

async fn listen(settings: &ApiSettings) -> Result<PrivateListener, ApiError> {
    let path = &settings.socket;
    let directory = path.parent().unwrap_or(Path::new("/"));
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory);
    made.map_err(FileError::io("making the directory", directory)).map_err(ApiError::Directory)?;
    let bound = if settings.allowed_uids.is_empty() {
        PrivateListener::bind(path).await
    } else {
        PrivateListener::bind_for_all(path).await
    };
    bound.map_err(|source| match source.kind() {
        io::ErrorKind::AddrInUse => ApiError::InUse(path.clone()),
        _ => ApiError::Listen { path: path.clone(), source },
    })
}
