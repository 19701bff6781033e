//! TLS to the KBS, with *ring*. It trusts the operator's CA alone, or else the system's CAs.

use std::error::Error;
use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};

use super::KbsError;
use super::KbsSettings;

pub(super) fn config(settings: &KbsSettings) -> Result<ClientConfig, KbsError> {
    let roots = match &settings.ca {
        Some(path) => ca_roots(path)?,
        None if settings.url.scheme() == "https" => system_roots(),
        None => RootCertStore::empty(),
    };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| KbsError::Setup(error.to_string()))?;
    Ok(config.with_root_certificates(roots).with_no_client_auth())
}

fn ca_roots(path: &Path) -> Result<RootCertStore, KbsError> {
    let failed = |cause: String| KbsError::Ca { path: path.to_owned(), cause };
    let pem = std::fs::read(path).map_err(|error| failed(error.to_string()))?;
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        let certificate = certificate.map_err(|error| failed(error.to_string()))?;
        roots.add(certificate).map_err(|error| failed(error.to_string()))?;
    }
    if roots.is_empty() { Err(failed("no certificate in it".to_owned())) } else { Ok(roots) }
}

/// The system's CAs. If there are none, the handshake fails with an error that says what to do.
fn system_roots() -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    roots
}

/// Why the server's certificate was refused, if it was. A retry does not help then.
pub(super) fn refused_certificate(error: &reqwest::Error) -> Option<String> {
    let mut next = error.source();
    while let Some(cause) = next {
        // `source` of an I/O error skips the error that it wraps.
        let held = cause.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        let tls = held.and_then(|held| held.downcast_ref()).or_else(|| cause.downcast_ref());
        if let Some(error @ rustls::Error::InvalidCertificate(_)) = tls {
            return Some(error.to_string());
        }
        next = held.map_or_else(|| cause.source(), |held| Some(held as &(dyn Error + 'static)));
    }
    None
}
