//! A type for each role of a key, each half of its own, so that no key can be taken for another.

use std::fmt;
use std::sync::Arc;

use ssh_key::public::{Ed25519PublicKey, KeyData};
use ssh_key::{HashAlg, LineEnding, PrivateKey, PublicKey};
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use crate::error::{KeyError, PrivateKeyRole};
use crate::private_key;

/// The agent's host key in the Attestation phase: made for one process, kept in memory only, proof of nothing.
#[derive(Clone)]
pub struct AttestationKey(Arc<PrivateKey>);

impl AttestationKey {
    /// Makes a key from the operating system's randomness.
    ///
    /// # Errors
    /// The operating system has none.
    pub fn generate() -> Result<Self, KeyError> {
        Ok(Self(Arc::new(private_key::generate()?)))
    }

    /// The key as the SSH library takes it.
    pub fn ssh(&self) -> Arc<PrivateKey> {
        Arc::clone(&self.0)
    }
}

impl fmt::Debug for AttestationKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AttestationKey({})", self.0.fingerprint(HashAlg::Sha256))
    }
}

macro_rules! key_pair {
    ($private:ident, $public:ident, $role:expr, $whose:literal) => {
        #[doc = concat!("The private key of ", $whose, "; wiped when dropped, never shown.")]
        // Behind a pointer: a value that moves leaves copies of the key behind.
        #[derive(Clone)]
        pub struct $private(Arc<PrivateKey>);

        impl $private {
            /// Makes a key from the operating system's randomness.
            ///
            /// # Errors
            /// The operating system has none.
            pub fn generate() -> Result<Self, KeyError> {
                Ok(Self(Arc::new(private_key::generate()?)))
            }

            /// Reads an Ed25519 private key: PEM, OpenSSH or PKCS#8, not encrypted. A comment in it is dropped.
            ///
            /// # Errors
            /// The text is anything else.
            pub fn from_pem(pem: &[u8]) -> Result<Self, KeyError> {
                let key = private_key::parse(pem);
                Ok(Self(Arc::new(key.map_err(|fault| KeyError::PrivateKey { role: $role, fault })?)))
            }

            /// The key as OpenSSH PEM.
            ///
            /// # Errors
            /// The encoder failed.
            pub fn to_pem(&self) -> Result<Zeroizing<String>, KeyError> {
                self.0.to_openssh(LineEnding::LF).map_err(KeyError::encode)
            }

            /// The public half.
            ///
            /// # Errors
            /// Never for a key that these constructors made.
            pub fn public(&self) -> Result<$public, KeyError> {
                $public::from_ssh(self.0.public_key())
            }

            /// The SHA256 fingerprint, as `ssh-keygen -l` prints it.
            pub fn fingerprint(&self) -> String {
                self.0.fingerprint(HashAlg::Sha256).to_string()
            }

            /// The key as the SSH library takes it.
            pub fn ssh(&self) -> Arc<PrivateKey> {
                Arc::clone(&self.0)
            }
        }

        impl fmt::Debug for $private {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($private), self.fingerprint())
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

            /// The key as the SSH library takes it.
            pub fn ssh(&self) -> PublicKey {
                PublicKey::from(KeyData::Ed25519(self.0))
            }

            /// The key as one `authorized_keys` line, without a newline.
            ///
            /// # Errors
            /// The encoder failed.
            pub fn authorized_keys_line(&self) -> Result<String, KeyError> {
                self.ssh().to_openssh().map_err(KeyError::encode)
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

key_pair!(PodKey, PodPublic, PrivateKeyRole::Pod, "a pod, its SSH host key in the Kubernetes phase");
key_pair!(
    WorkerNodeKey,
    WorkerNodePublic,
    PrivateKeyRole::WorkerNode,
    "the worker node, with which it logs in to its pods' VMs"
);

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
    fn errors_name_the_role() {
        let text = PodKey::from_pem(b"").unwrap_err().to_string();
        assert!(text.starts_with("reading the pod's private key: it is empty; "), "{text}");
        let text = WorkerNodeKey::from_pem(b"").unwrap_err().to_string();
        assert!(text.starts_with("reading the worker node's private key: it is empty; "), "{text}");
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
        let fault = |pem: &[u8]| decoded(pem).unwrap_err();
        assert!(fault(&ssh("rsa", "rsa", "")).contains("a key of type ssh-rsa is not an Ed25519 key"));
        assert!(fault(&ssh("ec", "ecdsa", "")).contains("ecdsa-sha2-nistp256 is not an Ed25519 key"));
        assert!(fault(&ssh("locked", "ed25519", "secret")).contains("it is encrypted; give an unencrypted"));
        let pkcs8 = |name, kind| made(name, "openssl", &["genpkey", "-quiet", "-algorithm", kind, "-out"]);
        assert_eq!(decoded(&pkcs8("p-ed", "ed25519")), Ok(()));
        assert!(fault(&pkcs8("p-rsa", "rsa")).contains("not an Ed25519 key in PKCS#8"));
    }
}
