//! Why a key can't be read, made or written. No text quotes key material: it may reach logs and unproven peers.

use std::fmt;

use secure_comms_protocol::limits::KEY_MAX;
use ssh_key::{Error as SshKeyError, encoding};
use zeroize::Zeroizing;

/// Why a key can't be read, made or written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// A text is not the private key that it should be.
    #[error("reading {role}: {fault}; give an unencrypted Ed25519 key ({})", role.advice())]
    PrivateKey {
        /// The key that was expected.
        role: PrivateKeyRole,
        /// What is wrong with the text.
        fault: PrivateKeyFault,
    },
    /// A text is not a list of worker-node public keys.
    #[error(
        "reading the worker node's public keys: {0}; give ssh-ed25519 authorized_keys lines (ssh-keygen -y)"
    )]
    WorkerNodeKeys(PublicKeyFault),
    /// A public key is of another algorithm.
    #[error("reading a public key: it is not an Ed25519 key; use Ed25519 (ssh-keygen -t ed25519)")]
    NotEd25519,
    /// The operating system gave no random bytes.
    #[error("making a key: {0}; check that the system has a source of randomness")]
    Random(String),
    /// The key could not be encoded.
    #[error("writing a key: {0}")]
    Encode(String),
}

impl KeyError {
    pub(crate) fn encode(error: SshKeyError) -> Self {
        Self::Encode(scrubbed(&error))
    }
}

/// The use of a private key, for errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PrivateKeyRole {
    /// The pod key.
    Pod,
    /// The worker-node key.
    WorkerNode,
    /// The key of the KBS admin.
    Admin,
}

impl PrivateKeyRole {
    fn advice(self) -> &'static str {
        match self {
            Self::Pod | Self::WorkerNode => "ssh-keygen -t ed25519 -N ''",
            Self::Admin => "openssl genpkey -algorithm ed25519",
        }
    }
}

impl fmt::Display for PrivateKeyRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pod => "the pod's private key",
            Self::WorkerNode => "the worker node's private key",
            Self::Admin => "the KBS admin's private key",
        })
    }
}

/// Why bytes are not a text that could hold keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TextFault {
    /// Nothing but white space.
    #[error("it is empty")]
    Empty,
    /// Longer than [`KEY_MAX`].
    #[error("longer than {KEY_MAX} bytes")]
    TooLong,
    /// Binary, or text in UTF-16.
    #[error("not text")]
    NotText,
}

/// What is wrong with a private key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PrivateKeyFault {
    /// Not a text that could hold a key.
    #[error(transparent)]
    Text(#[from] TextFault),
    /// No PEM text.
    #[error("not PEM: no '-----BEGIN' line")]
    NotPem,
    /// More than one private key: which one is meant?
    #[error("more than one private key in it")]
    Several,
    /// More PEM texts than that of the key.
    #[error("another PEM text in it")]
    SecondPem,
    /// The PEM text is damaged.
    #[error("bad PEM: {0}")]
    BadPem(String),
    /// The key is behind a passphrase.
    #[error("it is encrypted")]
    Encrypted,
    /// A private key of another algorithm.
    #[error("{0} is not an Ed25519 key")]
    NotEd25519(String),
    /// A PEM text with something else in it.
    #[error("{0} is not a private key")]
    NotPrivateKey(&'static str),
    /// What an OpenSSH PEM text wraps is damaged.
    #[error("bad OpenSSH key: {0}")]
    BadOpenSsh(String),
    /// What a PKCS#8 PEM text wraps is damaged, or a key of another algorithm.
    #[error("damaged, or not an Ed25519 key in PKCS#8")]
    BadPkcs8,
    /// The public half in a PKCS#8 text is not that of the private half.
    #[error("its public half belongs to another key")]
    OtherHalf,
}

/// What is wrong with a list of public keys.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PublicKeyFault {
    /// Not a text that could hold keys.
    #[error(transparent)]
    Text(#[from] TextFault),
    /// The resource of a pod holds its private key only.
    #[error("no line next to the private key")]
    OnlyPrivate,
    /// Comments and blank lines only.
    #[error("no key, only comments")]
    NoKey,
    /// A line that is not an Ed25519 key.
    #[error("line {number}: {fault}")]
    Line {
        /// Number of the line, from 1.
        number: usize,
        /// What is wrong with it.
        fault: String,
    },
}

/// Reads what may hold keys: a text of at most [`KEY_MAX`] bytes that is not empty. Keys are ASCII, so a comment may be in any
/// encoding of one byte for each letter, as OpenSSH has it: other bytes become '?'. A byte order mark is dropped.
pub(crate) fn checked_text(bytes: &[u8]) -> Result<Zeroizing<String>, TextFault> {
    if bytes.len() > KEY_MAX {
        return Err(TextFault::TooLong);
    }
    let bytes = bytes.strip_prefix("\u{feff}".as_bytes()).unwrap_or(bytes);
    if bytes.contains(&0) || bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff]) {
        return Err(TextFault::NotText);
    }
    // Allocated in full first: a text that grows leaves copies behind.
    let mut text = Zeroizing::new(String::with_capacity(bytes.len()));
    match std::str::from_utf8(bytes) {
        Ok(valid) => text.push_str(valid),
        Err(_) => text.extend(bytes.iter().map(|byte| if byte.is_ascii() { char::from(*byte) } else { '?' })),
    }
    if text.trim().is_empty() { Err(TextFault::Empty) } else { Ok(text) }
}

/// The decoder's error without the names that it quotes: in a damaged file any part of the key may stand in their place.
pub(crate) fn scrubbed(error: &SshKeyError) -> String {
    match error {
        SshKeyError::Encoding(encoding::Error::Label(_)) => "a name in it is not known".to_owned(),
        SshKeyError::AlgorithmUnsupported { .. } => "its algorithm is not supported".to_owned(),
        other => other.to_string(),
    }
}
