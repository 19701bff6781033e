//! Inbounds: the listening side of tunnels, to which local clients connect.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use secure_comms_protocol::limits::{
    CHANNEL_OPEN, INBOUND_CLIENTS_MAX, INBOUND_WAIT, RETRY_MIN, WAIT_REPEAT,
};
use secure_comms_protocol::{Bind, InboundTag, TunnelName};
use tokio::net::{TcpListener, UnixListener, UnixSocket, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

use crate::backoff::Backoff;
use crate::link::{Link, OpenError, Stream};
use crate::netns::{self, Namespace, NamespaceError};
use crate::relay::{relay, report};
use crate::reminder::Reminder;
use crate::socket::Socket;

/// Timeout for an inbound's network namespace, which another service makes at boot.
const NAMESPACE_WAIT: Duration = Duration::from_secs(30);
/// Clients of a unix socket that may wait to be accepted; std uses the same number for TCP.
const BACKLOG: u32 = 128;

/// Reports an inbound that a panic ends: its port is closed from then on, and the process may live on.
struct PanicReport<'a>(&'a TunnelName);

impl Drop for PanicReport<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            log::error!("inbound {}: closed by a panic; restart the program, and report the bug", self.0);
        }
    }
}

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

/// A listening inbound; [`Inbound::serve`] serves its clients.
#[derive(Debug)]
pub struct Inbound {
    tag: InboundTag,
    listener: Listener,
    local: String,
}

#[derive(Debug)]
enum Listener {
    Tcp(TcpListener),
    /// Dropped in this order. While the listener exists, no other process takes the path for a stale socket; otherwise
    /// we could remove the new socket of another process.
    Unix {
        _unlink: UnlinkOnDrop,
        listener: UnixListener,
    },
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
    /// Listens at the address of the tag. Waits up to 30 s for a network namespace that does not exist yet.
    ///
    /// Dropping the future closes the listener.
    ///
    /// # Errors
    /// The address is in use, or the namespace can't be entered.
    pub async fn bind(tag: &InboundTag) -> Result<Self, BindError> {
        let is_path = matches!(tag.bind, Bind::Unix(_));
        let error = |cause| BindError { tag: tag.to_string(), cause, is_path };
        let (listener, local) = match &tag.bind {
            Bind::Unix(path) => bind_unix(Path::new(path)).await.map_err(|e| error(e.into()))?,
            Bind::Tcp { namespace, port } => {
                let namespace = namespace.as_deref().map(Namespace::new);
                bind_tcp(&tag.name, namespace, *port).await.map_err(error)?
            }
        };
        Ok(Self { tag: tag.clone(), listener, local })
    }

    /// Tag of the inbound.
    pub fn tag(&self) -> &InboundTag {
        &self.tag
    }

    /// Address of the listener: `127.0.0.1:<port>` with the port in use, or the path of a unix socket.
    pub fn local(&self) -> &str {
        &self.local
    }

    /// Serves clients; never returns. Each client waits up to [`INBOUND_WAIT`] for a link, then gets a stream on it.
    /// Dropping the future closes the listener and every client.
    pub async fn serve<L: Link>(self, links: watch::Receiver<Option<L>>) {
        let name = &self.tag.name;
        let _report = PanicReport(name);
        let mut clients = JoinSet::new();
        let waiting = Arc::new(AtomicBool::new(false));
        // A fault is logged when it starts, changes and ends, not for every client.
        let (mut unserved, mut failing) = (String::new(), None);
        loop {
            let room = clients.len() < INBOUND_CLIENTS_MAX;
            tokio::select! {
                Some(ended) = clients.join_next() => {
                    let now = match ended {
                        Ok(Ended::Served) => String::new(),
                        Ok(Ended::Unserved(reason)) => reason,
                        Ok(Ended::Left) => continue,
                        // Nothing else ends a task that is not aborted.
                        Err(panic) => {
                            log::error!("inbound {name}: serving a client: {panic}; report the bug");
                            continue;
                        }
                    };
                    if now != unserved {
                        match now.as_str() {
                            "" => log::info!("inbound {name}: recovered, clients are served"),
                            reason => log::warn!("inbound {name}: closing a client: {reason}"),
                        }
                        unserved = now;
                    }
                }
                accepted = self.accept(), if room => match accepted {
                    Ok(socket) => {
                        failing = None;
                        let client = serve_client(name.clone(), socket, links.clone(), waiting.clone());
                        clients.spawn(client);
                    }
                    // The client reset its connection; other clients are not affected.
                    Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                    Err(error) => {
                        // Usually out of file descriptors; clients that leave free some.
                        if failing.replace(error.kind()) != Some(error.kind()) {
                            log::warn!("inbound {name}: accepting a client: {error}");
                        }
                        sleep(RETRY_MIN).await;
                    }
                }
            }
        }
    }

    async fn accept(&self) -> io::Result<Socket> {
        match &self.listener {
            Listener::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                Socket::tcp(stream).map_err(|_| io::ErrorKind::ConnectionAborted.into())
            }
            Listener::Unix { listener, .. } => Ok(listener.accept().await?.0.into()),
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

/// How serving a client ended.
enum Ended {
    /// The client had a stream.
    Served,
    /// The client left before it had a stream.
    Left,
    /// The client was closed without a stream; with the reason.
    Unserved(String),
}

/// Serves one client: waits for a stream, and relays. Of the clients of an inbound that wait for long, the first one says so, every [`WAIT_REPEAT`] again;
/// `waiting` is set until one has a stream.
async fn serve_client<L: Link>(
    name: TunnelName,
    socket: Socket,
    mut links: watch::Receiver<Option<L>>,
    waiting: Arc<AtomicBool>,
) -> Ended {
    let linked = AtomicBool::new(false);
    let opened = {
        let opening = open_stream(&name, &socket, &mut links, &linked);
        tokio::pin!(opening);
        let (mut reminder, mut reports) = (Reminder::start(), false);
        loop {
            tokio::select! {
                opened = &mut opening => break opened,
                () = reminder.due() => {}
            }
            reports = reports || !waiting.swap(true, Ordering::Relaxed);
            if reports {
                let (what, limit) = match linked.load(Ordering::Relaxed) {
                    true => ("the other end to reach its server", CHANNEL_OPEN),
                    false => ("a peer", INBOUND_WAIT),
                };
                let left = limit.saturating_sub(reminder.waited()).as_secs();
                log::info!("inbound {name}: a client waits for {what}, {left} s left");
            }
        }
    };
    match opened {
        Ok(stream) => {
            waiting.store(false, Ordering::Relaxed);
            report(&name, relay(socket, stream).await);
            Ended::Served
        }
        Err(ended) => ended,
    }
}

/// Waits for a link, which sets `linked`, and opens a stream on it. A lost link is retried until the deadline.
async fn open_stream<L: Link>(
    name: &TunnelName,
    socket: &Socket,
    links: &mut watch::Receiver<Option<L>>,
    linked: &AtomicBool,
) -> Result<Stream<L::Receiver, L::Sender>, Ended> {
    let deadline = Instant::now() + INBOUND_WAIT;
    let mut backoff = Backoff::default();
    loop {
        let usable = |link: &Option<L>| link.as_ref().is_some_and(|link| !link.is_gone());
        let link = tokio::select! {
            biased;
            link = links.wait_for(usable) => link.ok().and_then(|link| link.clone()),
            // A client that has left frees its place among the clients.
            () = socket.client_gone() => return Err(Ended::Left),
            () = sleep_until(deadline) => {
                return Err(Ended::Unserved(format!("no peer within {} s", INBOUND_WAIT.as_secs())));
            }
        };
        // None: the sender of links is gone, so no link will arrive.
        let Some(link) = link else { return Err(Ended::Unserved("shutting down".into())) };
        linked.store(true, Ordering::Relaxed);
        let opened = tokio::select! {
            biased;
            opened = link.open(name) => opened,
            _ = socket.failed() => return Err(Ended::Left),
        };
        match opened {
            Ok(stream) => return Ok(stream),
            Err(OpenError::Refused(reason)) => {
                return Err(Ended::Unserved(format!("the other end refused: {reason}")));
            }
            Err(OpenError::LinkGone) if Instant::now() >= deadline => {
                return Err(Ended::Unserved("the connection to the peer was lost".into()));
            }
            // Retry on a newer link, or on this one after a pause: it may not have noticed yet that it is gone.
            Err(OpenError::LinkGone) => tokio::select! {
                Ok(()) = links.changed() => {}
                () = backoff.pause() => {}
            },
        }
    }
}
