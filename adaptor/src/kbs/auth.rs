//! The KBS admin's token: a short-lived JWT, made for each request, in the form that every Trustee release accepts.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64ct::{Base64UrlUnpadded, Encoding};
use secure_comms_keys::{AdminKey, KeyError};
use secure_comms_protocol::limits::KEY_MAX;
use serde_json::json;
use zeroize::Zeroizing;

/// Lifetime of a token: enough for one request, and for clocks that differ somewhat.
pub(crate) const LIFETIME: Duration = Duration::from_secs(120);
const SUBJECT: &str = "secure-comms-adaptor";

/// Error of reading the admin's key.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The key file cannot be read.
    #[error("read the KBS admin key {} (--kbs-admin-key)", .path.display())]
    Read {
        /// Path of the file.
        path: PathBuf,
        /// Error of the operating system.
        #[source]
        source: std::io::Error,
    },
    /// The key file holds something else.
    #[error("read the KBS admin key {} (--kbs-admin-key)", .path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// What is wrong with its content.
        #[source]
        source: KeyError,
    },
}

/// An admin of the KBS.
pub(crate) struct Admin {
    key: AdminKey,
    issuer: String,
    role: String,
}

impl std::fmt::Debug for Admin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Admin")
            .field("issuer", &self.issuer)
            .field("role", &self.role)
            .finish_non_exhaustive()
    }
}

impl Admin {
    /// Reads the admin's key. The file's mode is not checked, because Kubernetes chooses the mode of a mounted secret.
    ///
    /// # Errors
    /// It cannot be read, or is not an unencrypted Ed25519 private key.
    pub(crate) fn read(path: &Path, issuer: &str, role: &str) -> Result<Self, TokenError> {
        let mut pem = Zeroizing::new(Vec::with_capacity(KEY_MAX));
        File::open(path)
            .and_then(|file| file.take(KEY_MAX as u64).read_to_end(&mut pem))
            .map_err(|source| TokenError::Read { path: path.to_owned(), source })?;
        let key =
            AdminKey::from_pem(&pem).map_err(|source| TokenError::Key { path: path.to_owned(), source })?;
        Ok(Self { key, issuer: issuer.to_owned(), role: role.to_owned() })
    }

    /// A token that is valid from `now` for [`LIFETIME`]. It has no `aud`, because Trustee v0.18 to v0.20 refuse one.
    pub(crate) fn token(&self, now: SystemTime) -> Zeroizing<String> {
        let issued = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let header = json!({"alg": "EdDSA", "typ": "JWT"});
        let claims = json!({
            "iss": self.issuer, "sub": SUBJECT, "role": self.role,
            "iat": issued, "exp": issued + LIFETIME.as_secs(),
        });
        let encode = |part: serde_json::Value| Base64UrlUnpadded::encode_string(part.to_string().as_bytes());
        let signed = format!("{}.{}", encode(header), encode(claims));
        let signature = Base64UrlUnpadded::encode_string(&self.key.sign(signed.as_bytes()));
        Zeroizing::new(format!("{signed}.{signature}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ed25519_dalek::pkcs8::EncodePrivateKey;
    use ed25519_dalek::{Signature, SigningKey, Verifier};

    #[test]
    fn a_token_has_exactly_the_claims_that_trustee_accepts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let key = SigningKey::from_bytes(&[7; 32]);
        std::fs::write(&path, key.to_pkcs8_pem(Default::default()).unwrap()).unwrap();
        let admin = Admin::read(&path, "me", "admin").unwrap();
        let token = admin.token(UNIX_EPOCH + Duration::from_millis(1_000_900));
        let parts: Vec<&str> = token.split('.').collect();
        let decode = |part: &str| Base64UrlUnpadded::decode_vec(part).unwrap();
        let json = |part: &str| serde_json::from_slice::<serde_json::Value>(&decode(part)).unwrap();
        assert_eq!(json(parts[0]), json!({"alg": "EdDSA", "typ": "JWT"}));
        let claims =
            json!({"iss": "me", "sub": "secure-comms-adaptor", "role": "admin", "iat": 1000, "exp": 1120});
        assert_eq!(json(parts[1]), claims);
        let signature = Signature::from_slice(&decode(parts[2])).unwrap();
        key.verifying_key().verify(format!("{}.{}", parts[0], parts[1]).as_bytes(), &signature).unwrap();
        assert_eq!(format!("{admin:?}"), r#"Admin { issuer: "me", role: "admin", .. }"#);
    }

    #[test]
    fn a_file_without_an_ed25519_key_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let error = Admin::read(&path, "i", "r").unwrap_err();
        assert_eq!(error.to_string(), format!("read the KBS admin key {} (--kbs-admin-key)", path.display()));
        for text in ["", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"] {
            std::fs::write(&path, text).unwrap();
            let error = Admin::read(&path, "i", "r").unwrap_err();
            assert_eq!(
                error.to_string(),
                format!("read the KBS admin key {} (--kbs-admin-key)", path.display())
            );
            let source = std::error::Error::source(&error).unwrap().to_string();
            assert!(
                source.contains("the KBS admin's private key") && source.contains("openssl genpkey"),
                "{source}"
            );
        }
    }
}
