//! The keys of the Kubernetes phase: the pod's host key and the worker nodes that may log in.
//!
//! Ed25519 only. What can't be read is an error, never "no key": absence must not open a door.

use std::fmt;
use std::sync::Arc;

use base64ct::{Base64, Encoding};
use ed25519_dalek::pkcs8::DecodePrivateKey;
use ed25519_dalek::{SigningKey, VerifyingKey};
use russh::keys::ssh_key::private::{Ed25519Keypair, Ed25519PrivateKey, KeypairData};
use russh::keys::ssh_key::public::{Ed25519PublicKey, KeyData};
use russh::keys::ssh_key::{Error as SshKeyError, LineEnding, encoding};
use russh::keys::{Algorithm, HashAlg};
pub use russh::keys::{PrivateKey, PublicKey};
use secure_comms_protocol::limits::KEY_MAX;
use subtle::{Choice, ConstantTimeEq};
use zeroize::Zeroizing;

/// A kind of PEM text has no longer name ("ENCRYPTED PRIVATE KEY"), nor one of its words ("CERTIFICATE").
const LABEL_MAX: usize = 32;
const LABEL_WORD_MAX: usize = 12;

/// Why a text is not the key it should be. Texts never contain key material.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// The pod's private key.
    #[error(
        "reading the pod's private key: {0}; give an unencrypted Ed25519 key (ssh-keygen -t ed25519 -N '')"
    )]
    Host(String),
    /// The worker node's public keys.
    #[error(
        "reading the worker node's public keys: {0}; give ssh-ed25519 authorized_keys lines (ssh-keygen -y)"
    )]
    WorkerNode(String),
    /// The operating system gave no random bytes.
    #[error("making a host key: {0}; check that the VM has a source of randomness")]
    Random(String),
}

fn host_error(cause: impl Into<String>) -> KeyError {
    KeyError::Host(cause.into())
}

fn node_error(cause: impl Into<String>) -> KeyError {
    KeyError::WorkerNode(cause.into())
}

/// A host key that lives in memory only: Ed25519, from the operating system's randomness.
///
/// # Errors
/// The system has no randomness to give.
pub fn new_host_key() -> Result<PrivateKey, KeyError> {
    let mut seed = Zeroizing::new([0; Ed25519PrivateKey::BYTE_SIZE]);
    getrandom::fill(seed.as_mut()).map_err(|error| KeyError::Random(error.to_string()))?;
    from_seed(&seed).map_err(|error| KeyError::Random(error.to_string()))
}

fn from_seed(seed: &[u8; Ed25519PrivateKey::BYTE_SIZE]) -> Result<PrivateKey, KeyError> {
    PrivateKey::new(KeypairData::Ed25519(Ed25519Keypair::from_seed(seed)), "")
        .map_err(|error| host_error(error.to_string()))
}

/// Reads an Ed25519 private key: PEM, OpenSSH or PKCS#8, not encrypted.
///
/// # Errors
/// Everything else, with what it is.
pub fn parse_host_key(pem: &[u8]) -> Result<PrivateKey, KeyError> {
    let pem = text(pem).map_err(KeyError::Host)?;
    let (_, rest) =
        pem.split_once("-----BEGIN ").ok_or_else(|| host_error("not PEM: no '-----BEGIN' line"))?;
    let (label, rest) =
        rest.split_once("-----").ok_or_else(|| host_error("bad PEM: a cut '-----BEGIN' line"))?;
    match label {
        "OPENSSH PRIVATE KEY" => parse_openssh(&pem_body(rest, label)?),
        // RFC 8410. Not through russh, whose reader leaves copies behind.
        "PRIVATE KEY" => {
            let key = SigningKey::from_pkcs8_der(&pem_body(rest, label)?)
                .map_err(|error| host_error(format!("not an Ed25519 key in PKCS#8: {error}")))?;
            from_seed(key.as_bytes())
        }
        "ENCRYPTED PRIVATE KEY" => Err(host_error("it is encrypted")),
        "RSA PRIVATE KEY" | "EC PRIVATE KEY" | "DSA PRIVATE KEY" => {
            Err(host_error(format!("a '{label}' is not an Ed25519 key")))
        }
        _ if is_label(label) => Err(host_error(format!("a '{label}' is not a private key"))),
        _ => Err(host_error("bad PEM: a damaged '-----BEGIN' line")),
    }
}

/// Whether it reads as the name of a kind of PEM text (RFC 7468). In a damaged text the key itself may stand in the name's place.
fn is_label(text: &str) -> bool {
    let is_word = |word: &str| {
        (1..=LABEL_WORD_MAX).contains(&word.len()) && word.bytes().all(|b| b.is_ascii_uppercase())
    };
    text.len() <= LABEL_MAX && text.split(' ').all(is_word)
}

/// What is between the lines of a PEM text, however it is wrapped: writers differ.
fn pem_body(rest: &str, label: &str) -> Result<Zeroizing<Vec<u8>>, KeyError> {
    let end = format!("-----END {label}-----");
    let (body, _) = rest.split_once(&end).ok_or_else(|| host_error(format!("bad PEM: no '{end}' line")))?;
    decode_base64(body).ok_or_else(|| host_error("bad PEM: not base64"))
}

/// Decodes base64, however it is wrapped into lines; `None` if it is none.
pub(crate) fn decode_base64(text: &str) -> Option<Zeroizing<Vec<u8>>> {
    // Sized first: what grows leaves copies behind.
    let mut packed = Zeroizing::new(String::with_capacity(text.len()));
    packed.extend(text.chars().filter(|c| !c.is_ascii_whitespace()));
    let mut bytes = Zeroizing::new(vec![0; packed.len()]);
    let length = Base64::decode(packed.as_bytes(), &mut bytes).ok()?.len();
    bytes.truncate(length);
    Some(bytes)
}

fn parse_openssh(bytes: &[u8]) -> Result<PrivateKey, KeyError> {
    let bad = |error: SshKeyError| host_error(format!("bad OpenSSH key: {}", cause(&error)));
    let key = PrivateKey::from_bytes(bytes).map_err(bad)?;
    if key.is_encrypted() {
        return Err(host_error("it is encrypted"));
    }
    let KeypairData::Ed25519(pair) = key.key_data() else {
        return Err(host_error(match key.algorithm() {
            // Its name is whatever stands there.
            Algorithm::Other(_) => "a key of another type is not an Ed25519 key".to_owned(),
            known => format!("a key of type {known} is not an Ed25519 key"),
        }));
    };
    // The file holds both halves; signing with halves that differ would give the private one away.
    let sound = from_seed(pair.private.as_ref())?;
    if sound.public_key().key_data() != &KeyData::Ed25519(pair.public) {
        return Err(host_error("bad OpenSSH key: its public half belongs to another key"));
    }
    Ok(sound)
}

/// What is wrong, without the names that the reader found: in a damaged file any part of the key may stand where it looks
/// for one, and faults are told to peers who have proven nothing.
fn cause(error: &SshKeyError) -> String {
    match error {
        SshKeyError::Encoding(encoding::Error::Label(_)) => "a name in it is not known".to_owned(),
        SshKeyError::AlgorithmUnsupported { .. } => "its algorithm is not supported".to_owned(),
        other => other.to_string(),
    }
}

fn text(bytes: &[u8]) -> Result<&str, String> {
    if bytes.len() > KEY_MAX {
        return Err(format!("longer than {KEY_MAX} bytes"));
    }
    let text = std::str::from_utf8(bytes).map_err(|_| "not text")?.trim();
    if text.is_empty() { Err("it is empty".into()) } else { Ok(text) }
}

fn excerpt(text: &str) -> String {
    text.chars().take(40).flat_map(char::escape_default).collect()
}

/// The public keys of the worker nodes that may log in; at least one.
#[derive(Clone, PartialEq, Eq)]
pub struct WorkerNodeKeys(Vec<Ed25519PublicKey>);

impl WorkerNodeKeys {
    /// Reads `authorized_keys` lines; blank lines and comments are skipped, duplicates folded.
    ///
    /// # Errors
    /// Any line that is not an Ed25519 key, and a text without keys.
    pub fn parse(lines: &[u8]) -> Result<Self, KeyError> {
        let mut keys: Vec<Ed25519PublicKey> = Vec::new();
        for (number, line) in text(lines).map_err(KeyError::WorkerNode)?.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let key =
                parse_line(line).map_err(|cause| node_error(format!("line {}: {cause}", number + 1)))?;
            if !keys.contains(&key) {
                keys.push(key);
            }
        }
        if keys.is_empty() { Err(node_error("no key, only comments")) } else { Ok(Self(keys)) }
    }

    /// Whether `key` is one of these. Takes the same time whichever of them it is, if any.
    pub fn matches(&self, key: &PublicKey) -> bool {
        let KeyData::Ed25519(key) = key.key_data() else { return false };
        let found = self.0.iter().fold(Choice::from(0), |found, own| found | own.0.ct_eq(&key.0));
        found.into()
    }

    /// The keys' SHA256 fingerprints, as `ssh-keygen -l` prints them.
    pub fn fingerprints(&self) -> impl Iterator<Item = String> {
        self.0.iter().map(|key| PublicKey::from(*key).fingerprint(HashAlg::Sha256).to_string())
    }

    fn write_lines(&self, out: &mut String) -> Result<(), KeyError> {
        for key in &self.0 {
            let line = PublicKey::from(*key).to_openssh().map_err(|error| node_error(error.to_string()))?;
            out.push_str(&line);
            out.push('\n');
        }
        Ok(())
    }
}

impl fmt::Debug for WorkerNodeKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.fingerprints()).finish()
    }
}

fn parse_line(line: &str) -> Result<Ed25519PublicKey, String> {
    let is_type = |word: &str| ["ssh-", "ecdsa-", "sk-"].iter().any(|prefix| word.starts_with(prefix));
    let first = line.split_whitespace().next().unwrap_or_default();
    if first != "ssh-ed25519" {
        return Err(if is_type(first) {
            format!("a key of type {} is not an Ed25519 key", excerpt(first))
        } else if line.split_whitespace().skip(1).any(is_type) {
            "options before the key are not supported; remove them".to_owned()
        } else {
            "not a public key".to_owned()
        });
    }
    let key = PublicKey::from_openssh(line).map_err(|error| format!("bad key: {}", cause(&error)))?;
    let KeyData::Ed25519(key) = key.key_data() else { return Err("bad key: not what its type says".into()) };
    // With a point of small order anybody could make signatures that verify.
    match VerifyingKey::from_bytes(&key.0) {
        Ok(point) if !point.is_weak() => Ok(*key),
        _ => Err("bad key: not a point that can verify signatures".into()),
    }
}

/// What makes the Kubernetes phase: who this pod is, and who may log in. Wiped on drop.
#[derive(Clone)]
pub struct PodKeys {
    // Behind a pointer: a value that moves leaves copies of the key behind.
    host: Arc<PrivateKey>,
    worker_node: WorkerNodeKeys,
}

impl PodKeys {
    /// Reads both from their texts, as the KBS or the user data hold them.
    ///
    /// # Errors
    /// Either is not what it should be.
    pub fn parse(host_pem: &[u8], worker_node_lines: &[u8]) -> Result<Self, KeyError> {
        let host = Arc::new(parse_host_key(host_pem)?);
        Ok(Self { host, worker_node: WorkerNodeKeys::parse(worker_node_lines)? })
    }

    /// The pod's host key.
    pub fn host(&self) -> &PrivateKey {
        &self.host
    }

    /// The worker nodes that may log in.
    pub fn worker_node(&self) -> &WorkerNodeKeys {
        &self.worker_node
    }

    /// The SHA256 fingerprint of the host key, for logs.
    pub fn fingerprint(&self) -> String {
        self.host.fingerprint(HashAlg::Sha256).to_string()
    }

    /// Both as one text: the PEM, then the `authorized_keys` lines.
    ///
    /// # Errors
    /// The key can't be encoded.
    pub fn to_text(&self) -> Result<Zeroizing<String>, KeyError> {
        let pem = self.host.to_openssh(LineEnding::LF).map_err(|error| host_error(error.to_string()))?;
        let mut lines = String::new();
        self.worker_node.write_lines(&mut lines)?;
        // Sized first: a text that grows leaves copies behind.
        let mut out = Zeroizing::new(String::with_capacity(pem.len() + 1 + lines.len()));
        out.push_str(pem.trim_end());
        out.push('\n');
        out.push_str(&lines);
        Ok(out)
    }

    /// Reads what [`Self::to_text`] wrote.
    ///
    /// # Errors
    /// Anything else.
    pub fn from_text(text: &str) -> Result<Self, KeyError> {
        const END: &str = "-----END OPENSSH PRIVATE KEY-----\n";
        let (pem, _) = text.split_once(END).ok_or_else(|| host_error("cut short"))?;
        let (pem, lines) = text.split_at(pem.len() + END.len());
        Self::parse(pem.as_bytes(), lines.as_bytes())
    }
}

impl fmt::Debug for PodKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PodKeys")
            .field("host", &self.fingerprint())
            .field("worker_node", &self.worker_node)
            .finish()
    }
}

#[cfg(test)]
#[path = "keys_tests.rs"]
mod tests;
