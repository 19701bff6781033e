//! The one reader of public keys: `authorized_keys` lines (sshd(8)), Ed25519 only, without options.
//!
//! A line is read as sshd reads it: any blanks between its words, any comment. Other than in sshd, a line that is not read
//! fails the whole text: the operator learns of it when the text is given, not when a worker node can't log in.

use std::fmt;

use ed25519_dalek::VerifyingKey;
use ssh_key::public::{Ed25519PublicKey, KeyData};
use ssh_key::{HashAlg, PublicKey};
use subtle::{Choice, ConstantTimeEq};

use crate::error::{KeyError, PublicKeyFault, checked_text, scrubbed};

/// The other types of keys. An error names only these: in a damaged list any word may be a secret.
const OTHER_TYPES: &[&str] = &[
    "ssh-rsa",
    "ssh-dss",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    "sk-ssh-ed25519@openssh.com",
    "sk-ecdsa-sha2-nistp256@openssh.com",
    "ssh-ed25519-cert-v01@openssh.com",
    "ssh-rsa-cert-v01@openssh.com",
    "ecdsa-sha2-nistp256-cert-v01@openssh.com",
];

/// The public keys of the worker nodes that may log in; at least one.
#[derive(Clone, PartialEq, Eq)]
pub struct WorkerNodeKeys(Vec<Ed25519PublicKey>);

impl WorkerNodeKeys {
    /// Reads `authorized_keys` lines. Blank lines and comments are skipped, duplicates dropped. Words may be apart by any
    /// blanks; what follows the key is a comment, in any encoding.
    ///
    /// # Errors
    /// A line is not an Ed25519 key, or the text has no key.
    pub fn parse(lines: &[u8]) -> Result<Self, KeyError> {
        Self::read(lines).map_err(KeyError::WorkerNodeKeys)
    }

    fn read(lines: &[u8]) -> Result<Self, PublicKeyFault> {
        let mut keys: Vec<Ed25519PublicKey> = Vec::new();
        for (line, number) in checked_text(lines)?.lines().map(str::trim).zip(1..) {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let key = parse_line(line).map_err(|fault| PublicKeyFault::Line { number, fault })?;
            if !keys.contains(&key) {
                keys.push(key);
            }
        }
        if keys.is_empty() { Err(PublicKeyFault::NoKey) } else { Ok(Self(keys)) }
    }

    /// Whether `key` is one of these. The time it takes does not depend on which of them it is, if any.
    pub fn matches(&self, key: &PublicKey) -> bool {
        let KeyData::Ed25519(key) = key.key_data() else { return false };
        let found = self.0.iter().fold(Choice::from(0), |found, own| found | own.0.ct_eq(&key.0));
        found.into()
    }

    /// The keys' SHA256 fingerprints, as `ssh-keygen -l` prints them.
    pub fn fingerprints(&self) -> impl Iterator<Item = String> {
        self.0.iter().map(|key| PublicKey::from(*key).fingerprint(HashAlg::Sha256).to_string())
    }

    /// The keys as `authorized_keys` lines, which [`Self::parse`] reads.
    ///
    /// # Errors
    /// A key can't be encoded.
    pub fn to_lines(&self) -> Result<String, KeyError> {
        let mut lines = String::new();
        for key in &self.0 {
            lines.push_str(&PublicKey::from(*key).to_openssh().map_err(KeyError::encode)?);
            lines.push('\n');
        }
        Ok(lines)
    }
}

impl fmt::Debug for WorkerNodeKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.fingerprints()).finish()
    }
}

fn parse_line(line: &str) -> Result<Ed25519PublicKey, String> {
    let is_type = |word: &str| ["ssh-", "ecdsa-", "sk-"].iter().any(|prefix| word.starts_with(prefix));
    let mut words = line.split_whitespace();
    let first = words.next().unwrap_or_default();
    if first != "ssh-ed25519" {
        return Err(if is_type(first) {
            format!("a key of {} is not an Ed25519 key", type_named(first))
        } else if words.any(is_type) {
            "options before the key are not supported; remove them".to_owned()
        } else {
            "not a public key".to_owned()
        });
    }
    // Between these two the decoder wants one blank, and no comment.
    let key = format!("{first} {}", words.next().unwrap_or_default());
    let key =
        PublicKey::from_openssh(key.trim_end()).map_err(|error| format!("bad key: {}", scrubbed(&error)))?;
    let KeyData::Ed25519(key) = key.key_data() else { return Err("bad key: not what its type says".into()) };
    // With a point of small order, signatures that verify can be made without the private key.
    match VerifyingKey::from_bytes(&key.0) {
        Ok(point) if !point.is_weak() => Ok(*key),
        _ => Err("bad key: not a point that can verify signatures".into()),
    }
}

fn type_named(word: &str) -> String {
    let known = OTHER_TYPES.iter().find(|known| **known == word);
    known.map_or_else(|| "an unknown type".to_owned(), |known| format!("type {known}"))
}

#[cfg(test)]
#[path = "public_key_tests.rs"]
mod tests;
