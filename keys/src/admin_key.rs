//! The key that signs the KBS admin's tokens.

use std::fmt;

use ed25519_dalek::{Signer, SigningKey};
use ssh_key::public::Ed25519PublicKey;
use ssh_key::{HashAlg, PublicKey};

use crate::error::{KeyError, PrivateKeyFault, PrivateKeyRole};
use crate::private_key;

/// The KBS admin's private key. Wiped on drop.
pub struct AdminKey(Box<SigningKey>);

impl AdminKey {
    /// Reads an Ed25519 private key: PEM, PKCS#8 or OpenSSH, not encrypted.
    ///
    /// # Errors
    /// The text is anything else.
    pub fn from_pem(pem: &[u8]) -> Result<Self, KeyError> {
        let error = |fault| KeyError::PrivateKey { role: PrivateKeyRole::Admin, fault };
        let key = private_key::parse(pem).map_err(error)?;
        // The reader returns Ed25519 keys only.
        let pair = key.key_data().ed25519();
        let pair = pair.ok_or_else(|| error(PrivateKeyFault::NotEd25519("it".into())))?;
        Ok(Self(Box::new(SigningKey::from_bytes(pair.private.as_ref()))))
    }

    /// The Ed25519 signature of `message` (RFC 8032).
    pub fn sign(&self, message: &[u8]) -> [u8; 64] {
        self.0.sign(message).to_bytes()
    }
}

impl fmt::Debug for AdminKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let public = PublicKey::from(Ed25519PublicKey(self.0.verifying_key().to_bytes()));
        write!(f, "AdminKey({})", public.fingerprint(HashAlg::Sha256))
    }
}

#[cfg(test)]
mod tests {
    use ed25519_dalek::{Signature, Verifier};

    use super::*;

    const PKCS8: &[u8] = include_bytes!("../testdata/ed25519.pkcs8");

    #[test]
    fn a_signature_verifies() {
        let key = AdminKey::from_pem(PKCS8).unwrap();
        let signature = Signature::from_bytes(&key.sign(b"message"));
        key.0.verifying_key().verify(b"message", &signature).unwrap();
    }

    #[test]
    fn debug_shows_the_fingerprint_only() {
        let key = AdminKey::from_pem(PKCS8).unwrap();
        let other = crate::PodKey::from_pem(PKCS8).unwrap();
        assert_eq!(format!("{key:?}"), format!("{other:?}").replace("PodKey", "AdminKey"));
    }

    #[test]
    fn advice_names_the_tool_for_admin_keys() {
        let text = AdminKey::from_pem(b"x").unwrap_err().to_string();
        assert_eq!(
            text,
            "reading the KBS admin's private key: not PEM: no '-----BEGIN' line; \
             give an unencrypted Ed25519 key (openssl genpkey -algorithm ed25519)"
        );
    }
}
