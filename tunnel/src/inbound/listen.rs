//! The sockets of inbounds: TCP on the loopback of a network namespace, and unix sockets.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use secure_comms_protocol::limits::{RETRY_MIN, WAIT_REPEAT};
use secure_comms_protocol::{Bind, InboundTag, TunnelName};
use tokio::net::TcpListener;
use tokio::time::{Instant, sleep};

use super::unix::PrivateListener;
use crate::netns::{self, Namespace, NamespaceError};
use crate::socket::Socket;

/// Timeout for an inbound's network namespace, which another service makes at boot.
const NAMESPACE_WAIT: Duration = Duration::from_secs(30);
/// An inbound can't listen. Its text has the cause, which is therefore no source of it.
#[derive(Debug, thiserror::Error)]
#[error("inbound {tag}: listening: {cause}{}", bind_advice(.cause, *.is_path))]
pub struct BindError {
    tag: String,
    cause: NamespaceError,
    /// Whether the inbound is a unix socket.
    is_path: bool,
}

impl BindError {
    /// Whether another socket has the address.
    pub fn is_in_use(&self) -> bool {
        matches!(&self.cause, NamespaceError::Io(error) if error.kind() == io::ErrorKind::AddrInUse)
    }
}

fn bind_advice(cause: &NamespaceError, is_path: bool) -> &'static str {
    let NamespaceError::Io(error) = cause else { return "" };
    match (error.kind(), is_path) {
        (io::ErrorKind::AddrInUse, false) => {
            "; another program listens on this port: choose another one, or 0 for any that is free"
        }
        (io::ErrorKind::AddrInUse, true) => {
            "; a program listens on this path, or it is another file or another user's: choose another path"
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
    Unix(PrivateListener),
}

impl Listener {
    /// Listens at the address of the tag; returns the address in use as well.
    pub(super) async fn bind(tag: &InboundTag) -> Result<(Self, String), BindError> {
        let is_path = matches!(tag.bind, Bind::Unix(_));
        let error = |cause| BindError { tag: tag.to_string(), cause, is_path };
        match &tag.bind {
            Bind::Unix(path) => match PrivateListener::bind(Path::new(path)).await {
                Ok(listener) => Ok((Self::Unix(listener), path.clone())),
                Err(cause) => Err(error(cause.into())),
            },
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
            Self::Unix(unix) => Ok(unix.accept().await?.into()),
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
