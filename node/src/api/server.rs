//! The connections: who is at the other end, and how much of each there may be.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::http::header::CONNECTION;
use axum::http::{HeaderValue, Uri};
use axum::response::{IntoResponse as _, Response};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use nix::unistd::geteuid;
use secure_comms_tunnel::inbound::PrivateListener;
use tokio::net::UnixStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::patience::Patient;
use super::problem::{Kind, finished};
use super::{PART, stopped};
use crate::health::Health;
use crate::metrics::Metrics;

/// Connections at a time. The next one waits until one ends.
const CONNECTIONS_MAX: usize = 512;
/// Connections at a time of users who may not use the API. Further ones are closed.
const STRANGERS_MAX: usize = 8;
/// Time that such a connection has.
const STRANGER_TIME: Duration = Duration::from_secs(5);
/// The largest head of a request, in bytes, and the most header fields in it.
const HEAD_MAX: usize = 16 * 1024;
const FIELDS_MAX: usize = 64;
/// Time for a head, and for an idle connection.
const HEAD_TIME: Duration = Duration::from_secs(10);
/// Time in which a client must take some of an answer.
const WRITE_TIME: Duration = Duration::from_secs(30);
/// Time of the requests that are under way at the end.
const DRAIN: Duration = Duration::from_secs(5);
/// Pause after an error of accept, as when there are no file descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(500);

/// Who may use the API.
#[derive(Clone, Debug)]
pub(super) struct Access(Arc<[u32]>);

impl Access {
    /// Root, our own user, and these.
    pub(super) fn of(uids: &[u32]) -> Self {
        Self([0, geteuid().as_raw()].iter().chain(uids).copied().collect())
    }

    fn allows(&self, uid: u32) -> bool {
        self.0.contains(&uid)
    }
}

/// Serves connections.
#[derive(Debug)]
pub(super) struct Server {
    router: Router,
    access: Access,
    health: Health,
    metrics: Metrics,
}

impl Server {
    pub(super) fn new(router: Router, access: Access, health: Health, metrics: Metrics) -> Self {
        Self { router, access, health, metrics }
    }

    /// Serves until `stop` becomes true, and drains then.
    pub(super) async fn serve(self, listener: PrivateListener, stop: watch::Receiver<bool>) {
        let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let strangers = Arc::new(Semaphore::new(STRANGERS_MAX));
        let mut connections = JoinSet::new();
        loop {
            let accepted = async {
                // It is never closed.
                let permit = Arc::clone(&room).acquire_owned().await.ok()?;
                Some((permit, listener.accept().await))
            };
            tokio::select! {
                () = stopped(stop.clone()) => break,
                Some(ended) = connections.join_next() => report(ended),
                Some((permit, accepted)) = accepted => match accepted {
                    Ok(stream) => {
                        self.health.works(PART);
                        self.admit(stream, permit, &strangers, &stop, &mut connections);
                    }
                    Err(error) => {
                        self.health.fails(PART, format!("accepting: {error}; raise LimitNOFILE if it says too many open files"));
                        sleep(ACCEPT_PAUSE).await;
                    }
                },
            }
        }
        drop(listener);
        let drained = timeout(DRAIN, async {
            while let Some(ended) = connections.join_next().await {
                report(ended);
            }
        });
        if drained.await.is_err() {
            tracing::warn!("api: {} requests were cut off; what they asked for goes on", connections.len());
        }
    }

    fn admit(
        &self,
        stream: UnixStream,
        permit: OwnedSemaphorePermit,
        strangers: &Arc<Semaphore>,
        stop: &watch::Receiver<bool>,
        connections: &mut JoinSet<()>,
    ) {
        let Ok(uid) = stream.peer_cred().map(|peer| peer.uid()) else { return };
        if self.access.allows(uid) {
            let (router, metrics, stop) = (self.router.clone(), self.metrics.clone(), stop.clone());
            connections.spawn(async move {
                let _permit = permit;
                connection(stream, router, metrics, stop).await;
            });
            return;
        }
        // Their connections take none of the room.
        drop(permit);
        tracing::debug!("api: user {uid} is refused");
        if let Ok(permit) = Arc::clone(strangers).try_acquire_owned() {
            let stop = stop.clone();
            connections.spawn(async move {
                let _permit = permit;
                // A stranger's time is limited; how it ends is no matter.
                drop(timeout(STRANGER_TIME, refuse(stream, uid, stop)).await);
            });
        }
    }
}

/// A connection's task panicked: its client sees the connection end.
fn report(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended {
        tracing::error!("api: a connection ended by a panic: report the bug: {error}");
    }
}

async fn connection(stream: UnixStream, router: Router, metrics: Metrics, stop: watch::Receiver<bool>) {
    let router = TowerToHyperService::new(router);
    let service = service_fn(move |request: hyper::Request<Incoming>| {
        let (path, method) = (request.uri().clone(), request.method().clone());
        let (router, metrics) = (router.clone(), metrics.clone());
        async move {
            let response = hyper::service::Service::call(&router, request.map(Body::new)).await?;
            metrics.api_answered(method.as_str(), response.status().as_u16());
            Ok::<_, Infallible>(finished(response, path_of(&path)))
        }
    });
    serve(stream, service, stop).await;
}

/// Answers every request of a user who may not use the API.
async fn refuse(stream: UnixStream, uid: u32, stop: watch::Receiver<bool>) {
    let service = service_fn(move |request: Request<Incoming>| async move {
        let detail =
            format!("user {uid} may not use the API: run as root, or have the user added to allowed-uids");
        let mut response = Kind::Forbidden.problem(detail).into_response();
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        Ok::<_, Infallible>(finished(response, path_of(request.uri())))
    });
    serve(stream, service, stop).await;
}

fn path_of(uri: &Uri) -> &str {
    uri.path()
}

async fn serve<S, F>(stream: UnixStream, service: S, stop: watch::Receiver<bool>)
where
    S: hyper::service::Service<Request<Incoming>, Response = Response, Error = Infallible, Future = F>,
    F: Future<Output = Result<Response, Infallible>>,
{
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME)
        .max_buf_size(HEAD_MAX)
        .max_headers(FIELDS_MAX)
        .serve_connection(TokioIo::new(Patient::new(stream, WRITE_TIME)), service);
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stopped(stop) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!("api: a connection ended: {error}");
    }
}
