//! The certificate of an HTTPS KBS, from a CA made for it alone.

use std::sync::Arc;

use anyhow::{Context, Result};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use rustls::ServerConfig;
use rustls::pki_types::PrivatePkcs8KeyDer;

/// Certificate and key, ready to serve.
pub(super) struct ServerIdentity {
    ca_pem: String,
    config: Arc<ServerConfig>,
}

impl ServerIdentity {
    /// Makes the CA, the certificate for these names and addresses, and their keys.
    pub(super) fn generate(names: &[&str]) -> Result<Self> {
        let mut ca = CertificateParams::new(Vec::new()).context("KBS: CA parameters")?;
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        ca.distinguished_name.push(DnType::CommonName, "simulated KBS CA");
        let ca_key = KeyPair::generate().context("KBS: CA key")?;
        let ca_pem = ca.self_signed(&ca_key).context("KBS: CA certificate")?.pem();

        let names: Vec<_> = names.iter().copied().map(str::to_owned).collect();
        let leaf = CertificateParams::new(names).context("KBS: certificate parameters")?;
        let key = KeyPair::generate().context("KBS: key")?;
        let certificate = leaf.signed_by(&key, &Issuer::new(ca, ca_key)).context("KBS: certificate")?;

        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .context("KBS: TLS versions")?
            .with_no_client_auth()
            .with_single_cert(
                vec![certificate.der().clone()],
                PrivatePkcs8KeyDer::from(key.serialize_der()).into(),
            )
            .context("KBS: TLS configuration")?;
        Ok(Self { ca_pem, config: Arc::new(config) })
    }

    /// PEM of the CA that clients must trust.
    pub(super) fn ca_pem(&self) -> &str {
        &self.ca_pem
    }

    /// Configuration of the server.
    pub(super) fn config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.config)
    }
}
