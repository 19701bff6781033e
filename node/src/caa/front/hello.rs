//! The first message of a TLS client, read piece by piece. Does no I/O.

use secure_comms_keys::text::one_line;
use tokio_rustls::rustls::server::{Accepted, Acceptor};

use super::refusal::Refusal;

/// The longest hello, with the heads of its records, in bytes. cloud-api-adaptor's has some 1,510.
pub(super) const MAX_HELLO: usize = 16 * 1024;
/// The largest piece, in bytes. rustls takes as much as this in one go.
pub(super) const CHUNK: usize = 4096;

/// Type of a TLS record with handshake messages (RFC 8446, 5.1), and of a hello among these (RFC 8446, 4).
const RECORD_HANDSHAKE: u8 = 22;
const CLIENT_HELLO: u8 = 1;
/// What is looked at before rustls: the head of the first record (5 bytes), and in it the head of the message (4 bytes) and
/// its version. TLS 1.2 and 1.3 both have 3.3 there (RFC 8446, 4.1.2), older ones less.
const HEAD: usize = 11;
const RECORD_HEAD: usize = 5;
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
    /// What the client is sent before the end; empty: nothing, and the connection is reset.
    pub(super) alert: Vec<u8>,
}

impl From<Refusal> for HelloFault {
    fn from(refusal: Refusal) -> Self {
        Self { refusal, detail: String::new(), alert: Vec::new() }
    }
}

/// Reads one hello. What becomes of it does not depend on how its bytes are split.
#[derive(Default)]
pub(super) struct HelloReader {
    /// The first bytes, up to [`HEAD`].
    head: Vec<u8>,
    acceptor: Acceptor,
    length: usize,
}

impl HelloReader {
    /// The longest piece that it takes next, in bytes; never 0 while it wants more.
    pub(super) fn room(&self) -> usize {
        CHUNK.min(MAX_HELLO.saturating_sub(self.length))
    }

    /// Takes the next bytes, as many as it has room for at most. `None`: it wants more; after any other result it is of no
    /// more use.
    ///
    /// # Errors
    /// This will be no hello.
    pub(super) fn take(&mut self, piece: &[u8]) -> Result<Option<Hello>, HelloFault> {
        self.length += piece.len();
        let missing = HEAD.saturating_sub(self.head.len());
        let (head, rest) = piece.split_at(missing.min(piece.len()));
        if missing > 0 {
            self.head.extend_from_slice(head);
            check_first(&self.head)?;
            // rustls would find other faults first, if it had the bytes one by one.
            let Ok(head) = <[u8; HEAD]>::try_from(self.head.as_slice()) else { return Ok(None) };
            check_version(head)?;
            self.feed(&head)?;
        }
        self.feed(rest)?;
        match self.acceptor.accept() {
            Ok(None) if self.room() == 0 => Err(Refusal::HelloTooLong.into()),
            Ok(None) => Ok(None),
            Ok(Some(accepted)) => named(accepted).map(Some),
            Err((error, mut alert)) => {
                let mut bytes = Vec::new();
                // Cannot fail: a Vec takes all.
                drop(alert.write_all(&mut bytes));
                Err(broken(&error, bytes))
            }
        }
    }

    fn feed(&mut self, mut bytes: &[u8]) -> Result<(), HelloFault> {
        while !bytes.is_empty() {
            self.acceptor.read_tls(&mut bytes).map_err(|error| broken(&error, Vec::new()))?;
        }
        Ok(())
    }
}

/// Refuses what is not TLS at its first byte, which may be all that comes.
fn check_first(head: &[u8]) -> Result<(), HelloFault> {
    if head.first().is_some_and(|kind| *kind != RECORD_HANDSHAKE) {
        let detail = format!("it began with \"{}\"", one_line(&String::from_utf8_lossy(head), 40));
        return Err(HelloFault { detail, ..Refusal::NotTls.into() });
    }
    Ok(())
}

/// Refuses TLS that is too old, if the first record is long enough to have the version.
fn check_version(head: [u8; HEAD]) -> Result<(), HelloFault> {
    let [_, _, _, high, low, kind, _, _, _, version @ ..] = head;
    let is_whole = usize::from(u16::from_be_bytes([high, low])) >= HEAD - RECORD_HEAD;
    if is_whole && kind == CLIENT_HELLO && version < TLS_1_2 {
        return Err(HelloFault { alert: ALERT_PROTOCOL_VERSION.to_vec(), ..Refusal::TlsVersion.into() });
    }
    Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hello_in_records_of_a_few_bytes_is_read() {
        // The first byte says how the fuzz target splits the rest.
        for [_, hello @ ..] in [
            include_bytes!("../../../../fuzz/corpus/client_hello/first-record-of-1-byte"),
            include_bytes!("../../../../fuzz/corpus/client_hello/first-record-of-3-bytes"),
        ] {
            let read = HelloReader::default().take(hello).ok().flatten().unwrap();
            assert_eq!(read.server_name, "podvm-web-0-aaaaaaaa");
        }
    }
}
