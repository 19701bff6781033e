//! The certificates of the strict variant: made once, and the same on each node of the cluster.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, ExtendedKeyUsagePurpose,
    IsCa, KeyPair, KeyUsagePurpose,
};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use secure_comms_keys::{FileError, private_directory, private_file};
use tokio_rustls::rustls::client::WebPkiServerVerifier;
use tokio_rustls::rustls::client::danger::ServerCertVerifier as _;
use tokio_rustls::rustls::crypto::ring::default_provider;
use tokio_rustls::rustls::{self, RootCertStore};
use zeroize::Zeroizing;

use crate::caa::identity::{IdentityError, STRICT_SERVER_NAME as SERVER_NAME, TlsIdentity};

/// How long the certificates are valid, in days: ten years. To replace them costs each node a restart of cloud-api-adaptor,
/// and with it all peer pods of the node.
pub const VALIDITY_DAYS: u64 = 3653;

/// Clocks may differ by this.
const CLOCK_SKEW: Duration = Duration::from_secs(24 * 3600);

/// The largest file that is read, in bytes.
const SIZE_MAX: usize = 64 * 1024;

/// The names that `existingTlsSecretName` of cloud-api-adaptor's chart has.
const CA: &str = "ca.crt";
const CLIENT: &str = "client.crt";
const CLIENT_KEY: &str = "client.key";
/// These never leave the adaptors.
const SERVER: &str = "server.crt";
const SERVER_KEY: &str = "server.key";

/// Why there are no certificates.
#[derive(Debug, thiserror::Error)]
pub enum StrictError {
    /// A file cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// There are some already.
    #[error(
        "{} is there already: with new certificates cloud-api-adaptor has to be restarted on each node; to replace them, \
         use --overwrite",
        .0.display()
    )]
    Exists(PathBuf),
    /// They could not be made.
    #[error("make certificates")]
    Make(#[from] rcgen::Error),
    /// A file is not what it should be.
    #[error("the certificates in {}: {cause}; make new ones: secure-comms-adaptor caa-certs", directory.display())]
    Identity {
        /// Their directory.
        directory: PathBuf,
        /// What is wrong.
        cause: IdentityError,
    },
    /// cloud-api-adaptor would refuse the server's certificate.
    #[error(
        "the certificates in {}: cloud-api-adaptor would refuse {SERVER} by {CA}: {reason}; make new ones: \
         secure-comms-adaptor caa-certs --overwrite",
        directory.display()
    )]
    Refused {
        /// Their directory.
        directory: PathBuf,
        /// Why.
        reason: String,
    },
}

/// Certificates that were made. Its text is what an operator has to set in cloud-api-adaptor.
#[derive(Debug)]
pub struct Made {
    directory: PathBuf,
}

impl fmt::Display for Made {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let directory = self.directory.display();
        write!(
            f,
            "\
Made in {directory}, valid for {VALIDITY_DAYS} days: {CA} {CLIENT} {CLIENT_KEY} {SERVER} {SERVER_KEY}

1. cloud-api-adaptor gets the first three, as a Secret in its namespace:
   kubectl -n confidential-containers-system create secret generic caa-secure-comms \\
     --from-file={directory}/{CA} --from-file={directory}/{CLIENT} --from-file={directory}/{CLIENT_KEY}
2. In the values of its chart (<provider> as in CLOUD_PROVIDER):
   secrets:
     existingTlsSecretName: caa-secure-comms
   providerConfigs:
     <provider>:
       CACERT_FILE: /etc/certificates/{CA}
       CERT_FILE: /etc/certificates/{CLIENT}
       CERT_KEY: /etc/certificates/{CLIENT_KEY}
3. The adaptor of each node gets {CA}, {CLIENT}, {SERVER} and {SERVER_KEY}, the same on all nodes: put them into a directory
   that only root can read, and name it by --certificates. {SERVER_KEY} goes nowhere else.
4. Remove {CLIENT_KEY} here. The key of the certificate authority was not kept.
"
        )
    }
}

/// Makes a certificate authority, and by it a certificate for the server and one for the client (ECDSA P-256, valid for
/// [`VALIDITY_DAYS`]), in a directory that is made if it is not there. The files are ours alone (0600). The authority's key is
/// not kept: there will never be a third certificate.
///
/// # Errors
/// They are there already and are not to be overwritten, or a file cannot be written; then the set may be incomplete, which
/// [`load`] finds out.
pub fn make(directory: &Path, overwrite: bool) -> Result<Made, StrictError> {
    private_directory::own_directory(directory)?;
    let at = |name: &str| directory.join(name);
    if !overwrite {
        let mut paths = [CA, CLIENT, CLIENT_KEY, SERVER, SERVER_KEY].into_iter().map(at);
        // A dangling link is something as well.
        if let Some(path) = paths.find(|path| path.symlink_metadata().is_ok()) {
            return Err(StrictError::Exists(path));
        }
    }
    let mut ca = parameters("Secure Comms for cloud-api-adaptor");
    ca.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    ca.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let ca_key = Zeroizing::new(KeyPair::generate()?);
    let ca = CertifiedIssuer::self_signed(ca, &*ca_key)?;
    let mut server = parameters(SERVER_NAME);
    server.subject_alt_names = vec![rcgen::SanType::DnsName(SERVER_NAME.try_into()?)];
    server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let mut client = parameters("cloud-api-adaptor");
    client.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    let (server, server_key) = issue(&server, &ca)?;
    let (client, client_key) = issue(&client, &ca)?;
    for (name, text) in [
        (CA, ca.pem().as_bytes()),
        (CLIENT, client.as_bytes()),
        (CLIENT_KEY, client_key.as_bytes()),
        (SERVER, server.as_bytes()),
        (SERVER_KEY, server_key.as_bytes()),
    ] {
        private_file::replace(&at(name), text)?;
    }
    Ok(Made { directory: directory.to_owned() })
}

fn parameters(name: &str) -> CertificateParams {
    let mut parameters = CertificateParams::default();
    let now = SystemTime::now();
    parameters.not_before = (now - CLOCK_SKEW).into();
    parameters.not_after = (now + Duration::from_secs(VALIDITY_DAYS * 24 * 3600)).into();
    parameters.distinguished_name = DistinguishedName::new();
    parameters.distinguished_name.push(DnType::CommonName, name);
    parameters
}

/// A new key and its certificate, as PEM.
fn issue(
    parameters: &CertificateParams,
    ca: &CertifiedIssuer<'_, &KeyPair>,
) -> Result<(String, Zeroizing<String>), StrictError> {
    let key = Zeroizing::new(KeyPair::generate()?);
    let certificate = parameters.signed_by(&*key, ca)?;
    Ok((certificate.pem(), Zeroizing::new(key.serialize_pem())))
}

/// Reads the certificates and the server's key in a directory, and checks that cloud-api-adaptor would accept them now. The
/// key must be ours alone; symbolic links are followed, as a mounted Secret has them.
///
/// # Errors
/// A file is not there or open to others, the key does not fit its certificate, the server's certificate is not of the
/// authority, has expired or is for another name.
pub fn load(directory: &Path) -> Result<TlsIdentity, StrictError> {
    let real = |name: &str| {
        let path = directory.join(name);
        path.canonicalize().map_err(FileError::io("reading", &path))
    };
    let key = private_file::read(&real(SERVER_KEY)?, SIZE_MAX)?;
    let open = |name| private_file::read_ours(&real(name)?, SIZE_MAX);
    let (server, client, ca) = (open(SERVER)?, open(CLIENT)?, open(CA)?);
    let identity = TlsIdentity::from_pem(&key, &server, &client)
        .map_err(|cause| StrictError::Identity { directory: directory.to_owned(), cause })?;
    would_accept(&identity, &ca)
        .map_err(|reason| StrictError::Refused { directory: directory.to_owned(), reason })?;
    Ok(identity)
}

/// Checks the server's certificate as cloud-api-adaptor does.
fn would_accept(identity: &TlsIdentity, ca: &[u8]) -> Result<(), String> {
    let ca = CertificateDer::from_pem_slice(ca).map_err(|_| "the authority's certificate is not PEM")?;
    let mut roots = RootCertStore::empty();
    roots.add(ca).map_err(|error| error.to_string())?;
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::new(default_provider()));
    let verifier = verifier.build().map_err(|error| error.to_string())?;
    let name = ServerName::try_from(SERVER_NAME).map_err(|error| error.to_string())?;
    let verified = verifier.verify_server_cert(&identity.certificate, &[], &name, &[], UnixTime::now());
    verified.map(drop).map_err(|error: rustls::Error| error.to_string())
}
