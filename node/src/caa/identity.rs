//! The keys of a TLS connection of cloud-api-adaptor, read from PEM and checked against each other.

use std::fmt;

use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, DnsName, PrivateKeyDer};
use tokio_rustls::rustls::crypto::ring::sign::any_supported_type;
use tokio_rustls::rustls::sign::CertifiedKey;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer as _, X509Certificate};
use zeroize::Zeroize as _;

/// The server name that cloud-api-adaptor asks each VM for if it has certificates of its own.
pub const STRICT_SERVER_NAME: &str = "podvm-server";

/// What the server of a TLS connection of cloud-api-adaptor's needs. The key is wiped on drop.
pub struct TlsIdentity {
    /// The name that cloud-api-adaptor asks for (SNI), in lower case: the DNS name in the certificate.
    pub server_name: String,
    /// The server's private key, which fits the certificate.
    pub key: PrivateKeyDer<'static>,
    /// The server's certificate.
    pub certificate: CertificateDer<'static>,
    /// The client's certificate, which must be presented byte for byte.
    pub client: CertificateDer<'static>,
}

/// Why three PEM texts are not the keys of a TLS connection. No text of a key is quoted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// A certificate cannot be used.
    #[error("the {whose} certificate {fault}")]
    Certificate {
        /// The server's or the client's.
        whose: Whose,
        /// What is wrong with it.
        fault: &'static str,
    },
    /// The key cannot be used.
    #[error("the server's private key {0}")]
    Key(&'static str),
    /// Key and certificate are of two pairs.
    #[error("the server's private key does not fit its certificate for '{0}'")]
    Mismatch(String),
}

/// Whose certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose {
    /// The server's, which is ours.
    Server,
    /// The client's, which is cloud-api-adaptor's.
    Client,
}

impl fmt::Display for Whose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Server => "server's",
            Self::Client => "client's",
        })
    }
}

impl TlsIdentity {
    /// Reads the server's key, its certificate and the client's certificate, each one PEM text with one item.
    ///
    /// # Errors
    /// A text is not what it should be, the server's certificate has not exactly one DNS name, or the key does not fit it.
    pub fn from_pem(key: &[u8], certificate: &[u8], client: &[u8]) -> Result<Self, IdentityError> {
        let certificate = one_certificate(certificate, Whose::Server)?;
        let server_name = dns_name(&certificate)?;
        let client = one_certificate(client, Whose::Client)?;
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| IdentityError::Key("is not PEM"))?;
        // From here on the key is wiped, also if it is refused.
        let identity = Self { server_name, key, certificate, client };
        identity.check_key()?;
        Ok(identity)
    }

    fn check_key(&self) -> Result<(), IdentityError> {
        let key = any_supported_type(&self.key)
            .map_err(|_| IdentityError::Key("is of no kind that can be used (ECDSA P-256 is expected)"))?;
        let pair = CertifiedKey::new(vec![self.certificate.clone()], key);
        pair.keys_match().map_err(|_| IdentityError::Mismatch(self.server_name.clone()))
    }
}

impl Drop for TlsIdentity {
    fn drop(&mut self) {
        self.key.zeroize();
    }
}

impl fmt::Debug for TlsIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsIdentity").field("server_name", &self.server_name).finish_non_exhaustive()
    }
}

/// The server's name in a PEM text with its certificate, without a look at keys.
pub(super) fn server_name(certificate: &[u8]) -> Result<String, IdentityError> {
    dns_name(&one_certificate(certificate, Whose::Server)?)
}

fn one_certificate(pem: &[u8], whose: Whose) -> Result<CertificateDer<'static>, IdentityError> {
    let fault = |fault| IdentityError::Certificate { whose, fault };
    let mut certificates = CertificateDer::pem_slice_iter(pem);
    let first = certificates.next().and_then(Result::ok).ok_or_else(|| fault("is not PEM"))?;
    if certificates.next().is_some() {
        return Err(fault("is followed by something else: one certificate is expected"));
    }
    match X509Certificate::from_der(&first) {
        Ok(([], _)) => Ok(first.clone()),
        _ => Err(fault("is not an X.509 certificate")),
    }
}

/// The only DNS name that the certificate is for, in lower case.
fn dns_name(certificate: &CertificateDer<'_>) -> Result<String, IdentityError> {
    let fault = |fault| IdentityError::Certificate { whose: Whose::Server, fault };
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|_| fault("is not X.509"))?;
    let names =
        parsed.subject_alternative_name().map_err(|_| fault("has subject names that cannot be read"))?;
    let names = names.map(|names| names.value.general_names.as_slice()).unwrap_or_default();
    let mut names = names.iter().filter_map(|name| match name {
        GeneralName::DNSName(name) => Some(*name),
        _ => None,
    });
    match (names.next(), names.next()) {
        (Some(name), None) if DnsName::try_from(name).is_ok() => Ok(name.to_ascii_lowercase()),
        (Some(_), None) => Err(fault("is for a name that is no DNS name")),
        (None, _) => Err(fault("has no DNS name, which cloud-api-adaptor would ask for")),
        (Some(_), Some(_)) => {
            Err(fault("has more than one DNS name: which of them is asked for is not known"))
        }
    }
}
