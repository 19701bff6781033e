//! The two ciphers of the profile, one direction each, and the keys for them.

use anyhow::{Context, Result, anyhow};
use ring::aead::chacha20_poly1305_openssh as chacha;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use ring::digest::{SHA256, digest};

/// Length of the tag of either cipher, in bytes.
pub(super) const TAG: usize = 16;

/// One direction's cipher.
pub(super) enum Cipher {
    /// `aes256-gcm@openssh.com`: has a counter of its own.
    Gcm { key: Box<LessSafeKey>, nonce: [u8; 12] },
    /// `chacha20-poly1305@openssh.com`: uses the sequence number, and encrypts the length.
    ChaCha { seals: Box<chacha::SealingKey>, opens: Box<chacha::OpeningKey> },
}

/// Result of a key exchange.
#[derive(Clone)]
pub struct Keys {
    pub(super) shared: Vec<u8>,
    pub(super) hash: Vec<u8>,
    pub(super) session: Vec<u8>,
    pub(super) chacha: bool,
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Keys").finish_non_exhaustive()
    }
}

impl Keys {
    /// RFC 4253 7.2, as far as one hash reaches.
    fn derive(&self, letter: u8) -> Vec<u8> {
        digest(&SHA256, &[self.shared.as_slice(), &self.hash, &[letter], &self.session].concat())
            .as_ref()
            .to_vec()
    }

    /// The cipher from client to server, or back.
    pub(super) fn cipher(&self, from_client: bool) -> Result<Cipher> {
        let (iv, key) = if from_client { (b'A', b'C') } else { (b'B', b'D') };
        let first = self.derive(key);
        if self.chacha {
            let more = digest(&SHA256, &[self.shared.as_slice(), &self.hash, &first].concat());
            let whole: [u8; chacha::KEY_LEN] =
                [first.as_slice(), more.as_ref()].concat().try_into().map_err(|_| anyhow!("raw: cipher"))?;
            let seals = Box::new(chacha::SealingKey::new(&whole));
            let opens = Box::new(chacha::OpeningKey::new(&whole));
            return Ok(Cipher::ChaCha { seals, opens });
        }
        let nonce = *self.derive(iv).first_chunk().context("raw: cipher")?;
        let key = UnboundKey::new(&AES_256_GCM, &first).map_err(|_| anyhow!("raw: cipher"))?;
        Ok(Cipher::Gcm { key: Box::new(LessSafeKey::new(key)), nonce })
    }
}

impl Cipher {
    /// Encrypts a packet that begins with its length.
    pub(super) fn seal(&mut self, sequence: u32, length: [u8; 4], mut body: Vec<u8>) -> Result<Vec<u8>> {
        match self {
            Self::Gcm { key, nonce } => {
                let sealed = key.seal_in_place_append_tag(next(nonce), Aad::from(length), &mut body);
                sealed.map_err(|_| anyhow!("raw: sealing"))?;
                Ok([&length, body.as_slice()].concat())
            }
            Self::ChaCha { seals, .. } => {
                let mut whole = [&length, body.as_slice()].concat();
                let mut tag = [0; TAG];
                seals.seal_in_place(sequence, &mut whole, &mut tag);
                whole.extend_from_slice(&tag);
                Ok(whole)
            }
        }
    }

    /// Decrypts the length of a packet.
    pub(super) fn length(&self, sequence: u32, sealed: [u8; 4]) -> u32 {
        u32::from_be_bytes(match self {
            Self::Gcm { .. } => sealed,
            Self::ChaCha { opens, .. } => opens.decrypt_packet_length(sequence, sealed),
        })
    }

    /// Decrypts a packet: its encrypted length, and the rest with the tag.
    pub(super) fn open(&mut self, sequence: u32, length: [u8; 4], mut body: Vec<u8>) -> Result<Vec<u8>> {
        let failed = |_| anyhow!("raw: opening");
        match self {
            Self::Gcm { key, nonce } => {
                key.open_in_place(next(nonce), Aad::from(length), &mut body).map_err(failed)?;
                body.truncate(body.len().saturating_sub(TAG));
                Ok(body)
            }
            Self::ChaCha { opens, .. } => {
                let tag = *body.last_chunk().context("raw: a packet without a tag")?;
                body.truncate(body.len().saturating_sub(TAG));
                let mut whole = [&length, body.as_slice()].concat();
                Ok(opens.open_in_place(sequence, &mut whole, &tag).map_err(failed)?.to_vec())
            }
        }
    }
}

/// RFC 5647 7.1: the last eight bytes are a counter.
fn next(nonce: &mut [u8; 12]) -> Nonce {
    let now = *nonce;
    let (_, counter) = nonce.split_at_mut(4);
    for byte in counter.iter_mut().rev() {
        *byte = byte.wrapping_add(1);
        if *byte != 0 {
            break;
        }
    }
    Nonce::assume_unique_for_key(now)
}
