//! Serves the metrics and the probes over HTTP, to anyone who can reach the address.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{ACCEPT, ALLOW, CONTENT_TYPE};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::{Form, Metrics};
use crate::health::Health;
use crate::pods::Pods;

/// The part of the service, for its health.
const PART: &str = "metrics";
/// Connections at a time. The next one waits until one ends.
const CONNECTIONS_MAX: usize = 32;
/// Time in which the pods' threads must run a task, for them to be called alive.
const PULSE: Duration = Duration::from_secs(5);
/// Time that a connection has.
const CONNECTION_TIME: Duration = Duration::from_secs(10);
/// The largest head of a request, in bytes.
const HEAD_MAX: usize = 16 * 1024;
/// Pause after an error of bind or accept.
const PAUSE: Duration = Duration::from_secs(2);
const TEXT: &str = "text/plain; charset=utf-8";

/// Settings of the metrics.
#[derive(Clone, Debug)]
pub struct MetricsSettings {
    /// Where it listens.
    pub listen: SocketAddr,
    /// Whether there are metrics of each pod.
    pub each_pod: bool,
}

/// Serves `/metrics`, `/healthz` and `/readyz` until `stop` becomes true. If it cannot listen, the health says so, and it
/// tries again: pods need no metrics.
///
/// # Cancellation
/// Dropping the future closes the listener and every connection.
pub async fn run(
    settings: MetricsSettings,
    pods: Pods,
    health: Health,
    metrics: Metrics,
    mut stop: watch::Receiver<bool>,
) {
    let server = Arc::new(Server { each_pod: settings.each_pod, pods, health, metrics });
    tokio::select! {
        // An error means that the process ends.
        _ = stop.wait_for(|stop| *stop) => {}
        () = server.serve(settings.listen) => {}
    }
}

#[derive(Debug)]
struct Server {
    each_pod: bool,
    pods: Pods,
    health: Health,
    metrics: Metrics,
}

impl Server {
    /// Never returns.
    async fn serve(self: Arc<Self>, address: SocketAddr) {
        let listener = self.listen(address).await;
        let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let mut connections = JoinSet::new();
        loop {
            let accepted = async {
                // It is never closed.
                let permit = Arc::clone(&room).acquire_owned().await.ok()?;
                Some((permit, listener.accept().await))
            };
            tokio::select! {
                // Its end is no matter: a client that went away, or was too slow.
                Some(_) = connections.join_next() => {}
                Some((permit, accepted)) = accepted => match accepted {
                    Ok((stream, _)) => {
                        self.health.works(PART);
                        let server = Arc::clone(&self);
                        connections.spawn(async move {
                            let _permit = permit;
                            server.connection(stream).await;
                        });
                    }
                    Err(error) => {
                        self.health.fails(PART, format!("accepting: {error}; raise LimitNOFILE if it says too many open files"));
                        sleep(PAUSE).await;
                    }
                },
            }
        }
    }

    async fn listen(&self, address: SocketAddr) -> TcpListener {
        let mut last = None;
        loop {
            let error = match TcpListener::bind(address).await {
                Ok(listener) => {
                    let address = listener.local_addr().unwrap_or(address);
                    tracing::info!("metrics: listening on {address}");
                    self.health.works(PART);
                    return listener;
                }
                Err(error) => error,
            };
            let fault =
                format!("cannot listen on {address}: {error}; choose another address with metrics-listen");
            if last.as_ref() != Some(&fault) {
                tracing::error!("metrics: {fault}; retrying");
                self.health.fails(PART, fault.clone());
                last = Some(fault);
            }
            sleep(PAUSE).await;
        }
    }

    async fn connection(&self, stream: TcpStream) {
        let service =
            service_fn(async |request: Request<Incoming>| Ok::<_, Infallible>(self.answer(&request).await));
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(CONNECTION_TIME)
            .max_buf_size(HEAD_MAX)
            // A scrape is one request: a client holds no connection.
            .keep_alive(false)
            .serve_connection(TokioIo::new(stream), service);
        match timeout(CONNECTION_TIME, connection).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!("metrics: a connection ended: {error}"),
            Err(_) => tracing::debug!("metrics: a client took longer than {} s", CONNECTION_TIME.as_secs()),
        }
    }

    async fn answer(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n");
            response.headers_mut().insert(ALLOW, hyper::header::HeaderValue::from_static("GET, HEAD"));
            return response;
        }
        match request.uri().path() {
            "/metrics" => self.metrics(request),
            "/healthz" => self.liveness().await,
            "/readyz" => self.readiness(),
            _ => text(StatusCode::NOT_FOUND, "here are /metrics, /healthz and /readyz\n"),
        }
    }

    fn metrics(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        let form = Form::accepted(request.headers().get(ACCEPT).and_then(|accept| accept.to_str().ok()));
        match self.metrics.encode(form, &self.pods, self.each_pod) {
            Ok(metrics) => response(StatusCode::OK, form.content_type(), metrics),
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, &format!("{error}\n")),
        }
    }

    /// This server has a thread of its own, so its answer alone says nothing of the others.
    async fn liveness(&self) -> Response<Full<Bytes>> {
        match timeout(PULSE, self.pods.adaptor().pulse()).await {
            Ok(()) => text(StatusCode::OK, "ok\n"),
            Err(_) => {
                let fault = format!("the pods' threads have run no task for {} s\n", PULSE.as_secs());
                text(StatusCode::SERVICE_UNAVAILABLE, &fault)
            }
        }
    }

    fn readiness(&self) -> Response<Full<Bytes>> {
        let faults = self.health.faults();
        if faults.is_empty() {
            return text(StatusCode::OK, "ready\n");
        }
        let lines: String = faults.iter().map(|(part, fault)| format!("{part}: {fault}\n")).collect();
        text(StatusCode::SERVICE_UNAVAILABLE, &lines)
    }
}

fn text(status: StatusCode, text: &str) -> Response<Full<Bytes>> {
    response(status, TEXT, text.to_owned())
}

fn response(status: StatusCode, content_type: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(content_type));
    response
}
