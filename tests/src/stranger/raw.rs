//! SSH packet by packet, for what no client library would send: RFC 4253 with curve25519 and AES-256-GCM, checking nothing.

use std::net::SocketAddr;

use anyhow::{Context, Result, anyhow, bail};
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use ring::agreement::{EphemeralPrivateKey, UnparsedPublicKey, X25519, agree_ephemeral};
use ring::digest::{SHA256, digest};
use ring::rand::SystemRandom;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::scene::PATIENCE;

/// Message numbers (RFC 4250 4.1).
pub mod message {
    /// SSH_MSG_DISCONNECT.
    pub const DISCONNECT: u8 = 1;
    /// SSH_MSG_SERVICE_REQUEST.
    pub const SERVICE_REQUEST: u8 = 5;
    /// SSH_MSG_SERVICE_ACCEPT.
    pub const SERVICE_ACCEPT: u8 = 6;
    /// SSH_MSG_KEXINIT.
    pub const KEXINIT: u8 = 20;
    /// SSH_MSG_NEWKEYS.
    pub const NEWKEYS: u8 = 21;
    /// SSH_MSG_KEX_ECDH_INIT.
    pub const KEX_ECDH_INIT: u8 = 30;
    /// SSH_MSG_KEX_ECDH_REPLY.
    pub const KEX_ECDH_REPLY: u8 = 31;
    /// SSH_MSG_USERAUTH_REQUEST.
    pub const USERAUTH_REQUEST: u8 = 50;
    /// SSH_MSG_USERAUTH_FAILURE.
    pub const USERAUTH_FAILURE: u8 = 51;
    /// SSH_MSG_USERAUTH_SUCCESS.
    pub const USERAUTH_SUCCESS: u8 = 52;
    /// SSH_MSG_GLOBAL_REQUEST.
    pub const GLOBAL_REQUEST: u8 = 80;
    /// SSH_MSG_REQUEST_SUCCESS.
    pub const REQUEST_SUCCESS: u8 = 81;
    /// SSH_MSG_REQUEST_FAILURE.
    pub const REQUEST_FAILURE: u8 = 82;
    /// SSH_MSG_CHANNEL_OPEN.
    pub const CHANNEL_OPEN: u8 = 90;
    /// SSH_MSG_CHANNEL_OPEN_CONFIRMATION.
    pub const CHANNEL_OPEN_CONFIRMATION: u8 = 91;
    /// SSH_MSG_CHANNEL_OPEN_FAILURE.
    pub const CHANNEL_OPEN_FAILURE: u8 = 92;
    /// SSH_MSG_CHANNEL_DATA.
    pub const CHANNEL_DATA: u8 = 94;
    /// SSH_MSG_CHANNEL_REQUEST.
    pub const CHANNEL_REQUEST: u8 = 98;
    /// SSH_MSG_CHANNEL_SUCCESS.
    pub const CHANNEL_SUCCESS: u8 = 99;
    /// SSH_MSG_CHANNEL_FAILURE.
    pub const CHANNEL_FAILURE: u8 = 100;
}

/// The algorithms that a client offers.
#[derive(Clone, Copy, Debug)]
pub struct Offer {
    /// Key exchange, and the markers that go with it.
    pub kex: &'static str,
    /// Ciphers, both ways.
    pub ciphers: &'static str,
    /// Compression, both ways.
    pub compression: &'static str,
}

impl Default for Offer {
    fn default() -> Self {
        Self {
            kex: "curve25519-sha256,kex-strict-c-v00@openssh.com",
            ciphers: "aes256-gcm@openssh.com",
            compression: "none",
        }
    }
}

/// A message under construction: its number, then its fields (RFC 4251 5).
#[derive(Clone)]
pub struct Packet(Vec<u8>);

impl std::fmt::Debug for Packet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Packet({})", self.0.escape_ascii())
    }
}

impl Packet {
    /// Begins one.
    #[must_use]
    pub fn new(message: u8) -> Self {
        Self(vec![message])
    }

    /// Adds a byte or a boolean.
    #[must_use]
    pub fn byte(mut self, byte: u8) -> Self {
        self.0.push(byte);
        self
    }

    /// Adds a uint32.
    #[must_use]
    pub fn uint(mut self, value: u32) -> Self {
        self.0.extend_from_slice(&value.to_be_bytes());
        self
    }

    /// Adds a string.
    #[must_use]
    pub fn string(mut self, text: impl AsRef<[u8]>) -> Self {
        string(&mut self.0, text.as_ref());
        self
    }

    /// Adds bytes as they are.
    #[must_use]
    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// CHANNEL_OPEN of this type, for the channel `id` of ours; what the type needs is to be added.
    #[must_use]
    pub fn open(kind: &str, id: u32) -> Self {
        Self::new(message::CHANNEL_OPEN).string(kind).uint(id).uint(1 << 20).uint(1 << 15)
    }

    /// GLOBAL_REQUEST that wants a reply; what it needs is to be added.
    #[must_use]
    pub fn global(name: &str) -> Self {
        Self::new(message::GLOBAL_REQUEST).string(name).byte(1)
    }

    /// CHANNEL_REQUEST on the agent's channel `id` that wants a reply; what it needs is to be added.
    #[must_use]
    pub fn request(id: u32, name: &str) -> Self {
        Self::new(message::CHANNEL_REQUEST).uint(id).string(name).byte(1)
    }
}

fn string(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(&u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_be_bytes());
    out.extend_from_slice(bytes);
}

/// One direction's cipher.
struct Cipher {
    key: LessSafeKey,
    nonce: [u8; 12],
}

impl Cipher {
    /// RFC 5647 7.1: the last eight bytes count.
    fn next(&mut self) -> Nonce {
        let now = self.nonce;
        let (_, counter) = self.nonce.split_at_mut(4);
        for byte in counter.iter_mut().rev() {
            *byte = byte.wrapping_add(1);
            if *byte != 0 {
                break;
            }
        }
        Nonce::assume_unique_for_key(now)
    }
}

/// A connection, packet by packet.
pub struct Raw {
    socket: TcpStream,
    ciphers: Option<(Cipher, Cipher)>,
}

impl std::fmt::Debug for Raw {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Raw").finish_non_exhaustive()
    }
}

impl Raw {
    /// Connects and says nothing.
    ///
    /// # Errors
    /// Nobody listens.
    pub async fn connect(agent: SocketAddr) -> Result<Self> {
        let socket = TcpStream::connect(agent).await.context("raw: connecting")?;
        socket.set_nodelay(true)?;
        Ok(Self { socket, ciphers: None })
    }

    /// Connects and exchanges keys.
    ///
    /// # Errors
    /// The agent ends the connection.
    pub async fn secured(agent: SocketAddr, offer: Offer) -> Result<Self> {
        let mut raw = Self::connect(agent).await?;
        raw.exchange_keys(offer).await?;
        Ok(raw)
    }

    /// Connects and authenticates as an attestation peer.
    ///
    /// # Errors
    /// The agent refuses it.
    pub async fn attestation(agent: SocketAddr) -> Result<Self> {
        let mut raw = Self::secured(agent, Offer::default()).await?;
        raw.send(&Packet::new(message::SERVICE_REQUEST).string("ssh-userauth")).await?;
        raw.expect(&[message::SERVICE_ACCEPT]).await?;
        let request = Packet::new(message::USERAUTH_REQUEST).string("attestation");
        raw.send(&request.string("ssh-connection").string("none")).await?;
        raw.expect(&[message::USERAUTH_SUCCESS]).await?;
        Ok(raw)
    }

    async fn exchange_keys(&mut self, offer: Offer) -> Result<()> {
        const OURS: &str = "SSH-2.0-Raw";
        self.write(format!("{OURS}\r\n").as_bytes()).await?;
        let theirs = self.line().await?;
        let init = kexinit(offer);
        self.send(&init).await?;
        let their_init = self.expect(&[message::KEXINIT]).await?;
        let broken = |_| anyhow!("raw: key agreement");
        let secret = EphemeralPrivateKey::generate(&X25519, &SystemRandom::new()).map_err(broken)?;
        let public = secret.compute_public_key().map_err(broken)?;
        self.send(&Packet::new(message::KEX_ECDH_INIT).string(&public)).await?;
        let reply = self.expect(&[message::KEX_ECDH_REPLY]).await?;
        let (host_key, rest) = cut(reply.get(1..).unwrap_or_default())?;
        let (their_public, _) = cut(rest)?;

        let mut hashed = Vec::new();
        for part in [
            OURS.as_bytes(),
            theirs.as_bytes(),
            &init.0,
            &their_init,
            host_key,
            public.as_ref(),
            their_public,
        ] {
            string(&mut hashed, part);
        }
        let peer = UnparsedPublicKey::new(&X25519, their_public);
        let shared = agree_ephemeral(secret, &peer, mpint).map_err(broken)?;
        hashed.extend_from_slice(&shared);
        let hash = digest(&SHA256, &hashed);
        self.send(&Packet::new(message::NEWKEYS)).await?;
        self.expect(&[message::NEWKEYS]).await?;
        // RFC 4253 7.2; this is the first exchange, so its hash is the session's id.
        let derive =
            |letter: u8| digest(&SHA256, &[&shared, hash.as_ref(), &[letter], hash.as_ref()].concat());
        let cipher = |iv: u8, key: u8| {
            let mut nonce = [0; 12];
            nonce.copy_from_slice(derive(iv).as_ref().get(..12).unwrap_or_default());
            let key =
                UnboundKey::new(&AES_256_GCM, derive(key).as_ref()).map_err(|_| anyhow!("raw: cipher"))?;
            anyhow::Ok(Cipher { key: LessSafeKey::new(key), nonce })
        };
        self.ciphers = Some((cipher(b'A', b'C')?, cipher(b'B', b'D')?));
        Ok(())
    }

    /// Where it connects from: what the agent's log calls it.
    ///
    /// # Errors
    /// The socket is dead.
    pub fn address(&self) -> Result<SocketAddr> {
        self.socket.local_addr().context("raw: its own address")
    }

    /// Sends bytes as they are.
    ///
    /// # Errors
    /// The agent has ended the connection.
    pub async fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.socket.write_all(bytes).await.context("raw: sending")
    }

    /// Sends a packet.
    ///
    /// # Errors
    /// The agent has ended the connection.
    pub async fn send(&mut self, packet: &Packet) -> Result<()> {
        let bytes = self.seal(packet)?;
        self.write(&bytes).await
    }

    /// A packet as it goes over the wire.
    ///
    /// # Errors
    /// None that an honest cipher makes.
    pub fn seal(&mut self, packet: &Packet) -> Result<Vec<u8>> {
        // RFC 4253 6: length, padding length, payload, at least 4 bytes of padding, up to a whole block. With GCM the
        // length is not part of the blocks.
        let (block, counted) = if self.ciphers.is_some() { (16, 1) } else { (8, 5) };
        let mut padding = block - (counted + packet.0.len()) % block;
        if padding < 4 {
            padding += block;
        }
        let length = u32::try_from(1 + packet.0.len() + padding)?.to_be_bytes();
        let mut body = vec![u8::try_from(padding)?];
        body.extend_from_slice(&packet.0);
        body.resize(body.len() + padding, 0);
        if let Some((out, _)) = &mut self.ciphers {
            let nonce = out.next();
            let sealed = out.key.seal_in_place_append_tag(nonce, Aad::from(length), &mut body);
            sealed.map_err(|_| anyhow!("raw: sealing"))?;
        }
        Ok([&length, body.as_slice()].concat())
    }

    /// The next packet's payload.
    ///
    /// # Errors
    /// The agent has ended the connection.
    pub async fn receive(&mut self) -> Result<Vec<u8>> {
        timeout(PATIENCE, self.read_packet()).await.context("raw: no packet came")?
    }

    /// The next packet with one of these message numbers; others are skipped.
    ///
    /// # Errors
    /// The agent has ended the connection, or disconnects.
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

    /// Reads to the end of the connection.
    ///
    /// # Errors
    /// It does not end.
    pub async fn ends(&mut self) -> Result<()> {
        let mut buffer = [0; 4096];
        // An error is an end too.
        let end = async { while matches!(self.socket.read(&mut buffer).await, Ok(1..)) {} };
        timeout(PATIENCE, end).await.context("raw: the connection stays")
    }

    async fn read_packet(&mut self) -> Result<Vec<u8>> {
        let mut length = [0; 4];
        self.socket.read_exact(&mut length).await.context("raw: the agent ended the connection")?;
        let tag = if self.ciphers.is_some() { 16 } else { 0 };
        let mut body = vec![0; usize::try_from(u32::from_be_bytes(length))? + tag];
        self.socket.read_exact(&mut body).await.context("raw: the agent ended the connection")?;
        if let Some((_, incoming)) = &mut self.ciphers {
            let nonce = incoming.next();
            let opened = incoming.key.open_in_place(nonce, Aad::from(length), &mut body);
            opened.map_err(|_| anyhow!("raw: opening"))?;
            body.truncate(body.len().saturating_sub(tag));
        }
        let padding = usize::from(*body.first().context("raw: an empty packet")?);
        let end = body.len().checked_sub(padding).context("raw: a packet of padding")?;
        Ok(body.get(1..end).context("raw: a packet of padding")?.to_vec())
    }

    async fn line(&mut self) -> Result<String> {
        let mut line = Vec::new();
        while !line.ends_with(b"\n") {
            line.push(self.socket.read_u8().await.context("raw: reading the identification")?);
        }
        Ok(String::from_utf8_lossy(&line).trim_end().to_owned())
    }
}

fn kexinit(offer: Offer) -> Packet {
    let mut packet = Packet::new(message::KEXINIT).bytes(&[7; 16]).string(offer.kex).string("ssh-ed25519");
    for list in [offer.ciphers, offer.ciphers, "hmac-sha2-256", "hmac-sha2-256"] {
        packet = packet.string(list);
    }
    packet.string(offer.compression).string(offer.compression).string("").string("").byte(0).uint(0)
}

fn cut(bytes: &[u8]) -> Result<(&[u8], &[u8])> {
    let (length, rest) = bytes.split_first_chunk().context("raw: a cut string")?;
    rest.split_at_checked(usize::try_from(u32::from_be_bytes(*length))?).context("raw: a cut string")
}

/// RFC 4251 5: big-endian, without leading zeros, positive.
fn mpint(secret: &[u8]) -> Vec<u8> {
    let zeros = secret.iter().take_while(|byte| **byte == 0).count();
    let digits = secret.get(zeros..).unwrap_or_default();
    let sign: &[u8] = if digits.first().is_some_and(|byte| byte & 0x80 != 0) { &[0] } else { &[] };
    let mut out = Vec::new();
    string(&mut out, &[sign, digits].concat());
    out
}
