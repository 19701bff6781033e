//! The check of the KBS's certificate against the file of `--kbs-ca`: signed by a CA of the file, or a certificate of it.
//!
//! | certificate of the KBS | decision |
//! | --- | --- |
//! | signed by a certificate of the file | as any TLS client: valid now, for this host name, for servers, not a CA itself |
//! | byte for byte in the file (pinned) | valid now; if it names hosts at all, then this one. It may be a CA, and of any issuer |
//! | anything else | refused |
//!
//! A pinned certificate without a host name is accepted for any host, because the operator chose this very certificate:
//! who holds its key is the KBS. TLS proves the key in both cases. Version 1 certificates are refused: rustls cannot
//! read them.

use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_name;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};

/// Accepts what webpki accepts, and the pinned certificates.
#[derive(Debug)]
pub(super) struct PinVerifier {
    webpki: Arc<WebPkiServerVerifier>,
    pinned: Vec<CertificateDer<'static>>,
}

impl PinVerifier {
    /// The text of the error is that of rustls: the roots are empty.
    pub(super) fn new(
        roots: RootCertStore,
        pinned: Vec<CertificateDer<'static>>,
        provider: Arc<CryptoProvider>,
    ) -> Result<Self, String> {
        let webpki = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider).build();
        Ok(Self { webpki: webpki.map_err(|error| error.to_string())?, pinned })
    }
}

/// Whether webpki found no fault but in who signed the certificate, or in that it is a CA. It checks the time first, in
/// `check_issuer_independent_properties`; a test holds it to that.
fn only_the_issuer_is_wrong(error: &Error) -> bool {
    match error {
        Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature) => true,
        Error::InvalidCertificate(CertificateError::Other(other)) => {
            other.to_string().contains("CaUsedAsEndEntity")
        }
        _ => false,
    }
}

/// Whether the certificate names no host at all.
fn names_no_host(error: &Error) -> bool {
    matches!(
        error,
        Error::InvalidCertificate(CertificateError::NotValidForNameContext { presented, .. }) if presented.is_empty()
    )
}

impl ServerCertVerifier for PinVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let result = self.webpki.verify_server_cert(end_entity, intermediates, name, ocsp_response, now);
        let Err(error) = result else { return result };
        if !self.pinned.iter().any(|pinned| pinned.as_ref() == end_entity.as_ref()) {
            return Err(error);
        }
        let fault = if only_the_issuer_is_wrong(&error) {
            verify_server_name(&ParsedCertificate::try_from(end_entity)?, name).err()
        } else {
            Some(error)
        };
        match fault {
            Some(error) if !names_no_host(&error) => Err(error),
            _ => Ok(ServerCertVerified::assertion()),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.webpki.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.webpki.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.webpki.supported_verify_schemes()
    }
}
