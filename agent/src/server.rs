//! The SSH server: one connection, from its first byte to its end.
//!
//! In: an accepted socket. Out: a peer in [`crate::peers`] while its SSH session lasts, and a log line that says how the
//! connection ended. Together with `peers/link.rs` and the keys, the only room that names russh.

mod host_config;

mod handler;

mod session;

mod control;
mod lanes;
mod mismatches;
mod phase;
mod status;
mod streams;

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;

use russh::Disconnect;
use russh::server::Handle;
use secure_comms_protocol::limits::{AUTHENTICATE, FAREWELL, FIRST_LINE};
use secure_comms_ssh::guard::{self, Guarded};
use secure_comms_ssh::profile::{KeyExchange, nothing_in_common};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};

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
    /// The SSH session ended before.
    Ended(Result<(), russh::Error>),
    /// Neither happened within [`AUTHENTICATE`].
    TimedOut,
}

impl Server {
    /// A server for the peers of `agent`. Its sessions ask for new session keys after `rekey_bytes` bytes.
    pub(crate) fn new(agent: Arc<Agent>, rekey_bytes: usize, kex: KeyExchange) -> Self {
        Self { agent, configs: HostConfigs::new(rekey_bytes, kex) }
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
        let ended = match handshake(session.as_mut(), &authenticated, deadline).await {
            Handshake::Ended(ended) => ended,
            Handshake::Authenticated => {
                // The place is for connections that have not authenticated.
                drop(place);
                until_end(session, &connection).await
            }
            Handshake::TimedOut => {
                connection.end(&authentication_timeout().to_string());
                session.await
            }
        };
        // Wakes everything that still waits on this connection.
        connection.cut();
        self.agent.peers.remove(id);
        self.log_end(&connection, ended.map_err(|error| session_fault(&error)));
        lanes::leave(&self.agent, &connection);
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
        let running = russh::server::run_stream(config, socket, handler).await?;
        connection.session_started();
        let handle = running.handle();
        tokio::pin!(running);
        let reason = tokio::select! {
            ended = &mut running => return ended,
            reason = connection.end_requested() => reason,
        };
        // A flood of connections that are evicted must not pile up here: those beyond the limit are cut.
        if let Ok(_farewell) = self.agent.limits.farewells.try_acquire() {
            tokio::select! {
                ended = &mut running => return ended,
                () = say_farewell(&handle, reason) => {}
            }
        }
        connection.cut();
        running.await
    }

    /// Logs how a connection ended. Lines about clients that never authenticated are limited.
    fn log_end<E: std::fmt::Display>(&self, connection: &Connection, ended: Result<(), E>) {
        let level = connection.log_level(log::Level::Info);
        let (address, silence) = (connection.address, connection.silence());
        match (connection.end_reason(), ended) {
            // How the SSH session ended follows from our reason.
            (Some(reason), _) => log::log!(level, "connection from {address}: ended: {reason}{silence}"),
            (None, Ok(())) => log::log!(level, "connection from {address}: closed{silence}"),
            (None, Err(error)) => log::log!(level, "connection from {address}: ended: {error}{silence}"),
        }
    }
}

/// Waits until the client has authenticated, the SSH session has ended, or the deadline has passed.
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

/// Waits until the SSH session of a peer has ended.
async fn until_end(
    mut session: Pin<&mut impl Future<Output = Result<(), russh::Error>>>,
    connection: &Connection,
) -> Result<(), russh::Error> {
    tokio::select! {
        ended = &mut session => ended,
        () = connection.flow_control_ended() => {
            // A peer that sends more than it was granted must not be trusted to stop. Without effect if flow control ended
            // because the connection was cut.
            connection.end("it sent more than it was granted");
            session.await
        }
    }
}

/// Sends SSH's disconnect message, behind everything that waits to be sent, and gives the client [`FAREWELL`] to close.
async fn say_farewell(handle: &Handle, reason: &str) {
    let disconnect = async {
        // The SSH session may have ended already.
        drop(handle.disconnect(Disconnect::ByApplication, reason.to_owned(), "en".into()).await);
        std::future::pending().await
    };
    tokio::select! {
        () = disconnect => {}
        () = sleep(FAREWELL) => {}
    }
}

/// Why an SSH session ended.
fn session_fault(error: &russh::Error) -> String {
    nothing_in_common(error, "-secure-comms-require-pq").unwrap_or_else(|| error.to_string())
}

fn authentication_timeout() -> io::Error {
    io::Error::other(format!("did not authenticate within {} s", AUTHENTICATE.as_secs()))
}
