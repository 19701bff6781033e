//! One accept loop for every simulator: it never waits for a peer, survives errors, and ends its connections on drop.

use std::future::Future;
use std::io;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::task::{JoinHandle, JoinSet};

/// Backoff after a failed `accept`, for instance without file descriptors.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);

/// A source of connections.
pub trait Listener: Send + 'static {
    /// Type of its connections.
    type Stream: Send + 'static;

    /// Waits for the next connection.
    fn accept(&mut self) -> impl Future<Output = io::Result<Self::Stream>> + Send;
}

impl Listener for TcpListener {
    type Stream = TcpStream;

    async fn accept(&mut self) -> io::Result<TcpStream> {
        let (stream, _) = TcpListener::accept(self).await?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }
}

impl Listener for UnixListener {
    type Stream = UnixStream;

    async fn accept(&mut self) -> io::Result<UnixStream> {
        Ok(UnixListener::accept(self).await?.0)
    }
}

/// A running accept loop; dropping it closes the listener and its connections.
#[derive(Debug)]
pub struct Serving(JoinHandle<()>);

impl Serving {
    /// Serves each connection of `listener` in a task of its own.
    pub fn start<L, F, Fut>(mut listener: L, serve: F) -> Self
    where
        L: Listener,
        F: Fn(L::Stream) -> Fut + Send + 'static,
        Fut: Future<Output = ()> + Send + 'static,
    {
        Self(tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                tokio::select! {
                    accepted = listener.accept() => match accepted {
                        Ok(stream) => { connections.spawn(serve(stream)); }
                        Err(_) => tokio::time::sleep(ACCEPT_BACKOFF).await,
                    },
                    // Reaped as they end, so that a long run does not collect them.
                    Some(_) = connections.join_next() => {}
                }
            }
        }))
    }

    /// Stops, and returns once the listener is closed and its port free.
    pub async fn stop(mut self) {
        self.0.abort();
        // The error is the cancellation that was requested.
        let _ = (&mut self.0).await;
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.0.abort();
    }
}
