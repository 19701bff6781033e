//! A client of the API, over its unix socket. Each request is a connection of its own.

mod events;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use axum::http::header::{CONTENT_TYPE, HOST};
use axum::http::{Method, Request, Response, StatusCode};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use secure_comms_adaptor::with_causes;
use secure_comms_protocol::PodId;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

pub use self::events::{EventReader, StreamItem};
use super::types::{
    Deletion, Forgotten, Orphan, OrphanList, Pod, PodList, PodSpec, Prepared, Problem, StartOrder, Status,
};

/// Time for the connection.
const CONNECT: Duration = Duration::from_secs(5);
/// Pause while too many clients wait to be accepted.
const FULL_PAUSE: Duration = Duration::from_millis(20);
/// The largest answer, in bytes.
const ANSWER_MAX: usize = 64 * 1024 * 1024;

/// A client of the API.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

/// A request failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The service does not answer.
    #[error("{}: {cause}: check that secure-comms-adaptor serve runs, and that this is its socket", .socket.display())]
    Unreachable {
        /// Path of the socket.
        socket: PathBuf,
        /// Why.
        cause: String,
    },
    /// This user may not connect.
    #[error("{}: permission denied: run as root, or as the user of secure-comms-adaptor serve", .0.display())]
    Denied(PathBuf),
    /// The service answered with a problem.
    #[error("{}{}", .0.detail, .0.advice.as_ref().map(|advice| format!("; {advice}")).unwrap_or_default())]
    Problem(Box<Problem>),
    /// The connection ended before the answer did.
    #[error("the connection to the service was lost: {0}")]
    Lost(String),
    /// The answer is none of the API.
    #[error("the service's answer is not understood ({0}): check that it has the version of this program")]
    Foreign(String),
}

/// How a pod was stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The pod and its keys are gone.
    Gone,
    /// The pod is ended; its keys are not deleted yet, and that is retried.
    Deleting(Deletion),
}

impl Client {
    /// A client of the service that listens on `socket`.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into() }
    }

    /// Path of the socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The service.
    ///
    /// # Errors
    /// The service does not answer.
    pub async fn status(&self) -> Result<Status, ClientError> {
        self.json(Method::GET, "/v1/status", None).await
    }

    /// All pods, by their ids.
    ///
    /// # Errors
    /// The service does not answer.
    pub async fn pods(&self) -> Result<Vec<Pod>, ClientError> {
        self.json(Method::GET, "/v1/pods", None).await.map(|list: PodList| list.items)
    }

    /// One pod.
    ///
    /// # Errors
    /// The pod is not known ([`Problem::word`] is `not-found`), or the service does not answer.
    pub async fn pod(&self, id: &PodId) -> Result<Pod, ClientError> {
        self.json(Method::GET, &pod_path(id, ""), None).await
    }

    /// Prepares a pod.
    ///
    /// # Errors
    /// The service refuses or does not answer, or the pod could not be prepared.
    ///
    /// # Cancellation
    /// Dropping the future drops the wait only.
    pub async fn prepare(
        &self,
        id: &PodId,
        spec: &PodSpec,
        deadline: Option<Duration>,
    ) -> Result<Prepared, ClientError> {
        let query = deadline.map(|limit| format!("?deadlineSeconds={}", limit.as_secs().max(1)));
        let path = pod_path(id, &query.unwrap_or_default());
        self.json(Method::PUT, &path, Some(json(spec)?)).await
    }

    /// Starts a pod.
    ///
    /// # Errors
    /// The service refuses or does not answer, or, with `wait`, the pod did not come up.
    ///
    /// # Cancellation
    /// Dropping the future drops the wait only.
    pub async fn start(&self, id: &PodId, order: &StartOrder) -> Result<Pod, ClientError> {
        self.json(Method::POST, &pod_path(id, "/start"), Some(json(order)?)).await
    }

    /// Stops a pod, and deletes its keys here and at the KBS.
    ///
    /// # Errors
    /// The service refuses or does not answer, or the pod could not be deleted from the store.
    ///
    /// # Cancellation
    /// Dropping the future drops the wait only.
    pub async fn stop(&self, id: &PodId, force: bool) -> Result<Ended, ClientError> {
        self.end(&pod_path(id, forced(force))).await
    }

    /// The records of the store that no launcher will end, by their ids.
    ///
    /// # Errors
    /// The store cannot be read, or the service does not answer.
    pub async fn orphans(&self) -> Result<Vec<Orphan>, ClientError> {
        self.json(Method::GET, "/v1/orphans", None).await.map(|list: OrphanList| list.items)
    }

    /// Ends an orphan, as [`stop`](Self::stop) ends a pod.
    ///
    /// # Errors
    /// The pod is no orphan ([`Problem::word`] is `no-orphan`), or as [`stop`](Self::stop).
    ///
    /// # Cancellation
    /// Dropping the future drops the wait only.
    pub async fn collect(&self, id: &PodId) -> Result<Ended, ClientError> {
        self.end(&format!("/v1/orphans/{id}")).await
    }

    async fn end(&self, path: &str) -> Result<Ended, ClientError> {
        let (status, body) = self.answer(Method::DELETE, path, None).await?;
        match status {
            StatusCode::NO_CONTENT => Ok(Ended::Gone),
            _ => parse(&body).map(Ended::Deleting),
        }
    }

    /// Deletes a pod here without the KBS.
    ///
    /// # Errors
    /// As [`stop`](Self::stop).
    ///
    /// # Cancellation
    /// Dropping the future drops the wait only.
    pub async fn forget(&self, id: &PodId, force: bool) -> Result<Forgotten, ClientError> {
        let path = pod_path(id, &format!("/forget{}", forced(force)));
        self.json(Method::POST, &path, None).await
    }

    /// What happens to a pod, or to all, from now on; with `after`, the id of an event, from the one after it on.
    ///
    /// # Errors
    /// The service refuses or does not answer.
    pub async fn events(&self, pod: Option<&PodId>, after: Option<&str>) -> Result<EventReader, ClientError> {
        let path = pod.map_or_else(|| "/v1/events".to_owned(), |pod| format!("/v1/events?pod={pod}"));
        let mut request = request(Method::GET, &path, None)?;
        if let Some(after) = after {
            let id = after.parse().map_err(|_| ClientError::Foreign("the event's id".to_owned()))?;
            request.headers_mut().insert("last-event-id", id);
        }
        let (response, connection) = self.send(request).await?;
        if response.status() == StatusCode::OK {
            return Ok(EventReader::new(response.into_body(), connection));
        }
        Err(problem(&body(response).await?.1))
    }

    async fn json<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<Bytes>,
    ) -> Result<T, ClientError> {
        parse(&self.answer(method, path, body).await?.1)
    }

    async fn answer(
        &self,
        method: Method,
        path: &str,
        content: Option<Bytes>,
    ) -> Result<(StatusCode, Bytes), ClientError> {
        let (response, _connection) = self.send(request(method, path, content)?).await?;
        let (status, bytes) = body(response).await?;
        if status.is_success() { Ok((status, bytes)) } else { Err(problem(&bytes)) }
    }

    async fn send(
        &self,
        request: Request<Full<Bytes>>,
    ) -> Result<(Response<Incoming>, Connection), ClientError> {
        let unreachable = |cause: String| ClientError::Unreachable { socket: self.socket.clone(), cause };
        let connected = timeout(CONNECT, connect(&self.socket)).await;
        let stream = match connected {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) if error.kind() == io::ErrorKind::PermissionDenied => {
                return Err(ClientError::Denied(self.socket.clone()));
            }
            Ok(Err(error)) => return Err(unreachable(error.to_string())),
            Err(_) => return Err(unreachable(format!("no connection within {} s", CONNECT.as_secs()))),
        };
        let handshake = http1::Builder::new().handshake(TokioIo::new(stream)).await;
        let (mut sender, connection) = handshake.map_err(|error| lost(&error))?;
        // An error of the connection is one of the request, too.
        let connection = Connection(tokio::spawn(async move { drop(connection.await) }));
        let response = sender.send_request(request).await.map_err(|error| lost(&error))?;
        Ok((response, connection))
    }
}

/// Connects; waits while too many others wait to be accepted.
async fn connect(socket: &Path) -> io::Result<UnixStream> {
    loop {
        match UnixStream::connect(socket).await {
            // The kernel gives no notice of room.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => sleep(FULL_PAUSE).await,
            connected => return connected,
        }
    }
}

/// The task of a connection, which ends with it.
#[derive(Debug)]
struct Connection(JoinHandle<()>);

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn pod_path(id: &PodId, rest: &str) -> String {
    // The characters of an id need no escape in a path.
    format!("/v1/pods/{id}{rest}")
}

fn forced(force: bool) -> &'static str {
    if force { "?force=true" } else { "" }
}

fn lost(error: &hyper::Error) -> ClientError {
    ClientError::Lost(with_causes(error))
}

fn json(value: &impl Serialize) -> Result<Bytes, ClientError> {
    let body = serde_json::to_vec(value).map_err(|error| ClientError::Foreign(error.to_string()))?;
    Ok(body.into())
}

fn request(method: Method, path: &str, body: Option<Bytes>) -> Result<Request<Full<Bytes>>, ClientError> {
    let mut request = Request::builder().method(method).uri(path).header(HOST, "localhost");
    if body.is_some() {
        request = request.header(CONTENT_TYPE, "application/json");
    }
    let request = request.body(Full::new(body.unwrap_or_default()));
    request.map_err(|error| ClientError::Foreign(error.to_string()))
}

async fn body(response: Response<Incoming>) -> Result<(StatusCode, Bytes), ClientError> {
    let status = response.status();
    let collected = Limited::new(response.into_body(), ANSWER_MAX).collect().await;
    let bytes = collected.map_err(|error| ClientError::Lost(error.to_string()))?;
    Ok((status, bytes.to_bytes()))
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ClientError> {
    serde_json::from_slice(body).map_err(|error| ClientError::Foreign(error.to_string()))
}

fn problem(body: &[u8]) -> ClientError {
    parse(body).map_or_else(|error| error, |problem| ClientError::Problem(Box::new(problem)))
}
