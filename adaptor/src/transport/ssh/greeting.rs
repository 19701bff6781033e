//! What a server says before a login: for someone who looks for faults. Nothing of it is proven.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use russh::client::{self, Handler};
use russh::keys::PublicKeyOrCertificate;
use secure_comms_protocol::BannerHint;
use secure_comms_protocol::limits::{AUTHENTICATE, OUTBOUND_CONNECT, REKEY_BYTES};
use secure_comms_ssh::guard::{Guarded, Peer};
use secure_comms_ssh::profile::{self, KeyExchange};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::error::{ConnectError, cause};
use super::handler::lock;
use crate::text::quote;

/// A user that no agent knows: the attempt ends before anything is served, and replaces no connection.
const USER: &str = "doctor";

/// What a server says of itself before a login.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Greeting {
    /// Its banner; `None`: it has none, as servers other than agents.
    pub banner: Option<String>,
    /// What can be read from the banner.
    pub hint: BannerHint,
}

/// There is no SSH server that greets. The text is one line, and fit for a log.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct GreetingError(ConnectError);

impl GreetingError {
    /// Whether there was no TCP connection: else something listens there.
    pub fn is_unreachable(&self) -> bool {
        matches!(&self.0, ConnectError::Unreachable(_) | ConnectError::Timeout(_, TCP))
    }
}

/// What is said of an attempt that got no TCP connection in time.
const TCP: &str = "connecting";

/// Connects to an agent as far as its banner, in which it names its phase. Sends no key, and logs in as no user. It takes at
/// most the time limits of a TCP connection and of an authentication together.
///
/// # Errors
/// No TCP connection, or no SSH server there.
///
/// # Cancellation
/// Dropping the future cuts the connection.
pub async fn greeting(address: SocketAddr) -> Result<Greeting, GreetingError> {
    greet(address).await.map_err(GreetingError)
}

async fn greet(address: SocketAddr) -> Result<Greeting, ConnectError> {
    let tcp = match timeout(OUTBOUND_CONNECT, TcpStream::connect(address)).await {
        Ok(tcp) => tcp.map_err(ConnectError::Unreachable)?,
        Err(_) => return Err(ConnectError::Timeout(OUTBOUND_CONNECT.as_secs(), TCP)),
    };
    let (socket, guard) = Guarded::new(tcp, Peer::Server);
    let banner = Arc::new(Mutex::new(None));
    let listener = Listener(Arc::clone(&banner));
    let config = Arc::new(profile::client(REKEY_BYTES, KeyExchange::Any));
    let login = async {
        let mut handle = client::connect_stream(config, socket, listener).await?;
        // The banner comes before the refusal.
        handle.authenticate_none(USER).await
    };
    let ended = timeout(AUTHENTICATE, login).await;
    guard.cut();
    let banner = lock(&banner).take();
    match ended {
        // A server that closes instead of an answer has greeted as well.
        _ if banner.is_some() => {}
        Ok(Ok(_)) => {}
        Ok(Err(_)) | Err(_) if guard.not_ssh().is_some() => {
            return Err(ConnectError::NotSsh(guard.not_ssh().unwrap_or_default()));
        }
        Ok(Err(error)) => return Err(ConnectError::Protocol("SSH handshake", cause(&error))),
        Err(_) => return Err(ConnectError::Timeout(AUTHENTICATE.as_secs(), "waiting for an SSH server")),
    }
    let hint = banner.as_deref().map(BannerHint::parse).unwrap_or_default();
    Ok(Greeting { banner, hint })
}

/// Keeps the first banner.
struct Listener(Arc<Mutex<Option<String>>>);

impl Handler for Listener {
    type Error = russh::Error;

    async fn auth_banner(&mut self, banner: &str, _: &mut client::Session) -> Result<(), russh::Error> {
        lock(&self.0).get_or_insert_with(|| quote(banner.trim()));
        Ok(())
    }

    async fn check_server_key(&mut self, _: &PublicKeyOrCertificate) -> Result<bool, russh::Error> {
        // Nothing is sent that is worth a key.
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt as _;
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn a_server_that_is_not_ssh_is_named() {
        let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = server.local_addr().unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = server.accept().await.unwrap();
            stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
        });
        let error = greeting(address).await.unwrap_err();
        assert!(!error.is_unreachable() && error.to_string().contains("HTTP"), "{error}");
    }

    #[tokio::test]
    async fn a_closed_port_is_unreachable() {
        let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = server.local_addr().unwrap();
        drop(server);
        let error = greeting(address).await.unwrap_err();
        assert!(error.is_unreachable(), "{error}");
    }
}
