//! Messages under construction.

use anyhow::{Context, Result};

use super::message;

/// A message under construction: its number, then its fields (RFC 4251 5).
#[derive(Clone)]
pub struct Packet(pub(super) Vec<u8>);

impl std::fmt::Debug for Packet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Packet({:.200})", self.0.escape_ascii().to_string())
    }
}

impl Packet {
    /// A message with this number and no fields.
    #[must_use]
    pub fn new(message: u8) -> Self {
        Self(vec![message])
    }

    /// A received message.
    #[must_use]
    pub fn whole(payload: Vec<u8>) -> Self {
        Self(payload)
    }

    /// All bytes of the message.
    #[must_use]
    pub fn payload(&self) -> &[u8] {
        &self.0
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

    /// Adds bytes unchanged.
    #[must_use]
    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// CHANNEL_OPEN of this type with our channel number `id`; the fields of the type are added by the caller.
    #[must_use]
    pub fn open(kind: &str, id: u32) -> Self {
        Self::new(message::CHANNEL_OPEN).string(kind).uint(id).uint(1 << 20).uint(1 << 15)
    }

    /// CHANNEL_DATA for the other end's channel `id`.
    #[must_use]
    pub fn data(id: u32, data: impl AsRef<[u8]>) -> Self {
        Self::new(message::CHANNEL_DATA).uint(id).string(data)
    }

    /// GLOBAL_REQUEST that wants a reply; its fields are added by the caller.
    #[must_use]
    pub fn global(name: &str) -> Self {
        Self::new(message::GLOBAL_REQUEST).string(name).byte(1)
    }

    /// CHANNEL_REQUEST on the agent's channel `id` that wants a reply; its fields are added by the caller.
    #[must_use]
    pub fn request(id: u32, name: &str) -> Self {
        Self::new(message::CHANNEL_REQUEST).uint(id).string(name).byte(1)
    }

    /// USERAUTH_REQUEST; the fields of the method are added by the caller.
    #[must_use]
    pub fn authenticate(user: &str, method: &str) -> Self {
        Self::new(message::USERAUTH_REQUEST).string(user).string("ssh-connection").string(method)
    }
}

/// Appends a string (RFC 4251 5).
pub(super) fn string(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(&u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_be_bytes());
    out.extend_from_slice(bytes);
}

/// Splits off a string; returns the string and the rest.
///
/// # Errors
/// If it is truncated.
pub fn cut(bytes: &[u8]) -> Result<(&[u8], &[u8])> {
    let (length, rest) = bytes.split_first_chunk().context("raw: a cut string")?;
    rest.split_at_checked(usize::try_from(u32::from_be_bytes(*length))?).context("raw: a cut string")
}

/// The uint32 at `at`.
///
/// # Errors
/// If it is truncated.
pub fn uint(payload: &[u8], at: usize) -> Result<u32> {
    let bytes = payload.get(at..).and_then(|rest| rest.first_chunk()).context("raw: a cut number")?;
    Ok(u32::from_be_bytes(*bytes))
}
