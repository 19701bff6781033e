//! Inbounds: where local clients of a tunnel connect.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use secure_comms_protocol::limits::{INBOUND_CLIENTS_MAX, INBOUND_WAIT, RETRY_MIN};
use secure_comms_protocol::{Bind, InboundTag, TunnelName};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout_at};

use crate::link::{Link, OpenError};
use crate::netns::{self, Namespace, NamespaceError};
use crate::relay::{RelayError, relay};
use crate::socket::Socket;

/// How long an inbound waits for its network namespace, which another service makes at boot.
const NAMESPACE_WAIT: Duration = Duration::from_secs(30);

/// Why an inbound can't listen.
#[derive(Debug, thiserror::Error)]
#[error("inbound {tag}: listening: {source}")]
pub struct BindError {
    tag: String,
    source: NamespaceError,
}

/// An inbound that listens; its clients are served by [`Inbound::serve`].
#[derive(Debug)]
pub struct Inbound {
    tag: InboundTag,
    listener: Listener,
    local: String,
}

#[derive(Debug)]
enum Listener {
    Tcp(TcpListener),
    Unix { listener: UnixListener, _unlink: UnlinkOnDrop },
}

#[derive(Debug)]
struct UnlinkOnDrop(PathBuf);

impl Drop for UnlinkOnDrop {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.0) {
            log::debug!("removing {}: {error}", self.0.display());
        }
    }
}

impl Inbound {
    /// Listens where the tag says. A network namespace that is not there yet is waited for.
    ///
    /// # Errors
    /// The address is taken, or the namespace can't be entered.
    pub async fn bind(tag: &InboundTag) -> Result<Self, BindError> {
        let error = |source| BindError { tag: tag.to_string(), source };
        let (listener, local) = match &tag.bind {
            Bind::Unix(path) => bind_unix(Path::new(path)).await.map_err(|e| error(e.into()))?,
            Bind::Tcp { namespace, port } => {
                bind_tcp(namespace.as_deref().map(Namespace::new), *port).await.map_err(error)?
            }
        };
        Ok(Self { tag: tag.clone(), listener, local })
    }

    /// The tag it was made from.
    pub fn tag(&self) -> &InboundTag {
        &self.tag
    }

    /// Where it listens: `127.0.0.1:<port>` with the real port, or the path of a unix socket.
    pub fn local(&self) -> &str {
        &self.local
    }

    /// Serves clients for ever: each waits for a link (at most [`INBOUND_WAIT`]), then gets a stream on it.
    /// Dropping the future closes the listener and every client.
    pub async fn serve<L: Link>(self, links: watch::Receiver<Option<L>>) {
        let mut clients = JoinSet::new();
        loop {
            while clients.try_join_next().is_some() {}
            if clients.len() >= INBOUND_CLIENTS_MAX {
                clients.join_next().await;
                continue;
            }
            match self.accept().await {
                Ok(socket) => {
                    clients.spawn(serve_client(self.tag.name.clone(), socket, links.clone()));
                }
                Err(error) => {
                    // Out of file descriptors, as a rule: clients that leave make room.
                    log::warn!("inbound {}: accepting a client: {error}", self.tag.name);
                    sleep(RETRY_MIN).await;
                }
            }
        }
    }

    async fn accept(&self) -> io::Result<Socket> {
        match &self.listener {
            Listener::Tcp(listener) => Socket::tcp(listener.accept().await?.0),
            Listener::Unix { listener, .. } => Ok(listener.accept().await?.0.into()),
        }
    }
}

async fn bind_tcp(namespace: Option<Namespace>, port: u16) -> Result<(Listener, String), NamespaceError> {
    let deadline = Instant::now() + NAMESPACE_WAIT;
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    loop {
        match netns::listen(namespace.as_ref(), address).await {
            Ok(listener) => {
                let local = listener.local_addr()?.to_string();
                return Ok((Listener::Tcp(listener), local));
            }
            Err(NamespaceError::Open { source, .. })
                if source.kind() == io::ErrorKind::NotFound && Instant::now() < deadline =>
            {
                sleep(RETRY_MIN).await;
            }
            Err(error) => return Err(error),
        }
    }
}

async fn bind_unix(path: &Path) -> io::Result<(Listener, String)> {
    let listener = match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            if UnixStream::connect(path).await.is_ok() {
                return Err(error);
            }
            // Nobody listens: a socket left over by a process that was killed.
            std::fs::remove_file(path)?;
            UnixListener::bind(path)?
        }
        other => other?,
    };
    let _unlink = UnlinkOnDrop(path.into());
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok((Listener::Unix { listener, _unlink }, path.display().to_string()))
}

async fn serve_client<L: Link>(name: TunnelName, socket: Socket, mut links: watch::Receiver<Option<L>>) {
    let deadline = Instant::now() + INBOUND_WAIT;
    loop {
        let usable = |link: &Option<L>| link.as_ref().is_some_and(|link| !link.is_gone());
        let link = match timeout_at(deadline, links.wait_for(usable)).await {
            Ok(Ok(link)) => link.clone(),
            Ok(Err(_)) => return socket.abort(),
            Err(_) => {
                log::warn!("inbound {name}: closing a client: no peer within {} s", INBOUND_WAIT.as_secs());
                return socket.abort();
            }
        };
        let Some(link) = link else { continue };
        match link.open(&name).await {
            Ok(stream) => return report(&name, relay(socket, stream).await),
            Err(OpenError::LinkGone) if Instant::now() < deadline => {}
            Err(OpenError::LinkGone) => return socket.abort(),
            Err(OpenError::Refused(reason)) => {
                log::warn!("inbound {name}: closing a client: the other end refused: {reason}");
                return socket.abort();
            }
        }
    }
}

/// Logs how a stream ended, if not in good order.
pub(crate) fn report(name: &TunnelName, result: Result<(), RelayError>) {
    match result {
        Ok(()) => {}
        Err(error @ RelayError::Overrun(_)) => log::error!("tunnel {name}: {error}"),
        Err(error) => log::debug!("tunnel {name}: {error}"),
    }
}
