//! The SSH server: one connection, from its first byte to its end.
//!
//! In: an accepted socket. Out: a peer in [`crate::peers`] while its session lasts, and a log line that says how the
//! connection ended. Together with `peers/link.rs` and the keys, the only room that names russh.

mod host_config;

mod handler;

mod session;

mod control;
mod mismatches;
mod phase;

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;

use secure_comms_protocol::limits::{AUTHENTICATE, FIRST_LINE};
use secure_comms_ssh::guard::{self, Guarded};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until, timeout, timeout_at};

use crate::access::limiter::Place;
use crate::agent::Agent;
use crate::connection::Connection;
use handler::ConnectionHandler;
use host_config::HostConfigs;

/// Serves connections.
#[derive(Debug)]
pub(crate) struct Server {
    agent: Arc<Agent>,
    configs: HostConfigs,
}

/// How a handshake ended.
enum Handshake {
    /// The client has authenticated.
    Authenticated,
    /// The session ended before.
    Ended(Result<(), russh::Error>),
    /// Neither happened within [`AUTHENTICATE`].
    TimedOut,
}

impl Server {
    /// A server for the peers of `agent`. Its sessions ask for new session keys after `rekey_bytes` bytes.
    pub(crate) fn new(agent: Arc<Agent>, rekey_bytes: usize) -> Self {
        Self { agent, configs: HostConfigs::new(rekey_bytes) }
    }

    /// Serves one connection until it ends. `id` is unique, and grows from connection to connection.
    pub(crate) async fn serve_connection(&self, socket: TcpStream, id: u64, address: SocketAddr) {
        if let Err(error) = socket.set_nodelay(true) {
            log::debug!("connection from {address}: {error}");
            return;
        }
        let (mut socket, guard) = Guarded::new(socket, guard::Peer::Client);
        let connection = Connection::new(id, address, guard);
        let deadline = Instant::now() + AUTHENTICATE;
        let place = match timeout_at(deadline, self.admit(&mut socket, &connection)).await {
            Ok(Ok(place)) => place,
            Ok(Err(error)) => return self.log_end(&connection, Err(error)),
            Err(_) => return self.log_end(&connection, Err(authentication_timeout())),
        };
        let authenticated = Arc::new(Notify::new());
        let mut session = std::pin::pin!(self.session(socket, &connection, authenticated.clone()));
        let handshake = handshake(session.as_mut(), &authenticated, deadline).await;
        // The place is for connections that have not authenticated.
        drop(place);
        let ended = match handshake {
            Handshake::Ended(ended) => ended,
            Handshake::Authenticated => until_end(session, &connection).await,
            Handshake::TimedOut => {
                let level = connection.log_level(log::Level::Info);
                log::log!(level, "connection from {address}: {}", authentication_timeout());
                connection.cut();
                session.await
            }
        };
        // Wakes everything that still waits on this connection.
        connection.cut();
        self.agent.peers.remove(id);
        self.log_end(&connection, ended);
    }

    /// Admits a connection once its client has sent its first line, or has waited [`FIRST_LINE`] for ours.
    async fn admit(&self, socket: &mut Guarded<TcpStream>, connection: &Connection) -> io::Result<Place> {
        let limits = &self.agent.limits;
        let _waiting = limits.waiting.admit_evicting(connection.clone(), None);
        if let Ok(ended) = timeout(FIRST_LINE, socket.first_line()).await {
            ended?;
        }
        tokio::select! {
            place = limits.unauthenticated.admit_fifo(connection.clone()) => Ok(place),
            () = connection.until_cut() => Err(io::ErrorKind::ConnectionAborted.into()),
        }
    }

    /// The SSH session of an admitted connection, until it ends.
    async fn session(
        &self,
        socket: Guarded<TcpStream>,
        connection: &Connection,
        authenticated: Arc<Notify>,
    ) -> Result<(), russh::Error> {
        let admission = self.agent.policy.admission();
        let config = self.configs.get(&admission);
        let handler =
            ConnectionHandler::new(self.agent.clone(), connection.clone(), &admission, authenticated);
        russh::server::run_stream(config, socket, handler).await?.await
    }

    /// Logs how a connection ended. Lines about clients that never authenticated are limited.
    fn log_end<E: std::fmt::Display>(&self, connection: &Connection, ended: Result<(), E>) {
        let level = connection.log_level(log::Level::Info);
        let silence = connection.silence();
        match ended {
            Ok(()) => log::log!(level, "connection from {}: closed{silence}", connection.address),
            Err(error) => {
                log::log!(level, "connection from {}: ended: {error}{silence}", connection.address);
            }
        }
    }
}

/// Waits until the client has authenticated, the session has ended, or the deadline has passed.
async fn handshake(
    session: Pin<&mut impl Future<Output = Result<(), russh::Error>>>,
    authenticated: &Notify,
    deadline: Instant,
) -> Handshake {
    tokio::select! {
        ended = session => Handshake::Ended(ended),
        () = authenticated.notified() => Handshake::Authenticated,
        () = sleep_until(deadline) => Handshake::TimedOut,
    }
}

/// Waits until the session of a peer has ended.
async fn until_end(
    mut session: Pin<&mut impl Future<Output = Result<(), russh::Error>>>,
    connection: &Connection,
) -> Result<(), russh::Error> {
    tokio::select! {
        ended = &mut session => ended,
        () = connection.flow_control_ended() => {
            // A peer that sends more than it was granted must not be trusted to stop.
            connection.cut();
            session.await
        }
    }
}

fn authentication_timeout() -> io::Error {
    io::Error::other(format!("did not authenticate within {} s", AUTHENTICATE.as_secs()))
}
