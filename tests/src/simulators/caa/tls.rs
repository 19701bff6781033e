//! The TLS keys of CAA, in memory only: a client certificate and a CA for all pods, a server certificate for each.

use std::sync::Arc;

use anyhow::{Context, Result};
use rcgen::{BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio_rustls::TlsConnector;

/// Name that CAA asks each VM for if it has its own certificates.
const OWN_SERVER_NAME: &str = "podvm-server";

/// Where CAA has its certificates from.
#[derive(Clone, Debug)]
pub enum Certificates {
    /// It makes them, and a server's for each pod.
    PerPod,
    /// The operator has given them (`CACERT_FILE`, `CERT_FILE`, `CERT_KEY`).
    Own(OwnCertificates),
}

/// Certificates of the operator, PEM.
#[derive(Clone)]
pub struct OwnCertificates {
    /// The CA of the servers.
    pub ca: String,
    /// The client's certificate.
    pub certificate: String,
    /// Its key.
    pub key: String,
}

impl std::fmt::Debug for OwnCertificates {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OwnCertificates").finish_non_exhaustive()
    }
}

/// What makes the keys of pods and the connections to them.
pub(super) struct Client {
    config: Arc<ClientConfig>,
    /// CA and PEM of the client's certificate; none with the operator's certificates.
    made: Option<(Issuer<'static, KeyPair>, String)>,
}

/// The keys of a pod.
pub(super) enum PodKeys {
    /// Made by CAA, PEM.
    Made { server_name: String, key: String, certificate: String, client: String },
    /// The operator's; the pod has none.
    Own,
}

/// A connector, and the name to ask for.
pub(super) type Connector = (TlsConnector, ServerName<'static>);

impl Client {
    pub(super) fn new(certificates: &Certificates) -> Result<Self> {
        match certificates {
            Certificates::PerPod => Self::made(),
            Certificates::Own(own) => {
                let ca = CertificateDer::from_pem_slice(own.ca.as_bytes()).context("CAA: its CA")?;
                let certificate = CertificateDer::from_pem_slice(own.certificate.as_bytes());
                let key = PrivateKeyDer::from_pem_slice(own.key.as_bytes()).context("CAA: its key")?;
                let config = config(ca, certificate.context("CAA: its certificate")?, key)?;
                Ok(Self { config, made: None })
            }
        }
    }

    fn made() -> Result<Self> {
        let mut ca = organisation("agent-protocol-forwarder", Vec::new())?;
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca_key = KeyPair::generate().context("CAA: the key of its CA")?;
        let ca_certificate = ca.self_signed(&ca_key).context("CAA: the certificate of its CA")?;
        let key = KeyPair::generate().context("CAA: the client's key")?;
        let certificate = organisation("cloud-api-adaptor", Vec::new())?.self_signed(&key);
        let certificate = certificate.context("CAA: the client's certificate")?;
        let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());
        let config = config(ca_certificate.der().clone(), certificate.der().clone(), key)?;
        Ok(Self { config, made: Some((Issuer::new(ca, ca_key), certificate.pem())) })
    }

    /// The keys of a pod with this name of its server.
    pub(super) fn pod_keys(&self, server_name: &str) -> Result<PodKeys> {
        let Some((ca, client)) = &self.made else { return Ok(PodKeys::Own) };
        let key = KeyPair::generate().context("CAA: a server's key")?;
        let mut server = organisation("agent-protocol-forwarder", vec![server_name.to_owned()])?;
        server.distinguished_name.push(DnType::CommonName, server_name);
        let certificate = server.signed_by(&key, ca).context("CAA: a server's certificate")?;
        Ok(PodKeys::Made {
            server_name: server_name.to_owned(),
            key: key.serialize_pem(),
            certificate: certificate.pem(),
            client: client.clone(),
        })
    }

    /// What connects to a server of this name.
    pub(super) fn connector(&self, server_name: &str) -> Result<Connector> {
        let name = ServerName::try_from(server_name.to_owned());
        let name = name.with_context(|| format!("CAA: the server name {server_name:?}"))?;
        Ok((TlsConnector::from(Arc::clone(&self.config)), name))
    }
}

impl PodKeys {
    pub(super) fn server_name(&self) -> &str {
        match self {
            Self::Made { server_name, .. } => server_name,
            Self::Own => OWN_SERVER_NAME,
        }
    }
}

fn organisation(name: &str, server_names: Vec<String>) -> Result<CertificateParams> {
    let mut parameters = CertificateParams::new(server_names).context("CAA: certificate parameters")?;
    parameters.distinguished_name = DistinguishedName::new();
    parameters.distinguished_name.push(DnType::OrganizationName, name);
    Ok(parameters)
}

fn config(
    ca: CertificateDer<'static>,
    certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
) -> Result<Arc<ClientConfig>> {
    let mut roots = RootCertStore::empty();
    roots.add(ca).context("CAA: its CA")?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .context("CAA: TLS versions")?
        .with_root_certificates(roots)
        .with_client_auth_cert(vec![certificate], key)
        .context("CAA: its TLS configuration")?;
    Ok(Arc::new(config))
}
