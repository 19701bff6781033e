//! Simulates the guest components: `api-server-rest` in front, AA and CDH behind it.
//!
//! In a pod VM the front runs in the pod's network namespace, AA and CDH in the host's; they communicate over a unix
//! socket. Here too: [`Rest`] is the front, [`Cdh`] the back, [`CdhSocket`] serves the back on a unix socket. All
//! run in this process or, as roles of the binary `simulator`, in others.

mod cdh;
mod socket;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::Bytes;
use hyper::body::Incoming;
use hyper::{Request, StatusCode};
use secure_comms_tunnel::netns::{self, Namespace};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::RwLock;

use crate::accept::Serving;
use crate::http::{self, Reply, reply};
pub use cdh::{Cdh, CdhOptions};
pub use socket::CdhSocket;

/// Idle time after which the front closes a connection; its clients are local.
const HEAD_LIMIT: Duration = Duration::from_secs(30);
/// Default evidence of the guest, which the simulated KBS expects.
pub const DEFAULT_EVIDENCE: &str = "simulated evidence";
const RESOURCE: &str = "/cdh/resource/";

/// How the front reaches the back.
#[derive(Clone, Debug)]
pub enum Backend {
    /// In the same process.
    Local(Arc<Cdh>),
    /// Behind the unix socket of a [`CdhSocket`].
    Unix(PathBuf),
    /// Not HTTP of this simulator's: these bytes answer every request.
    Bytes(Arc<RwLock<Vec<u8>>>),
}

/// A running REST front, `GET /cdh/resource/<repo>/<type>/<tag>`; stops when dropped.
#[derive(Debug)]
pub struct Rest {
    addr: SocketAddr,
    _serving: Serving,
}

impl Rest {
    /// Listens on `listen` (port 0 for any free port).
    ///
    /// # Errors
    /// If the address cannot be bound.
    pub async fn start(listen: SocketAddr, backend: Backend) -> Result<Self> {
        Self::start_in(None, listen, backend).await
    }

    /// As [`Rest::start`], in a network namespace.
    ///
    /// # Errors
    /// As there, and if the namespace can't be entered.
    pub async fn start_in(
        namespace: Option<&Namespace>,
        listen: SocketAddr,
        backend: Backend,
    ) -> Result<Self> {
        let listener = netns::listen(namespace, listen).await;
        let listener = listener.with_context(|| format!("guest: binding {listen}"))?;
        let addr = listener.local_addr().context("guest: reading the bound address")?;
        let serving = Serving::start(listener, move |stream| {
            let backend = backend.clone();
            async move {
                match backend {
                    // The client may close the connection early.
                    Backend::Bytes(bytes) => drop(answer_with(&bytes, stream).await),
                    backend => {
                        http::serve(stream, HEAD_LIMIT, |request| answer(backend.clone(), request)).await;
                    }
                }
            }
        });
        Ok(Self { addr, _serving: serving })
    }

    /// Address it listens on.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }
}

async fn answer_with(bytes: &RwLock<Vec<u8>>, mut stream: TcpStream) -> Result<()> {
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        anyhow::ensure!(stream.read_buf(&mut request).await? > 0, "guest: the request has no end");
    }
    let bytes = bytes.read().await.clone();
    stream.write_all(&bytes).await?;
    Ok(stream.shutdown().await?)
}

/// With any method, and without a cause, as the real one answers.
async fn answer(backend: Backend, request: Request<Incoming>) -> Result<Reply> {
    let Some(path) = request.uri().path().strip_prefix(RESOURCE) else {
        return Ok(reply(StatusCode::NOT_FOUND, ""));
    };
    Ok(match backend.fetch(path).await {
        Ok(bytes) => reply(StatusCode::OK, bytes),
        Err(_) => reply(StatusCode::INTERNAL_SERVER_ERROR, "ttrpc request error"),
    })
}

impl Backend {
    async fn fetch(&self, path: &str) -> Result<Bytes> {
        match self {
            Self::Local(cdh) => cdh.fetch(path).await,
            Self::Unix(socket) => socket::fetch(socket, path).await,
            Self::Bytes(_) => anyhow::bail!("guest: bytes are no backend"),
        }
    }
}
