//! The two key pairs, each half a type of its own, so that no role can be taken for another.

use std::fmt;
use std::sync::Arc;

use ed25519_dalek::SigningKey;
use ed25519_dalek::pkcs8::DecodePrivateKey;
use rand::TryRng;
use rand::rngs::SysRng;
use russh::keys::ssh_key::private::{Ed25519Keypair, KeypairData};
use russh::keys::ssh_key::public::{Ed25519PublicKey, KeyData};
use russh::keys::ssh_key::{self, LineEnding};
use russh::keys::{HashAlg, PrivateKey, PublicKey};
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The operating system gave no random numbers.
    #[error("make a key: the operating system gives no random numbers")]
    Random(#[source] rand::rngs::SysError),
    /// A key of another algorithm.
    #[error("read a key: it is not an Ed25519 key; use Ed25519 (ssh-keygen -t ed25519)")]
    NotEd25519,
    /// A key behind a passphrase.
    #[error(
        "read a key: it is encrypted with a passphrase; use a key without one (ssh-keygen -p removes it)"
    )]
    Encrypted,
    /// Not a key at all.
    #[error("read a key: not a private key in OpenSSH or PKCS#8 PEM")]
    Malformed,
    /// A key that could not be written as text.
    #[error("write a key")]
    Encode(#[source] ssh_key::Error),
}

fn generate() -> Result<PrivateKey, KeyError> {
    let mut seed = Zeroizing::new([0; 32]);
    SysRng.try_fill_bytes(seed.as_mut_slice()).map_err(KeyError::Random)?;
    Ok(PrivateKey::from(Ed25519Keypair::from_seed(&seed)))
}

fn decode(pem: &[u8]) -> Result<PrivateKey, KeyError> {
    let text = std::str::from_utf8(pem).map_err(|_| KeyError::Malformed)?.trim();
    let label =
        text.strip_prefix("-----BEGIN ").and_then(|rest| rest.split_once("-----")).map(|(label, _)| label);
    match label {
        Some("OPENSSH PRIVATE KEY") => decode_openssh(text),
        Some("PRIVATE KEY") => {
            // Another algorithm's key and a broken one look alike to the decoder; its object identifier does not.
            let key = SigningKey::from_pkcs8_pem(text).map_err(|error| match error {
                ed25519_dalek::pkcs8::Error::PublicKey(_) => KeyError::NotEd25519,
                _ => KeyError::Malformed,
            })?;
            Ok(PrivateKey::from(Ed25519Keypair::from(&key)))
        }
        Some("ENCRYPTED PRIVATE KEY") => Err(KeyError::Encrypted),
        Some("RSA PRIVATE KEY" | "EC PRIVATE KEY" | "DSA PRIVATE KEY") => Err(KeyError::NotEd25519),
        _ => Err(KeyError::Malformed),
    }
}

fn decode_openssh(text: &str) -> Result<PrivateKey, KeyError> {
    let key = PrivateKey::from_openssh(text).map_err(|error| match error {
        ssh_key::Error::AlgorithmUnknown | ssh_key::Error::AlgorithmUnsupported { .. } => {
            KeyError::NotEd25519
        }
        _ => KeyError::Malformed,
    })?;
    match key.key_data() {
        KeypairData::Ed25519(_) => Ok(key),
        KeypairData::Encrypted(_) => Err(KeyError::Encrypted),
        _ => Err(KeyError::NotEd25519),
    }
}

macro_rules! key_pair {
    ($private:ident, $public:ident, $whose:literal) => {
        #[doc = concat!("The private key of ", $whose, "; wiped when dropped, never shown.")]
        #[derive(Clone)]
        pub struct $private(Arc<PrivateKey>);

        impl $private {
            /// Makes a key from the operating system's randomness.
            ///
            /// # Errors
            /// The operating system has none.
            pub fn generate() -> Result<Self, KeyError> {
                Ok(Self(Arc::new(generate()?)))
            }

            /// Reads OpenSSH or PKCS#8 PEM.
            ///
            /// # Errors
            /// Anything but one Ed25519 private key without a passphrase.
            pub fn from_pem(pem: &[u8]) -> Result<Self, KeyError> {
                Ok(Self(Arc::new(decode(pem)?)))
            }

            /// The key as OpenSSH PEM.
            ///
            /// # Errors
            /// The encoder failed.
            pub fn to_pem(&self) -> Result<Zeroizing<String>, KeyError> {
                self.0.to_openssh(LineEnding::LF).map_err(KeyError::Encode)
            }

            /// The public half.
            ///
            /// # Errors
            /// Never for a key that these constructors made.
            pub fn public(&self) -> Result<$public, KeyError> {
                $public::from_ssh(self.0.public_key())
            }

            /// The key as the SSH library wants it.
            pub fn ssh(&self) -> Arc<PrivateKey> {
                Arc::clone(&self.0)
            }
        }

        impl fmt::Debug for $private {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($private), self.0.fingerprint(HashAlg::Sha256))
            }
        }

        #[doc = concat!("The public key of ", $whose, "; compared in constant time.")]
        #[derive(Clone, Copy)]
        pub struct $public(Ed25519PublicKey);

        impl $public {
            /// Takes what the SSH library presents, whatever its comment.
            ///
            /// # Errors
            /// It is not an Ed25519 key.
            pub fn from_ssh(key: &PublicKey) -> Result<Self, KeyError> {
                key.key_data().ed25519().map(|key| Self(*key)).ok_or(KeyError::NotEd25519)
            }

            /// The key as the SSH library wants it.
            pub fn ssh(&self) -> PublicKey {
                PublicKey::from(KeyData::Ed25519(self.0))
            }

            /// The key as one `authorized_keys` line, without a newline.
            ///
            /// # Errors
            /// The encoder failed.
            pub fn authorized_keys_line(&self) -> Result<String, KeyError> {
                self.ssh().to_openssh().map_err(KeyError::Encode)
            }
        }

        impl PartialEq for $public {
            fn eq(&self, other: &Self) -> bool {
                self.0.0.ct_eq(&other.0.0).into()
            }
        }

        impl Eq for $public {}

        impl fmt::Display for $public {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.ssh().fingerprint(HashAlg::Sha256))
            }
        }

        impl fmt::Debug for $public {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($public))
            }
        }
    };
}

key_pair!(WorkerNodeKey, WorkerNodePublic, "the worker node, with which it proves itself to every pod");
key_pair!(PodKey, PodPublic, "a pod, its SSH host key in the Kubernetes phase");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_goes_to_pem_and_comes_back() {
        let key = PodKey::generate().unwrap();
        let pem = key.to_pem().unwrap();
        assert!(pem.starts_with("-----BEGIN OPENSSH PRIVATE KEY-----\n"), "{}", &pem[..40]);
        assert_eq!(PodKey::from_pem(pem.as_bytes()).unwrap().public().unwrap(), key.public().unwrap());
    }

    #[test]
    fn two_keys_are_never_the_same() {
        let [a, b] = [(); 2].map(|()| WorkerNodeKey::generate().unwrap().public().unwrap());
        assert_ne!(a, b);
    }

    #[test]
    fn debug_shows_the_fingerprint_and_no_key() {
        let key = WorkerNodeKey::generate().unwrap();
        let public = key.public().unwrap();
        assert_eq!(format!("{key:?}"), format!("WorkerNodeKey({public})"));
        assert_eq!(format!("{public:?}"), format!("WorkerNodePublic({public})"));
        assert!(public.to_string().starts_with("SHA256:"));
    }

    #[test]
    fn a_public_key_is_one_authorized_keys_line() {
        let public = WorkerNodeKey::generate().unwrap().public().unwrap();
        let line = public.authorized_keys_line().unwrap();
        assert!(line.starts_with("ssh-ed25519 AAAA") && !line.contains('\n'), "{line}");
        let with_comment = PublicKey::from_openssh(&format!("{line} wn@example")).unwrap();
        assert_eq!(WorkerNodePublic::from_ssh(&with_comment).unwrap(), public);
    }

    #[test]
    fn what_is_no_key_is_refused() {
        let key = PodKey::generate().unwrap().to_pem().unwrap();
        for text in
            ["", "key", "-----BEGIN PRIVATE KEY-----\n-----END PRIVATE KEY-----", &key[..key.len() / 2]]
        {
            assert!(
                matches!(PodKey::from_pem(text.as_bytes()), Err(KeyError::Malformed)),
                "{:?}",
                text.get(..9)
            );
        }
        assert!(matches!(PodKey::from_pem(b"\xff"), Err(KeyError::Malformed)));
    }

    #[test]
    fn keys_that_other_tools_make_are_read_or_refused_with_advice() {
        let dir = tempfile::tempdir().unwrap();
        let made = |name: &str, command: &str, args: &[&str]| {
            let path = dir.path().join(name);
            let status = std::process::Command::new(command).args(args).arg(&path).output().unwrap();
            assert!(status.status.success(), "{status:?}");
            std::fs::read(path).unwrap()
        };
        let decoded = |pem: &[u8]| PodKey::from_pem(pem).map(|_| ()).map_err(|error| error.to_string());
        let ssh = |name, kind, phrase| made(name, "ssh-keygen", &["-q", "-t", kind, "-N", phrase, "-f"]);
        assert_eq!(decoded(&ssh("ed", "ed25519", "")), Ok(()));
        let not_ed25519 = "read a key: it is not an Ed25519 key; use Ed25519 (ssh-keygen -t ed25519)";
        assert_eq!(decoded(&ssh("rsa", "rsa", "")).unwrap_err(), not_ed25519);
        assert_eq!(decoded(&ssh("ec", "ecdsa", "")).unwrap_err(), not_ed25519);
        assert!(decoded(&ssh("locked", "ed25519", "secret")).unwrap_err().contains("passphrase"));
        let pkcs8 = |name, kind| made(name, "openssl", &["genpkey", "-quiet", "-algorithm", kind, "-out"]);
        assert_eq!(decoded(&pkcs8("p-ed", "ed25519")), Ok(()));
        assert_eq!(decoded(&pkcs8("p-rsa", "rsa")).unwrap_err(), not_ed25519);
    }
}
