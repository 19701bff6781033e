//! Measured events.

use sha2::{Digest, Sha256, Sha384};

/// Digests of what is measured, one for each bank that is predicted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Digests {
    /// For a TPM's SHA-256 bank.
    pub sha256: [u8; 32],
    /// For TDX's RTMRs.
    pub sha384: [u8; 48],
}

impl Digests {
    /// Digests of the concatenation of `parts`.
    pub fn of<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let (mut sha256, mut sha384) = (Sha256::new(), Sha384::new());
        for part in parts {
            sha256.update(part);
            sha384.update(part);
        }
        Self { sha256: sha256.finalize().into(), sha384: sha384.finalize().into() }
    }
}

/// One event of a boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Register that it extends.
    pub pcr: u8,
    /// What is measured, for people.
    pub what: String,
    /// Its digests.
    pub digests: Digests,
}

impl Event {
    /// Event of `pcr` that measures `bytes`.
    pub fn new(pcr: u8, what: impl Into<String>, bytes: &[u8]) -> Self {
        Self { pcr, what: what.into(), digests: Digests::of([bytes]) }
    }

    /// The four zero bytes by which firmware separates what is measured before a boot option from what is measured after.
    pub fn separator(pcr: u8) -> Self {
        Self::new(pcr, "separator", &[0; 4])
    }
}
