//! The first message of a TLS client.

use std::io;

use secure_comms_keys::text::one_line;
use tokio::net::TcpStream;
use tokio_rustls::rustls::server::{Accepted, Acceptor};

use super::hangup::reset;
use super::refusal::Refusal;

/// The longest hello, with the heads of its records, in bytes. cloud-api-adaptor's has some 1,510.
const MAX_HELLO: usize = 16 * 1024;
/// What is read at once. rustls takes as much as this in one go.
const CHUNK: usize = 4096;

/// Type of a TLS record with handshake messages (RFC 8446, 5.1).
const RECORD_HANDSHAKE: u8 = 22;
/// Where a record's head has the length of what follows it.
const RECORD_LENGTH: std::ops::Range<usize> = 3..5;
/// Where the version stands in a hello: after the record's head (5 bytes) and the message's (4). TLS 1.2 and 1.3 both have
/// 3.3 there (RFC 8446, 4.1.2), older ones less.
const HELLO_VERSION: std::ops::Range<usize> = 9..11;
/// A first record with less than this ends before the version.
const RECORD_WITH_VERSION: [u8; 2] = [0, 6];
const TLS_1_2: [u8; 2] = [3, 3];
/// A fatal alert, protocol_version (RFC 5246, 7.2), in a record that any version accepts. rustls would report the version
/// only when the handshake goes on.
const ALERT_PROTOCOL_VERSION: [u8; 7] = [21, 3, 1, 0, 2, 2, 70];

/// A complete hello.
pub(super) struct Hello {
    /// The server that the client asks for, in lower case.
    pub(super) server_name: String,
    pub(super) accepted: Accepted,
}

/// Why there is no hello.
pub(super) struct HelloFault {
    pub(super) refusal: Refusal,
    pub(super) detail: String,
    alert: Vec<u8>,
}

impl From<Refusal> for HelloFault {
    fn from(refusal: Refusal) -> Self {
        Self { refusal, detail: String::new(), alert: Vec::new() }
    }
}

impl HelloFault {
    /// Answers by an alert, or else by a reset.
    pub(super) fn answer(&self, stream: &TcpStream) {
        if self.alert.is_empty() {
            reset(stream);
        } else if let Err(error) = stream.try_write(&self.alert) {
            // The client is gone, or has not read: it has no need of an alert.
            tracing::debug!("caa front: no alert was sent: {error}");
        }
    }
}

/// Reads the hello. The caller limits the time.
pub(super) async fn read(stream: &TcpStream) -> Result<Hello, HelloFault> {
    let mut acceptor = Acceptor::default();
    let mut head = Head::default();
    let mut length = 0;
    loop {
        let mut buffer = [0; CHUNK];
        let space = buffer.get_mut(..CHUNK.min(MAX_HELLO - length)).unwrap_or_default();
        if space.is_empty() {
            return Err(Refusal::HelloTooLong.into());
        }
        let chunk = match receive(stream, space).await {
            Ok(0) => return Err(Refusal::ClosedEarly.into()),
            Ok(count) => space.get(..count).unwrap_or_default(),
            Err(error) => {
                return Err(HelloFault { detail: error.to_string(), ..Refusal::ClosedEarly.into() });
            }
        };
        length += chunk.len();
        head.check(chunk)?;
        let mut rest = chunk;
        while !rest.is_empty() {
            acceptor.read_tls(&mut rest).map_err(|error| broken(&error, Vec::new()))?;
        }
        match acceptor.accept() {
            Ok(None) => {}
            Ok(Some(accepted)) => return named(accepted),
            Err((error, mut alert)) => {
                let mut bytes = Vec::new();
                // Cannot fail: a Vec takes all.
                drop(alert.write_all(&mut bytes));
                return Err(broken(&error, bytes));
            }
        }
    }
}

fn broken(error: &dyn std::error::Error, alert: Vec<u8>) -> HelloFault {
    HelloFault { refusal: Refusal::BadHello, detail: error.to_string(), alert }
}

/// rustls accepts host names only, and makes them lower case.
fn named(accepted: Accepted) -> Result<Hello, HelloFault> {
    match accepted.client_hello().server_name() {
        Some(name) => Ok(Hello { server_name: name.to_ascii_lowercase(), accepted }),
        None => Err(Refusal::NoServerName.into()),
    }
}

async fn receive(stream: &TcpStream, space: &mut [u8]) -> io::Result<usize> {
    loop {
        stream.readable().await?;
        match stream.try_read(space) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            done => return done,
        }
    }
}

/// The first bytes of a connection.
#[derive(Default)]
struct Head {
    bytes: Vec<u8>,
}

impl Head {
    /// Refuses what is not TLS at its first byte, which may be all that comes, and TLS that is too old.
    fn check(&mut self, chunk: &[u8]) -> Result<(), HelloFault> {
        let missing = HELLO_VERSION.end.saturating_sub(self.bytes.len());
        self.bytes.extend(chunk.iter().take(missing));
        if self.bytes.first().is_some_and(|kind| *kind != RECORD_HANDSHAKE) {
            let detail = format!("it began with \"{}\"", one_line(&String::from_utf8_lossy(&self.bytes), 40));
            return Err(HelloFault { detail, ..Refusal::NotTls.into() });
        }
        let is_cut =
            self.bytes.get(RECORD_LENGTH).is_some_and(|length| length < RECORD_WITH_VERSION.as_slice());
        match self.bytes.get(HELLO_VERSION).filter(|_| !is_cut) {
            Some(version) if version < TLS_1_2.as_slice() => {
                Err(HelloFault { alert: ALERT_PROTOCOL_VERSION.to_vec(), ..Refusal::TlsVersion.into() })
            }
            _ => Ok(()),
        }
    }
}
