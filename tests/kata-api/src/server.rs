//! A kata agent that records its requests and answers them, as the real one was seen to:
//!
//! - `CreateSandbox` removes the directory [`OWN_DIRECTORY`], also with its own socket in it: it goes on listening where no
//!   other client can reach it;
//! - `WaitProcess` is open until `SignalProcess`, `ReadStderr` as well, `GetOOMEvent` until `DestroySandbox`;
//! - after `DestroySandbox` it exits, and its connections end;
//! - errors have backtraces of 5 KB.

use std::collections::HashSet;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use async_trait::async_trait;
use tokio::net::UnixListener;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use ttrpc::r#async::transport::Listener;
use ttrpc::r#async::{Server, TtrpcContext};

use crate::api::agent::{
    CheckRequest, CopyFileRequest, CreateContainerRequest, CreateSandboxRequest, DestroySandboxRequest,
    Empty, GetOOMEventRequest, GuestDetailsRequest, GuestDetailsResponse, HealthCheckResponse, OOMEvent,
    ReadStreamRequest, ReadStreamResponse, RemoveContainerRequest, RemoveStaleVirtiofsShareMountsRequest,
    SignalProcessRequest, StartContainerRequest, StatsContainerRequest, StatsContainerResponse,
    WaitProcessRequest, WaitProcessResponse, WriteStreamRequest, WriteStreamResponse,
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
    CopyFile(CopyFileRequest),
    /// Another method, by its name.
    Other(&'static str),
    Check(CheckRequest),
}

/// A running server; its socket is removed when it is dropped. [`KataServer::stop`] ends its connections.
pub struct KataServer {
    stop: Option<oneshot::Sender<()>>,
    running: JoinHandle<ttrpc::Result<()>>,
    path: PathBuf,
    arrived: Arc<Arrived>,
}

/// The name of the directory that the kata agent removes when it makes a sandbox, if its socket is in it.
pub const OWN_DIRECTORY: &str = "kata-containers";
/// Bytes of the backtrace in an error.
const BACKTRACE: usize = 5 * 1024;

/// Requests in the order of arrival, and what they changed.
struct Arrived {
    all: watch::Sender<Vec<Request>>,
    own_directory: Option<PathBuf>,
    /// Containers that got a signal.
    ended: watch::Sender<HashSet<String>>,
    destroyed: watch::Sender<bool>,
}

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
        let own_directory = path.parent().filter(|directory| directory.ends_with(OWN_DIRECTORY));
        let arrived = Arc::new(Arrived {
            all: watch::Sender::default(),
            own_directory: own_directory.map(Path::to_owned),
            ended: watch::Sender::default(),
            destroyed: watch::Sender::default(),
        });
        let mut server = Server::new()
            .add_listener(Listener::from(listener))
            .register_service(create_agent_service(arrived.clone()))
            .register_service(create_health(arrived.clone()));
        server.start().await.context("kata server: starting")?;
        let (stop, stopped) = oneshot::channel();
        let mut destroyed = arrived.destroyed.subscribe();
        let running = tokio::spawn(async move {
            tokio::select! {
                // Either way it stops; the sender may be gone.
                _ = stopped => {}
                _ = destroyed.wait_for(|destroyed| *destroyed) => {}
            }
            server.shutdown().await
        });
        Ok(Self { stop: Some(stop), running, path, arrived })
    }

    /// Path of the socket.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Requests so far.
    #[must_use]
    pub fn requests(&self) -> Vec<Request> {
        self.arrived.all.borrow().clone()
    }

    /// Waits for the first request, past or coming, for which `wanted` returns a value. There is no timeout.
    pub async fn wait_for<T>(&self, wanted: impl Fn(&Request) -> Option<T>) -> Option<T> {
        let mut arrived = self.arrived.all.subscribe();
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
        self.arrived.all.borrow().iter().any(is)
    }

    /// Ends every connection and stops listening; the socket's path is free then.
    ///
    /// # Errors
    /// If it can't be stopped.
    pub async fn stop(mut self) -> Result<()> {
        drop(self.stop.take());
        self.exited().await
    }

    /// Waits until it has exited, after `DestroySandbox`. There is no timeout.
    ///
    /// # Errors
    /// If it did not exit in good order.
    pub async fn exited(&mut self) -> Result<()> {
        (&mut self.running).await?.context("kata server: stopping")
    }
}

impl Drop for KataServer {
    fn drop(&mut self) {
        self.running.abort();
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
        self.all.send_modify(|all| all.push(request));
    }

    fn other(&self, method: &'static str) -> ttrpc::Result<Empty> {
        self.note(Request::Other(method));
        Ok(Empty::new())
    }

    fn needs_container(&self, id: &str) -> ttrpc::Result<()> {
        let is =
            |request: &Request| matches!(request, Request::CreateContainer(made) if made.container_id == id);
        if self.all.borrow().iter().any(is) { Ok(()) } else { Err(failure(&format!("no container {id}"))) }
    }

    async fn ended(&self, id: &str) -> ttrpc::Result<()> {
        let mut ended = self.ended.subscribe();
        ended
            .wait_for(|ended| ended.contains(id))
            .await
            .map(drop)
            .map_err(|error| failure(&error.to_string()))
    }
}

/// An error as the kata agent sends it.
fn failure(text: &str) -> ttrpc::Error {
    let text = format!("{text}\n\nStack backtrace:\n{}", "   0: kata_agent::rpc\n".repeat(BACKTRACE / 20));
    ttrpc::Error::RpcStatus(ttrpc::get_status(ttrpc::Code::INTERNAL, text))
}

#[async_trait]
impl AgentService for Arrived {
    async fn create_sandbox(
        &self,
        _context: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> ttrpc::Result<Empty> {
        self.note(Request::CreateSandbox(request));
        if let Some(directory) = &self.own_directory {
            match std::fs::remove_dir_all(directory) {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(failure(&error.to_string())),
                _ => {}
            }
        }
        Ok(Empty::new())
    }

    async fn destroy_sandbox(
        &self,
        _context: &TtrpcContext,
        _request: DestroySandboxRequest,
    ) -> ttrpc::Result<Empty> {
        let answer = self.other("DestroySandbox");
        self.destroyed.send_replace(true);
        answer
    }

    async fn get_guest_details(
        &self,
        _context: &TtrpcContext,
        _request: GuestDetailsRequest,
    ) -> ttrpc::Result<GuestDetailsResponse> {
        self.note(Request::Other("GetGuestDetails"));
        Ok(GuestDetailsResponse { mem_block_size_bytes: 1 << 27, ..Default::default() })
    }

    async fn copy_file(&self, _context: &TtrpcContext, request: CopyFileRequest) -> ttrpc::Result<Empty> {
        self.note(Request::CopyFile(request));
        Ok(Empty::new())
    }

    async fn start_container(
        &self,
        _context: &TtrpcContext,
        request: StartContainerRequest,
    ) -> ttrpc::Result<Empty> {
        self.needs_container(&request.container_id)?;
        self.other("StartContainer")
    }

    async fn remove_container(
        &self,
        _context: &TtrpcContext,
        request: RemoveContainerRequest,
    ) -> ttrpc::Result<Empty> {
        self.needs_container(&request.container_id)?;
        self.other("RemoveContainer")
    }

    async fn signal_process(
        &self,
        _context: &TtrpcContext,
        request: SignalProcessRequest,
    ) -> ttrpc::Result<Empty> {
        self.needs_container(&request.container_id)?;
        let answer = self.other("SignalProcess");
        self.ended.send_modify(|ended| ended.extend([request.container_id]));
        answer
    }

    async fn wait_process(
        &self,
        _context: &TtrpcContext,
        request: WaitProcessRequest,
    ) -> ttrpc::Result<WaitProcessResponse> {
        self.note(Request::Other("WaitProcess"));
        self.ended(&request.container_id).await?;
        Ok(WaitProcessResponse { status: 137, ..Default::default() })
    }

    async fn get_oom_event(
        &self,
        _context: &TtrpcContext,
        _request: GetOOMEventRequest,
    ) -> ttrpc::Result<OOMEvent> {
        self.note(Request::Other("GetOOMEvent"));
        // The result does not matter: both mean that there will be no event.
        let _ = self.destroyed.subscribe().wait_for(|destroyed| *destroyed).await;
        Err(failure("no more events"))
    }

    async fn remove_stale_virtiofs_share_mounts(
        &self,
        _context: &TtrpcContext,
        _request: RemoveStaleVirtiofsShareMountsRequest,
    ) -> ttrpc::Result<Empty> {
        self.other("RemoveStaleVirtiofsShareMounts")
    }

    async fn read_stderr(
        &self,
        _context: &TtrpcContext,
        request: ReadStreamRequest,
    ) -> ttrpc::Result<ReadStreamResponse> {
        self.note(Request::Other("ReadStderr"));
        self.ended(&request.container_id).await?;
        Err(failure("reading stderr: eof"))
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
