//! The end of a handshake that was held: the pod's keys, and the proof that the client is cloud-api-adaptor.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustls_pki_types::{CertificateDer, UnixTime};
use secure_comms_keys::text::one_line;
use socket2::SockRef;
use tokio::net::TcpStream;
use tokio_rustls::StartHandshake;
use tokio_rustls::rustls::client::danger::HandshakeSignatureValid;
use tokio_rustls::rustls::crypto::ring::sign::any_supported_type;
use tokio_rustls::rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use tokio_rustls::rustls::server::NoServerSessionStorage;
use tokio_rustls::rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use tokio_rustls::rustls::sign::{CertifiedKey, SingleCertAndKey};
use tokio_rustls::rustls::version::{TLS12, TLS13};
use tokio_rustls::rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, ServerConfig, SignatureScheme,
};
use tokio_rustls::server::TlsStream;

use super::refusal::Refusal;
use crate::caa::identity::TlsIdentity;

/// The longest error of the other end's, in bytes.
const MAX_TEXT: usize = 200;

/// A connection of cloud-api-adaptor's, which has proven that it is it.
#[derive(Debug)]
pub struct CaaStream(pub(super) TlsStream<TcpStream>);

/// Why a handshake was not ended.
#[derive(Debug, thiserror::Error)]
pub enum FinishError {
    /// The client asked for another server.
    #[error("the client asks for {asked}, and the keys are those of {named}")]
    OtherName {
        /// What it asks for.
        asked: String,
        /// What the keys are for.
        named: String,
    },
    /// The key does not fit the certificate, or either is broken.
    #[error("the server key and certificate of the pod are of no use: {0}")]
    Identity(Error),
    /// The client presented no certificate.
    #[error("the client presented no certificate")]
    NoClientCertificate,
    /// The client presented another certificate than the pod's directory has.
    #[error("the client presented another certificate than cloud-api-adaptor's for this pod")]
    OtherClientCertificate,
    /// The client does not accept what we offer, for example our certificate.
    #[error("the client refused: {0}")]
    Refused(String),
    /// The client's TLS is faulty, for example a signature.
    #[error("the TLS handshake failed: {0}")]
    Tls(String),
    /// The client has closed the connection.
    #[error("the client has closed the connection: {0}")]
    Closed(io::Error),
    /// The client did not go on in time.
    #[error("the client did not go on with the handshake within {} s", .0.as_secs())]
    Timeout(Duration),
}

impl FinishError {
    /// The kind of refusal.
    pub fn refusal(&self) -> Refusal {
        match self {
            Self::OtherName { .. } | Self::Identity(_) => Refusal::BadIdentity,
            Self::NoClientCertificate => Refusal::NoClientCertificate,
            Self::OtherClientCertificate => Refusal::OtherClientCertificate,
            Self::Refused(_) | Self::Tls(_) | Self::Closed(_) => Refusal::Handshake,
            Self::Timeout(_) => Refusal::HandshakeTimeout,
        }
    }
}

impl From<io::Error> for FinishError {
    fn from(error: io::Error) -> Self {
        let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<Error>());
        match tls {
            None => Self::Closed(error),
            Some(Error::NoCertificatesPresented) => Self::NoClientCertificate,
            Some(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure)) => {
                Self::OtherClientCertificate
            }
            Some(Error::AlertReceived(alert)) => Self::Refused(format!("{alert:?}")),
            Some(error) => Self::Tls(one_line(&error.to_string(), MAX_TEXT)),
        }
    }
}

/// Goes on where the hello was read.
pub(super) async fn handshake(
    start: StartHandshake<TcpStream>,
    config: ServerConfig,
) -> Result<CaaStream, FinishError> {
    let stream = start.into_stream(Arc::new(config)).await?;
    // A connection that has been used does not end with a reset: all that was sent arrives.
    SockRef::from(stream.get_ref().0).set_linger(None).map_err(FinishError::Closed)?;
    Ok(CaaStream(stream))
}

/// What the pod's keys make for a client that asks for `asked`.
pub(super) fn server_config(asked: &str, identity: &TlsIdentity) -> Result<ServerConfig, FinishError> {
    let named = &identity.server_name;
    match named.eq_ignore_ascii_case(asked) {
        true => server(identity).map_err(FinishError::Identity),
        false => Err(FinishError::OtherName { asked: asked.to_owned(), named: named.clone() }),
    }
}

/// TLS 1.2 and 1.3. No session is resumed: each handshake shows both certificates.
fn server(identity: &TlsIdentity) -> Result<ServerConfig, Error> {
    let provider = Arc::new(ring::default_provider());
    let client = OneClient { certificate: identity.client.clone(), provider: Arc::clone(&provider) };
    // Not `with_single_cert`, which wants a copy of the key that nothing wipes.
    let key = CertifiedKey::new(vec![identity.certificate.clone()], any_supported_type(&identity.key)?);
    key.keys_match()?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13, &TLS12])?
        .with_client_cert_verifier(Arc::new(client))
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(key)));
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// Accepts the holder of one certificate, byte for byte. The certificate needs no issuer, no date and no name: it was
/// received from who presents it, over the pods directory.
#[derive(Debug)]
struct OneClient {
    certificate: CertificateDer<'static>,
    provider: Arc<CryptoProvider>,
}

impl ClientCertVerifier for OneClient {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        match *end_entity == self.certificate {
            true => Ok(ClientCertVerified::assertion()),
            false => Err(CertificateError::ApplicationVerificationFailure.into()),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, signed, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, signed, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
