//! The key exchange, step by step, in either role (RFC 4253 7 and 8, RFC 8731).

use anyhow::{Context, Result, anyhow, bail};
use ring::agreement::{EphemeralPrivateKey, UnparsedPublicKey, X25519, agree_ephemeral};
use ring::digest::{SHA256, digest};
use ring::rand::SystemRandom;

use super::cipher::Keys;
use super::key::Key;
use super::packet::{Packet, cut, string};
use super::{Raw, message};

/// The algorithms that an end offers.
#[derive(Clone, Copy, Debug)]
pub struct Offer {
    /// Key exchange, and the markers that go with it.
    pub kex: &'static str,
    /// Ciphers, both ways; one of the two.
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

impl Offer {
    /// What a server offers.
    #[must_use]
    pub fn server() -> Self {
        Self { kex: "curve25519-sha256,kex-strict-s-v00@openssh.com", ..Self::default() }
    }

    /// The same with chacha20-poly1305, which depends on sequence numbers.
    #[must_use]
    pub fn by_sequence(self) -> Self {
        Self { ciphers: "chacha20-poly1305@openssh.com", ..self }
    }

    /// The KEXINIT of this offer.
    #[must_use]
    pub fn packet(self) -> Packet {
        let mut packet = Packet::new(message::KEXINIT).bytes(&[7; 16]).string(self.kex).string("ssh-ed25519");
        for list in [self.ciphers, self.ciphers, "hmac-sha2-256", "hmac-sha2-256"] {
            packet = packet.string(list);
        }
        packet.string(self.compression).string(self.compression).string("").string("").byte(0).uint(0)
    }
}

/// An exchange after both KEXINITs.
#[derive(Clone, Debug)]
pub struct Exchange {
    client: Vec<u8>,
    server: Vec<u8>,
    chacha: bool,
}

impl Raw {
    /// Sends a KEXINIT and receives one.
    ///
    /// # Errors
    /// If the other end ends the connection.
    pub async fn begin(&mut self, offer: Offer) -> Result<Exchange> {
        let ours = offer.packet();
        self.send(&ours).await?;
        let theirs = self.expect(&[message::KEXINIT]).await?;
        let chacha = offer.ciphers.starts_with("chacha20");
        Ok(Exchange { chacha, ..self.begun_with(ours.0, theirs) })
    }

    /// An exchange with these KEXINITs, whatever they are, and AES.
    #[must_use]
    pub fn begun_with(&self, ours: Vec<u8>, theirs: Vec<u8>) -> Exchange {
        let (client, server) = if self.is_client { (ours, theirs) } else { (theirs, ours) };
        Exchange { client, server, chacha: false }
    }

    /// As the client: agrees on keys, which apply after NEWKEYS.
    ///
    /// # Errors
    /// If the other end ends the connection.
    pub async fn agree(&mut self, exchange: Exchange) -> Result<Keys> {
        let (secret, public) = ephemeral()?;
        self.send(&Packet::new(message::KEX_ECDH_INIT).string(&public)).await?;
        let reply = self.expect(&[message::KEX_ECDH_REPLY]).await?;
        let (host_key, rest) = cut(reply.get(1..).unwrap_or_default())?;
        let (their_public, _) = cut(rest)?;
        let shared = shared(secret, their_public)?;
        Ok(self.keys(exchange, host_key, &public, their_public, shared))
    }

    /// As the server: agrees on keys, and proves `host_key`.
    ///
    /// # Errors
    /// If the other end ends the connection.
    pub async fn agree_as(&mut self, exchange: Exchange, host_key: &Key) -> Result<Keys> {
        self.agree_signed_by(exchange, &host_key.public(), host_key).await
    }

    /// As the server: shows one host key, and signs with another.
    ///
    /// # Errors
    /// If the other end ends the connection.
    pub async fn agree_signed_by(&mut self, exchange: Exchange, shown: &[u8], signer: &Key) -> Result<Keys> {
        let init = self.expect(&[message::KEX_ECDH_INIT]).await?;
        let (their_public, _) = cut(init.get(1..).unwrap_or_default())?;
        let (secret, public) = ephemeral()?;
        let shared = shared(secret, their_public)?;
        let keys = self.keys(exchange, shown, their_public, &public, shared);
        let reply = Packet::new(message::KEX_ECDH_REPLY).string(shown).string(&public);
        self.send(&reply.string(signer.sign(&keys.hash))).await?;
        Ok(keys)
    }

    /// Sends NEWKEYS, and encrypts with the new keys from then on.
    ///
    /// # Errors
    /// If the other end has ended the connection.
    pub async fn seal_with(&mut self, keys: &Keys) -> Result<()> {
        self.send(&Packet::new(message::NEWKEYS)).await?;
        self.out = Some(keys.cipher(self.is_client)?);
        if self.starts_over {
            self.sent = 0;
        }
        Ok(())
    }

    /// Receives NEWKEYS, and decrypts with the new keys from then on.
    ///
    /// # Errors
    /// If the other end ends the connection.
    pub async fn open_with(&mut self, keys: &Keys) -> Result<()> {
        let next = self.receive().await?;
        if next != [message::NEWKEYS] {
            bail!("raw: expected NEWKEYS, got {}", next.escape_ascii());
        }
        self.incoming = Some(keys.cipher(!self.is_client)?);
        if self.starts_over {
            self.received = 0;
        }
        Ok(())
    }

    /// A whole exchange, the first one or a rekey.
    ///
    /// # Errors
    /// If the other end ends the connection.
    pub async fn exchange_keys(&mut self, offer: Offer) -> Result<()> {
        let exchange = self.begin(offer).await?;
        let keys = self.agree(exchange).await?;
        self.seal_with(&keys).await?;
        self.open_with(&keys).await
    }

    /// Session id: the hash of the first exchange.
    #[must_use]
    pub fn session(&self) -> &[u8] {
        &self.session
    }

    fn keys(
        &mut self,
        exchange: Exchange,
        host_key: &[u8],
        client: &[u8],
        server: &[u8],
        shared: Vec<u8>,
    ) -> Keys {
        let (client_id, server_id) = if self.is_client {
            (super::IDENTIFICATION, self.theirs.as_str())
        } else {
            (self.theirs.as_str(), super::IDENTIFICATION)
        };
        let mut hashed = Vec::new();
        for part in [
            client_id.as_bytes(),
            server_id.as_bytes(),
            &exchange.client,
            &exchange.server,
            host_key,
            client,
            server,
        ] {
            string(&mut hashed, part);
        }
        hashed.extend_from_slice(&shared);
        let hash = digest(&SHA256, &hashed).as_ref().to_vec();
        if self.session.is_empty() {
            self.session.clone_from(&hash);
        }
        Keys { shared, hash, session: self.session.clone(), chacha: exchange.chacha }
    }
}

fn ephemeral() -> Result<(EphemeralPrivateKey, Vec<u8>)> {
    let broken = |_| anyhow!("raw: key agreement");
    let secret = EphemeralPrivateKey::generate(&X25519, &SystemRandom::new()).map_err(broken)?;
    let public = secret.compute_public_key().map_err(broken)?.as_ref().to_vec();
    Ok((secret, public))
}

fn shared(secret: EphemeralPrivateKey, theirs: &[u8]) -> Result<Vec<u8>> {
    let theirs = UnparsedPublicKey::new(&X25519, theirs);
    agree_ephemeral(secret, &theirs, mpint).ok().context("raw: key agreement")
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
