//! The sockets of inbounds: TCP on the loopback of a network namespace, and unix sockets.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use secure_comms_protocol::limits::{RETRY_MIN, WAIT_REPEAT};
use secure_comms_protocol::{Bind, InboundTag, TunnelName};
use tokio::net::{TcpListener, UnixListener, UnixSocket, UnixStream};
use tokio::time::{Instant, sleep};

use crate::netns::{self, Namespace, NamespaceError};
use crate::socket::Socket;

/// Timeout for an inbound's network namespace, which another service makes at boot.
const NAMESPACE_WAIT: Duration = Duration::from_secs(30);
/// Clients of a unix socket that may wait to be accepted; std uses the same number for TCP.
const BACKLOG: u32 = 128;

/// An inbound can't listen. Its text has the cause, which is therefore no source of it.
#[derive(Debug, thiserror::Error)]
#[error("inbound {tag}: listening: {cause}{}", bind_advice(.cause, *.is_path))]
pub struct BindError {
    tag: String,
    cause: NamespaceError,
    /// Whether the inbound is a unix socket.
    is_path: bool,
}

fn bind_advice(cause: &NamespaceError, is_path: bool) -> &'static str {
    let NamespaceError::Io(error) = cause else { return "" };
    match (error.kind(), is_path) {
        (io::ErrorKind::AddrInUse, false) => {
            "; another program listens on this port: choose another one, or 0 for any that is free"
        }
        (io::ErrorKind::AddrInUse, true) => {
            "; a program listens on this path, or it is another file: choose another path"
        }
        (io::ErrorKind::NotFound, true) => "; make its directory",
        (io::ErrorKind::PermissionDenied, true) => "; choose a directory that this user may write to",
        (io::ErrorKind::PermissionDenied, false) => "; choose a port above 1023, or run as root",
        _ => "",
    }
}

/// A listening socket.
#[derive(Debug)]
pub(super) enum Listener {
    Tcp(TcpListener),
    /// Dropped in this order. While the listener exists, no other process takes the path for a stale socket; otherwise
    /// we could remove the new socket of another process.
    Unix {
        _unlink: UnlinkOnDrop,
        listener: UnixListener,
    },
}

/// Removes the path of a unix socket.
#[derive(Debug)]
pub(super) struct UnlinkOnDrop(PathBuf);

impl Drop for UnlinkOnDrop {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.0) {
            log::debug!("removing {}: {error}", self.0.display());
        }
    }
}

impl Listener {
    /// Listens at the address of the tag; returns the address in use as well.
    pub(super) async fn bind(tag: &InboundTag) -> Result<(Self, String), BindError> {
        let is_path = matches!(tag.bind, Bind::Unix(_));
        let error = |cause| BindError { tag: tag.to_string(), cause, is_path };
        match &tag.bind {
            Bind::Unix(path) => bind_unix(Path::new(path)).await.map_err(|e| error(e.into())),
            Bind::Tcp { namespace, port } => {
                let namespace = namespace.as_deref().map(Namespace::new);
                bind_tcp(&tag.name, namespace, *port).await.map_err(error)
            }
        }
    }

    /// Accepts a client. Cancellation safe.
    pub(super) async fn accept(&self) -> io::Result<Socket> {
        match self {
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                Socket::tcp(stream).map_err(|_| io::ErrorKind::ConnectionAborted.into())
            }
            Self::Unix { listener, .. } => Ok(listener.accept().await?.0.into()),
        }
    }
}

async fn bind_tcp(
    name: &TunnelName,
    namespace: Option<Namespace>,
    port: u16,
) -> Result<(Listener, String), NamespaceError> {
    let deadline = Instant::now() + NAMESPACE_WAIT;
    let mut next_report = Instant::now();
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    loop {
        match netns::listen(namespace.as_ref(), address).await {
            Ok(listener) => {
                let local = listener.local_addr()?.to_string();
                return Ok((Listener::Tcp(listener), local));
            }
            Err(error) if namespace.is_some() && not_yet(&error) && Instant::now() < deadline => {
                if Instant::now() >= next_report {
                    let left = deadline.saturating_duration_since(Instant::now()).as_secs();
                    log::warn!("inbound {name}: waiting for network namespace, {left} s left: {error}");
                    next_report = Instant::now() + WAIT_REPEAT;
                }
                sleep(RETRY_MIN).await;
            }
            Err(error) => return Err(error),
        }
    }
}

/// Whether a namespace is still being made: its file does not exist, nothing is mounted on its file (`ip netns add`
/// takes two steps), or its `lo` is not up.
fn not_yet(error: &NamespaceError) -> bool {
    match error {
        NamespaceError::Open { cause, .. } => cause.kind() == io::ErrorKind::NotFound,
        NamespaceError::Enter { cause, .. } => cause.kind() == io::ErrorKind::InvalidInput,
        NamespaceError::Io(source) => source.kind() == io::ErrorKind::AddrNotAvailable,
    }
}

async fn bind_unix(path: &Path) -> io::Result<(Listener, String)> {
    let mut socket = UnixSocket::new_stream()?;
    if let Err(error) = socket.bind(path) {
        if error.kind() != io::ErrorKind::AddrInUse || !is_stale(path).await {
            return Err(error);
        }
        std::fs::remove_file(path)?;
        socket = UnixSocket::new_stream()?;
        socket.bind(path)?;
    }
    let unlink = UnlinkOnDrop(path.into());
    // Before the socket listens, so that no other user can connect first.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    let listener = socket.listen(BACKLOG)?;
    Ok((Listener::Unix { _unlink: unlink, listener }, path.display().to_string()))
}

/// Whether `path` is the socket of a process that was killed. No other file may be removed.
async fn is_stale(path: &Path) -> bool {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|file| file.file_type().is_socket());
    // Any other error (a full backlog, no permission) means that a process listens.
    let refused = |error: io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
    is_socket && UnixStream::connect(path).await.is_err_and(refused)
}
