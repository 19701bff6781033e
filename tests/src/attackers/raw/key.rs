//! An Ed25519 key (RFC 8709), and the login with it.

use anyhow::{Context, Result, anyhow};
use ring::rand::{SecureRandom, SystemRandom};
use ring::signature::{Ed25519KeyPair, KeyPair};
use russh::keys::PrivateKey;

use super::Raw;
use super::message;
use super::packet::{Packet, string};

const ALGORITHM: &str = "ssh-ed25519";

/// A key pair.
pub struct Key(Ed25519KeyPair);

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Key").finish_non_exhaustive()
    }
}

impl Key {
    /// Generates a key pair.
    ///
    /// # Errors
    /// If the system has no randomness.
    pub fn generate() -> Result<Self> {
        let mut seed = [0; 32];
        SystemRandom::new().fill(&mut seed).map_err(|_| anyhow!("raw: randomness"))?;
        Self::from_seed(&seed)
    }

    /// Parses an OpenSSH private key.
    ///
    /// # Errors
    /// If the text is no OpenSSH key, or the key is not Ed25519.
    pub fn from_openssh(pem: &str) -> Result<Self> {
        let key = PrivateKey::from_openssh(pem)?;
        let pair = key.key_data().ed25519().context("raw: not an Ed25519 key")?;
        Self::from_seed(&pair.private.to_bytes())
    }

    fn from_seed(seed: &[u8; 32]) -> Result<Self> {
        Ok(Self(Ed25519KeyPair::from_seed_unchecked(seed).map_err(|error| anyhow!("raw: key: {error}"))?))
    }

    /// The public key in wire format.
    #[must_use]
    pub fn public(&self) -> Vec<u8> {
        blob(self.0.public_key().as_ref())
    }

    /// A signature in wire format.
    #[must_use]
    pub fn sign(&self, message: &[u8]) -> Vec<u8> {
        blob(self.0.sign(message).as_ref())
    }

    /// The login of `user` in the session of this id, up to the signature (RFC 4252 7).
    #[must_use]
    pub fn login(&self, user: &str, session: &[u8]) -> Packet {
        let request = Packet::authenticate(user, "publickey").byte(1).string(ALGORITHM).string(self.public());
        let mut signed = Vec::new();
        string(&mut signed, session);
        signed.extend_from_slice(&request.0);
        request.string(self.sign(&signed))
    }
}

fn blob(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    string(&mut out, ALGORITHM.as_bytes());
    string(&mut out, bytes);
    out
}

impl Raw {
    /// Requests the authentication service.
    ///
    /// # Errors
    /// If the agent ends the connection.
    pub async fn ask_to_authenticate(&mut self) -> Result<()> {
        self.send(&Packet::new(message::SERVICE_REQUEST).string("ssh-userauth")).await?;
        self.expect(&[message::SERVICE_ACCEPT]).await.map(drop)
    }

    /// Authenticates; returns whether the agent accepts.
    ///
    /// # Errors
    /// If the agent ends the connection.
    pub async fn authenticate(&mut self, request: &Packet) -> Result<bool> {
        self.send(request).await?;
        let answer = self.expect(&[message::USERAUTH_SUCCESS, message::USERAUTH_FAILURE]).await?;
        Ok(answer.first() == Some(&message::USERAUTH_SUCCESS))
    }
}
