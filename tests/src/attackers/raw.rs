//! SSH packet by packet, for messages that no library would send: RFC 4253 with curve25519 and the two ciphers of the
//! profile, in either role, without checks. The caller decides every byte.

mod cipher;
mod exchange;
mod key;
pub mod message;
mod packet;
mod peer;
mod relay;
mod server;
mod state;

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, bail};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

pub use self::cipher::Keys;
use self::cipher::{Cipher, TAG};
pub use self::exchange::{Exchange, Offer};
pub use self::key::Key;
pub use self::packet::{Packet, cut, uint};
pub use self::peer::{Asked, Channel, Opened, RawPeer, Seen};
pub use self::state::{STATES, State};
use crate::harness::scene::PATIENCE;

/// Identification that it sends.
const IDENTIFICATION: &str = "SSH-2.0-Raw";

/// A connection whose packets are sent and received one by one.
pub struct Raw {
    socket: TcpStream,
    is_client: bool,
    theirs: String,
    session: Vec<u8>,
    out: Option<Cipher>,
    incoming: Option<Cipher>,
    sent: u32,
    received: u32,
    /// Sequence numbers restart with new keys, as strict key exchange demands.
    pub starts_over: bool,
}

impl std::fmt::Debug for Raw {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Raw").finish_non_exhaustive()
    }
}

impl Raw {
    fn over(socket: TcpStream, is_client: bool) -> Result<Self> {
        socket.set_nodelay(true).context("raw: the socket")?;
        Ok(Self {
            socket,
            is_client,
            theirs: String::new(),
            session: Vec::new(),
            out: None,
            incoming: None,
            sent: 0,
            received: 0,
            starts_over: true,
        })
    }

    /// Connects, and sends nothing.
    ///
    /// # Errors
    /// If the connection is refused.
    pub async fn connect(agent: SocketAddr) -> Result<Self> {
        Self::over(TcpStream::connect(agent).await.context("raw: connecting")?, true)
    }

    /// Connects from a source address of this machine.
    ///
    /// # Errors
    /// If the connection is refused.
    pub async fn connect_from(source: IpAddr, agent: SocketAddr) -> Result<Self> {
        let socket = TcpSocket::new_v4().context("raw: connecting")?;
        socket.bind((source, 0).into()).context("raw: its own address")?;
        Self::over(socket.connect(agent).await.context("raw: connecting")?, true)
    }

    /// Connects and exchanges keys.
    ///
    /// # Errors
    /// If the agent ends the connection.
    pub async fn secured(agent: SocketAddr, offer: Offer) -> Result<Self> {
        let mut raw = Self::connect(agent).await?;
        raw.identify().await?;
        raw.exchange_keys(offer).await?;
        Ok(raw)
    }

    /// Connects and authenticates as an attestation peer.
    ///
    /// # Errors
    /// If the agent refuses it.
    pub async fn attestation(agent: SocketAddr) -> Result<Self> {
        let mut raw = Self::secured(agent, Offer::default()).await?;
        raw.attest().await?;
        Ok(raw)
    }

    /// Authenticates as an attestation peer.
    ///
    /// # Errors
    /// If the agent refuses it.
    pub async fn attest(&mut self) -> Result<()> {
        self.ask_to_authenticate().await?;
        if !self.authenticate(&Packet::authenticate("attestation", "none")).await? {
            bail!("raw: user attestation is refused");
        }
        Ok(())
    }

    /// Exchanges identifications.
    ///
    /// # Errors
    /// If the other end ends the connection.
    pub async fn identify(&mut self) -> Result<()> {
        self.write(format!("{IDENTIFICATION}\r\n").as_bytes()).await?;
        self.theirs = timeout(PATIENCE, self.line()).await.context("raw: no identification")??;
        Ok(())
    }

    /// Opens the session channel with our number `ours`; returns the agent's number.
    ///
    /// # Errors
    /// If the agent refuses it.
    pub async fn open_session(&mut self, ours: u32) -> Result<u32> {
        self.send(&Packet::open("session", ours)).await?;
        let opened = self.expect(&[message::CHANNEL_OPEN_CONFIRMATION]).await?;
        uint(&opened, 5)
    }

    /// Opens the control channel with our number `ours`; returns the agent's number.
    ///
    /// # Errors
    /// If the agent refuses it.
    pub async fn open_control(&mut self, ours: u32) -> Result<u32> {
        let theirs = self.open_session(ours).await?;
        self.send(&Packet::request(theirs, "subsystem").string("secure-comms")).await?;
        self.expect(&[message::CHANNEL_SUCCESS]).await?;
        Ok(theirs)
    }

    /// Local address, as it appears in the agent's log.
    ///
    /// # Errors
    /// If the socket is closed.
    pub fn address(&self) -> Result<SocketAddr> {
        self.socket.local_addr().context("raw: its own address")
    }

    /// Sends bytes unchanged.
    ///
    /// # Errors
    /// If the other end has ended the connection.
    pub async fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.socket.write_all(bytes).await.context("raw: sending")
    }

    /// Sends a packet.
    ///
    /// # Errors
    /// If the other end has ended the connection.
    pub async fn send(&mut self, packet: &Packet) -> Result<()> {
        let bytes = self.seal(packet)?;
        self.write(&bytes).await
    }

    /// A packet as it goes over the wire.
    ///
    /// # Errors
    /// If the packet is too large to encrypt.
    pub fn seal(&mut self, packet: &Packet) -> Result<Vec<u8>> {
        let body = frame(packet.payload(), self.out.is_some())?;
        self.seal_body(u32::try_from(body.len())?, body)
    }

    /// A packet with this length, padding length, payload and padding, whether or not they fit each other.
    ///
    /// # Errors
    /// If the packet is too large to encrypt.
    pub fn seal_body(&mut self, length: u32, body: Vec<u8>) -> Result<Vec<u8>> {
        seal_body(&mut self.out, &mut self.sent, length, body)
    }

    /// The next packet's payload.
    ///
    /// # Errors
    /// If the other end has ended the connection.
    pub async fn receive(&mut self) -> Result<Vec<u8>> {
        timeout(PATIENCE, self.read_packet()).await.context("raw: no packet came")?
    }

    /// Returns the next packet with one of these message numbers, and skips others.
    ///
    /// # Errors
    /// If the other end has ended the connection, or disconnects.
    pub async fn expect(&mut self, messages: &[u8]) -> Result<Vec<u8>> {
        loop {
            let payload = self.receive().await.with_context(|| format!("waiting for one of {messages:?}"))?;
            match payload.first() {
                Some(message) if messages.contains(message) => return Ok(payload),
                Some(&message::DISCONNECT) => bail!("raw: {}", String::from_utf8_lossy(&payload)),
                _ => {}
            }
        }
    }

    /// Reads until the connection ends.
    ///
    /// # Errors
    /// If it does not end.
    pub async fn ends(&mut self) -> Result<()> {
        let mut buffer = [0; 4096];
        // An error is an end, too.
        let end = async { while matches!(self.socket.read(&mut buffer).await, Ok(1..)) {} };
        timeout(PATIENCE, end).await.context("raw: the connection stays")
    }

    /// Fills `bytes` with the bytes that arrive next, unchanged.
    ///
    /// # Errors
    /// If the connection ends before.
    pub async fn read(&mut self, bytes: &mut [u8]) -> Result<()> {
        self.socket.read_exact(bytes).await.context("raw: the other end ended the connection").map(drop)
    }

    async fn read_packet(&mut self) -> Result<Vec<u8>> {
        read_packet(&mut self.socket, &mut self.incoming, &mut self.received).await
    }

    async fn line(&mut self) -> Result<String> {
        let mut line = Vec::new();
        while !line.ends_with(b"\n") {
            line.push(self.socket.read_u8().await.context("raw: reading the identification")?);
        }
        Ok(String::from_utf8_lossy(&line).trim_end().to_owned())
    }
}

/// RFC 4253 6: padding length, payload, at least 4 bytes of padding, up to a whole block. With these ciphers the length
/// before it is not part of the blocks.
fn frame(payload: &[u8], sealed: bool) -> Result<Vec<u8>> {
    let (block, counted) = if sealed { (16, 1) } else { (8, 5) };
    let mut padding = block - (counted + payload.len()) % block;
    if padding < 4 {
        padding += block;
    }
    let mut body = vec![u8::try_from(padding)?];
    body.extend_from_slice(payload);
    body.resize(body.len() + padding, 0);
    Ok(body)
}

fn seal_body(out: &mut Option<Cipher>, sent: &mut u32, length: u32, body: Vec<u8>) -> Result<Vec<u8>> {
    let (sequence, length) = (*sent, length.to_be_bytes());
    *sent = sent.wrapping_add(1);
    match out {
        Some(out) => out.seal(sequence, length, body),
        None => Ok([&length, body.as_slice()].concat()),
    }
}

async fn read_packet<R: AsyncRead + Unpin>(
    socket: &mut R,
    incoming: &mut Option<Cipher>,
    received: &mut u32,
) -> Result<Vec<u8>> {
    const ENDED: &str = "raw: the other end ended the connection";
    let mut sealed = [0; 4];
    socket.read_exact(&mut sealed).await.context(ENDED)?;
    let sequence = *received;
    *received = received.wrapping_add(1);
    let (length, tag) = match &incoming {
        Some(incoming) => (incoming.length(sequence, sealed), TAG),
        None => (u32::from_be_bytes(sealed), 0),
    };
    let mut body = vec![0; usize::try_from(length)? + tag];
    socket.read_exact(&mut body).await.context(ENDED)?;
    if let Some(incoming) = incoming {
        body = incoming.open(sequence, sealed, body)?;
    }
    let padding = usize::from(*body.first().context("raw: an empty packet")?);
    let end = body.len().checked_sub(padding).context("raw: a packet of padding")?;
    Ok(body.get(1..end).context("raw: a packet of padding")?.to_vec())
}
