//! Sockets in another network namespace.
//!
//! A socket stays in the namespace in which it was made, whichever thread uses it. setns(2) moves one thread only. So a
//! short-lived thread enters the namespace, makes the socket and ends; no other thread moves.

use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{self, Backlog};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::oneshot;

mod make;

pub use make::MakeError;

/// Directory of the named namespaces of `ip netns`.
pub const NAMED: &str = "/run/netns";

/// A network namespace: a name under [`NAMED`], or a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace(PathBuf);

/// Why an operation in a namespace failed.
#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    /// The namespace does not exist, or we may not open it.
    #[error("opening network namespace {path}: {cause}; is netns@podns.service running?", path = path.display())]
    Open {
        /// Path of the namespace.
        path: PathBuf,
        /// Error that caused it.
        cause: io::Error,
    },
    /// The thread could not enter the namespace.
    #[error("entering network namespace {path}: {cause}; this needs CAP_SYS_ADMIN", path = path.display())]
    Enter {
        /// Path of the namespace.
        path: PathBuf,
        /// Error that caused it.
        cause: io::Error,
    },
    /// The operation inside the namespace failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl Namespace {
    /// Namespace of this name, or at this path if `text` has a slash.
    pub fn new(text: &str) -> Self {
        Self(if text.contains('/') { PathBuf::from(text) } else { Path::new(NAMED).join(text) })
    }

    /// Path of the namespace.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Runs `make` on a thread of its own inside the namespace. If the future is dropped, `make` still runs and its
    /// result is dropped.
    ///
    /// # Errors
    /// The namespace can't be entered, or `make` failed.
    pub async fn run<T: Send + 'static>(
        &self,
        make: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> Result<T, NamespaceError> {
        let path = self.0.clone();
        on_own_thread(move || enter(&path).and_then(|()| Ok(make()?))).await
    }
}

/// Runs `job` on a thread of its own, which `job` may move to another namespace.
async fn on_own_thread<T, E>(job: impl FnOnce() -> Result<T, E> + Send + 'static) -> Result<T, E>
where
    T: Send + 'static,
    E: From<io::Error> + Send + 'static,
{
    let (done, result) = oneshot::channel();
    std::thread::Builder::new().name("netns".into()).spawn(move || {
        // The caller may have dropped its future; then the result is dropped too.
        drop(done.send(job()));
    })?;
    result.await.map_err(|_| io::Error::other("the namespace thread ended early"))?
}

fn enter(path: &Path) -> Result<(), NamespaceError> {
    let file = File::open(path).map_err(|cause| NamespaceError::Open { path: path.into(), cause })?;
    setns(file, CloneFlags::CLONE_NEWNET)
        .map_err(|errno| NamespaceError::Enter { path: path.into(), cause: errno.into() })
}

/// Listens on `address`, in `namespace` if there is one. Dropping the future closes the listener.
///
/// # Errors
/// The namespace can't be entered, or the address is in use.
pub async fn listen(
    namespace: Option<&Namespace>,
    address: SocketAddr,
) -> Result<TcpListener, NamespaceError> {
    // std's bind sets SO_REUSEADDR, so that a restart does not wait for TIME_WAIT.
    let bind = move || {
        let listener = std::net::TcpListener::bind(address)?;
        // std's queue of 128 is too short for a crowd: the kernel may reset clients that find it full. As long as the kernel allows
        // (net.core.somaxconn).
        socket::listen(&listener, Backlog::MAXALLOWABLE)?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    };
    let listener = match namespace {
        Some(namespace) => namespace.run(bind).await?,
        None => bind()?,
    };
    Ok(TcpListener::from_std(listener)?)
}

/// Connects to `address`, from `namespace` if there is one. Dropping the future stops the attempt.
///
/// # Errors
/// The namespace can't be entered, or the connect failed.
pub async fn connect(
    namespace: Option<&Namespace>,
    address: SocketAddr,
) -> Result<TcpStream, NamespaceError> {
    let make = move || if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() };
    let socket = match namespace {
        Some(namespace) => namespace.run(make).await?,
        None => make()?,
    };
    Ok(socket.connect(address).await?)
}
