//! TLS to the KBS, with *ring*. It trusts the operator's CA or certificate alone, or else the system's CAs.

use std::path::Path;
use std::sync::Arc;

use rustls::client::danger::ServerCertVerifier;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{AlertDescription, CertificateError, ClientConfig, RootCertStore};
use url::{Host, Url};

use super::chain::{chain, root};
use super::pin::PinVerifier;
use super::{KbsError, KbsSettings};

/// `secp521r1` (RFC 5480, 2.1.1.1), as DER. *ring* has no signatures with this curve.
const P521: &[u8] = &[0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x23];

/// The TLS configuration with which this crate talks to the KBS, for a caller that looks at the connection itself.
///
/// # Errors
/// The CA cannot be read.
pub fn config(settings: &KbsSettings) -> Result<ClientConfig, KbsError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| KbsError::Setup(error.to_string()))?;
    if let Some(path) = &settings.ca {
        let failed = |cause: String| KbsError::Ca { path: path.to_owned(), cause };
        let (roots, certificates) = read_ca(path, &settings.url).map_err(failed)?;
        let verifier = PinVerifier::new(roots, certificates, provider).map_err(KbsError::Setup)?;
        let verifier: Arc<dyn ServerCertVerifier> = Arc::new(verifier);
        return Ok(builder.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth());
    }
    let roots = if settings.url.scheme() == "https" { system_roots() } else { RootCertStore::empty() };
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}

/// The certificates of the file, also as CAs.
fn read_ca(path: &Path, url: &Url) -> Result<(RootCertStore, Vec<CertificateDer<'static>>), String> {
    const FORM: &str = "name a PEM file with the CA's certificate, or with the KBS's own";
    let pem = std::fs::read(path).map_err(|error| format!("{error}; {FORM}"))?;
    let mut roots = RootCertStore::empty();
    let mut certificates = Vec::new();
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        let certificate = certificate.map_err(|error| format!("{error}; {FORM}"))?;
        roots.add(certificate.clone()).map_err(|error| format!("{error}; {FORM}"))?;
        certificates.push(certificate);
    }
    if roots.is_empty() {
        return Err(format!("no certificate in it; {FORM}"));
    }
    let p521 = |key: &[u8]| key.windows(P521.len()).any(|part| part == P521);
    if roots.roots.iter().all(|root| p521(&root.subject_public_key_info)) {
        return Err(format!("its key is on the curve P-521, which TLS cannot check here; {}", remedy(url)));
    }
    Ok((roots, certificates))
}

/// The system's CAs. If there are none, the handshake fails with an error that says what to do.
fn system_roots() -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    roots
}

/// How to make a certificate that the KBS at this URL can use.
fn remedy(url: &Url) -> String {
    let (name, kind) = match url.host() {
        Some(Host::Ipv4(ip)) => (ip.to_string(), "IP"),
        Some(Host::Ipv6(ip)) => (ip.to_string(), "IP"),
        Some(Host::Domain(name)) => (name.to_owned(), "DNS"),
        None => ("HOST".to_owned(), "DNS"),
    };
    format!(
        "make one for the KBS with: openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 365 \
         -subj /CN={name} -addext subjectAltName={kind}:{name} -keyout kbs.key -out kbs.pem; then give kbs.pem with \
         --kbs-ca"
    )
}

fn tls_error(error: &reqwest::Error) -> Option<&rustls::Error> {
    chain(error).find_map(|error| error.downcast_ref())
}

/// Why the server's certificate was refused, if it was, and what to do. A retry does not help then.
pub(super) fn refused_certificate(error: &reqwest::Error, url: &str) -> Option<String> {
    let Some(rustls::Error::InvalidCertificate(fault)) = tls_error(error) else { return None };
    let remedy = || Url::parse(url).map(|url| remedy(&url)).unwrap_or_default();
    Some(match fault {
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            "no known CA signed it; give the CA that signed it, or that very certificate, with --kbs-ca, or correct --kbs-url"
                .to_owned()
        }
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            format!("{fault}; renew it, or correct this node's clock")
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            format!("{fault}; correct this node's clock, or the KBS's when it made the certificate")
        }
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            format!("{fault}; correct the host in --kbs-url, or {}", remedy())
        }
        CertificateError::Other(other) if other.to_string().contains("CaUsedAsEndEntity") => {
            "it was made as a CA (CA:TRUE), as plain openssl req -x509 does; give that very certificate with --kbs-ca"
                .to_owned()
        }
        CertificateError::Other(other) if other.to_string().contains("UnsupportedCertVersion") => {
            format!("it is an X.509 certificate of version 1; {}", remedy())
        }
        #[expect(deprecated, reason = "rustls may still report the old name")]
        CertificateError::UnsupportedSignatureAlgorithm
        | CertificateError::UnsupportedSignatureAlgorithmContext { .. }
        | CertificateError::UnsupportedSignatureAlgorithmForPublicKeyContext { .. } => {
            format!("its signature is of a kind that TLS cannot check here, such as P-521; {}", remedy())
        }
        fault => format!("{fault}; correct --kbs-ca or --kbs-url, or {}", remedy()),
    })
}

/// What to do about a TLS handshake that failed for another reason than the certificate; `None` if it did not fail.
pub(super) fn handshake_hint(error: &reqwest::Error, url: &str) -> Option<String> {
    match tls_error(error) {
        Some(rustls::Error::AlertReceived(
            AlertDescription::HandshakeFailure | AlertDescription::InsufficientSecurity,
        )) => {
            let remedy = Url::parse(url).map(|url| remedy(&url)).unwrap_or_default();
            Some(format!(
                "; the key of its certificate may be of a kind that TLS cannot use here, such as P-521; {remedy}"
            ))
        }
        Some(rustls::Error::InvalidMessage(_)) => {
            Some("; does the KBS speak TLS there? If not, write http:// in --kbs-url".to_owned())
        }
        Some(_) => Some("; check the TLS configuration of the KBS".to_owned()),
        None if root(error).contains("tls handshake eof") => {
            Some("; does the KBS speak TLS there? If not, write http:// in --kbs-url".to_owned())
        }
        None => None,
    }
}
