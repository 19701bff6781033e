//! A kata agent that records its requests and answers them.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use async_trait::async_trait;
use tokio::net::UnixListener;
use tokio::sync::watch;
use ttrpc::r#async::transport::Listener;
use ttrpc::r#async::{Server, TtrpcContext};

use crate::api::agent::{
    CheckRequest, CreateContainerRequest, CreateSandboxRequest, Empty, HealthCheckResponse,
    ReadStreamRequest, ReadStreamResponse, StatsContainerRequest, StatsContainerResponse, WriteStreamRequest,
    WriteStreamResponse,
};
use crate::api::agent_ttrpc::{AgentService, Health, create_agent_service, create_health};

/// A request as it arrived, unknown fields included.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // The methods' own names.
pub enum Request {
    CreateSandbox(CreateSandboxRequest),
    CreateContainer(CreateContainerRequest),
    StatsContainer(StatsContainerRequest),
    WriteStdin(WriteStreamRequest),
    ReadStdout(ReadStreamRequest),
    Check(CheckRequest),
}

/// A running server; its socket is removed when it is dropped. [`KataServer::stop`] ends its connections.
pub struct KataServer {
    server: Server,
    path: PathBuf,
    arrived: Arc<Arrived>,
}

/// Requests in the order of arrival.
struct Arrived(watch::Sender<Vec<Request>>);

impl KataServer {
    /// Listens on a unix socket; a stale socket at `path` is replaced, as the kata agent does.
    ///
    /// # Errors
    /// If the socket can't be bound.
    pub async fn start(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("kata server: removing {}", path.display()));
            }
            _ => {}
        }
        let listener =
            UnixListener::bind(&path).with_context(|| format!("kata server: binding {}", path.display()))?;
        let arrived = Arc::new(Arrived(watch::Sender::new(Vec::new())));
        let mut server = Server::new()
            .add_listener(Listener::from(listener))
            .register_service(create_agent_service(arrived.clone()))
            .register_service(create_health(arrived.clone()));
        server.start().await.context("kata server: starting")?;
        Ok(Self { server, path, arrived })
    }

    /// Path of the socket.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Requests so far.
    #[must_use]
    pub fn requests(&self) -> Vec<Request> {
        self.arrived.0.borrow().clone()
    }

    /// Waits for the first request, past or coming, for which `wanted` returns a value. There is no timeout.
    pub async fn wait_for<T>(&self, wanted: impl Fn(&Request) -> Option<T>) -> Option<T> {
        let mut arrived = self.arrived.0.subscribe();
        let all = arrived.wait_for(|all| all.iter().any(|request| wanted(request).is_some())).await;
        all.ok().and_then(|all| all.iter().find_map(wanted))
    }

    /// Waits for the request that made this container.
    pub async fn container(&self, id: &str) -> Option<CreateContainerRequest> {
        self.wait_for(|request| match request {
            Request::CreateContainer(request) if request.container_id == id => Some(request.clone()),
            _ => None,
        })
        .await
    }

    /// Whether a request to make this container has arrived.
    #[must_use]
    pub fn has_container(&self, id: &str) -> bool {
        let is =
            |request: &Request| matches!(request, Request::CreateContainer(made) if made.container_id == id);
        self.arrived.0.borrow().iter().any(is)
    }

    /// Ends every connection and stops listening; the socket's path is free then.
    ///
    /// # Errors
    /// If it can't be stopped.
    pub async fn stop(mut self) -> Result<()> {
        self.server.shutdown().await.context("kata server: stopping")
    }
}

impl Drop for KataServer {
    fn drop(&mut self) {
        // The socket may have been removed.
        let _ = std::fs::remove_file(&self.path);
    }
}

impl std::fmt::Debug for KataServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KataServer").field("path", &self.path).finish_non_exhaustive()
    }
}

/// Output of a container: known at each position, and different from that of other containers.
#[must_use]
pub fn output(container_id: &str, length: usize) -> Vec<u8> {
    let id = container_id.bytes().cycle().zip(0_usize..);
    // The low bytes of the position and of its 251st part, so that swapped blocks are detected.
    id.map(|(byte, at)| byte ^ at.to_le_bytes()[0] ^ (at / 251).to_le_bytes()[0]).take(length).collect()
}

impl Arrived {
    fn note(&self, request: Request) {
        self.0.send_modify(|all| all.push(request));
    }
}

#[async_trait]
impl AgentService for Arrived {
    async fn create_sandbox(
        &self,
        _context: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> ttrpc::Result<Empty> {
        self.note(Request::CreateSandbox(request));
        Ok(Empty::new())
    }

    async fn create_container(
        &self,
        _context: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> ttrpc::Result<Empty> {
        self.note(Request::CreateContainer(request));
        Ok(Empty::new())
    }

    async fn stats_container(
        &self,
        _context: &TtrpcContext,
        request: StatsContainerRequest,
    ) -> ttrpc::Result<StatsContainerResponse> {
        self.note(Request::StatsContainer(request));
        Ok(StatsContainerResponse::new())
    }

    async fn write_stdin(
        &self,
        _context: &TtrpcContext,
        request: WriteStreamRequest,
    ) -> ttrpc::Result<WriteStreamResponse> {
        let len = u32::try_from(request.data.len()).unwrap_or(u32::MAX);
        self.note(Request::WriteStdin(request));
        Ok(WriteStreamResponse { len, ..Default::default() })
    }

    async fn read_stdout(
        &self,
        _context: &TtrpcContext,
        request: ReadStreamRequest,
    ) -> ttrpc::Result<ReadStreamResponse> {
        let data = output(&request.container_id, usize::try_from(request.len).unwrap_or_default());
        self.note(Request::ReadStdout(request));
        Ok(ReadStreamResponse { data, ..Default::default() })
    }
}

#[async_trait]
impl Health for Arrived {
    async fn check(
        &self,
        _context: &TtrpcContext,
        request: CheckRequest,
    ) -> ttrpc::Result<HealthCheckResponse> {
        self.note(Request::Check(request));
        // SERVING.
        Ok(HealthCheckResponse { status: 1, ..Default::default() })
    }
}
