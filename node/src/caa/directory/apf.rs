//! Parsing of `apf.json`, which cloud-api-adaptor writes for the agent in the VM and keeps a copy of.

use std::net::IpAddr;
use std::time::SystemTime;

use secure_comms_keys::text::one_line;
use secure_comms_protocol::PodId;
use secure_comms_protocol::json::unquoted;
use serde::{Deserialize, Deserializer};
use zeroize::Zeroizing;

use crate::caa::identity::{IdentityError, TlsIdentity, server_name};
use crate::caa::sandbox::Sandbox;

/// The longest reason, in bytes.
const REASON_MAX: usize = 300;

/// Why a text is not the `apf.json` of a sandbox.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ApfError {
    /// It is not JSON of this shape.
    #[error("{0}")]
    Json(String),
    /// It has none of the keys.
    #[error(
        "none of the keys pod-name and tls-server-cert is there: this release of cloud-api-adaptor writes something else"
    )]
    Unknown,
    /// Some of the keys of TLS are missing.
    #[error("of tls-server-key, tls-server-cert and tls-client-ca, {0} is missing")]
    Incomplete(&'static str),
    /// The TLS keys are not such.
    #[error(transparent)]
    Identity(#[from] IdentityError),
}

/// A text that is wiped on drop.
struct Secret(Zeroizing<String>);

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(|text| Self(Zeroizing::new(text)))
    }
}

/// The keys that are read. Others are ignored; a key that is given twice is an error.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Apf {
    pod_name: Option<String>,
    pod_namespace: Option<String>,
    pod_network: Option<PodNetwork>,
    tls_server_key: Option<Secret>,
    tls_server_cert: Option<String>,
    tls_client_ca: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct PodNetwork {
    podip: Option<String>,
    vxlan_id: Option<u32>,
}

impl Apf {
    fn read(text: &[u8]) -> Result<Self, ApfError> {
        // Derived code would also accept a list of the values in their order.
        if text.iter().find(|byte| !byte.is_ascii_whitespace()).is_some_and(|&first| first != b'{') {
            return Err(ApfError::Json("it is not a JSON object".to_owned()));
        }
        let apf: Self = serde_json::from_slice(text)
            .map_err(|error| ApfError::Json(one_line(&unquoted(&error.to_string()), REASON_MAX)))?;
        // An empty text stands for an absent one.
        Ok(Self {
            pod_name: apf.pod_name.filter(|text| !text.is_empty()),
            tls_server_key: apf.tls_server_key.filter(|Secret(text)| !text.is_empty()),
            tls_server_cert: apf.tls_server_cert.filter(|text| !text.is_empty()),
            tls_client_ca: apf.tls_client_ca.filter(|text| !text.is_empty()),
            ..apf
        })
    }

    fn identity(&self) -> Result<Option<TlsIdentity>, ApfError> {
        match (&self.tls_server_key, &self.tls_server_cert, &self.tls_client_ca) {
            (None, None, None) => Ok(None),
            (Some(Secret(key)), Some(certificate), Some(client)) => {
                Ok(Some(TlsIdentity::from_pem(key.as_bytes(), certificate.as_bytes(), client.as_bytes())?))
            }
            (None, _, _) => Err(ApfError::Incomplete("tls-server-key")),
            (_, None, _) => Err(ApfError::Incomplete("tls-server-cert")),
            (_, _, None) => Err(ApfError::Incomplete("tls-client-ca")),
        }
    }
}

/// The sandbox that a text describes.
///
/// # Errors
/// The text is not JSON, is not of cloud-api-adaptor, or its TLS keys cannot be used.
pub fn parse(text: &[u8], id: PodId, written: SystemTime) -> Result<Sandbox, ApfError> {
    let apf = Apf::read(text)?;
    if apf.pod_name.is_none() && apf.tls_server_cert.is_none() {
        return Err(ApfError::Unknown);
    }
    let tls = apf.identity()?;
    let name = match (&apf.pod_namespace, &apf.pod_name) {
        (Some(namespace), Some(name)) => format!("{namespace}/{name}").parse().ok(),
        _ => None,
    };
    let network = apf.pod_network.as_ref();
    Ok(Sandbox {
        id,
        name,
        pod_ip: network.and_then(|network| address(network.podip.as_deref()?)),
        vxlan_id: network.and_then(|network| network.vxlan_id).filter(|&vni| vni != 0),
        tls,
        written,
    })
}

/// The server name of the TLS keys in a text, without a check of these; `None` if it has none.
pub(super) fn name_in(text: &[u8]) -> Option<String> {
    let certificate = Apf::read(text).ok()?.tls_server_cert?;
    server_name(certificate.as_bytes()).ok()
}

/// The address of a prefix, as "10.244.3.5/24".
fn address(prefix: &str) -> Option<IpAddr> {
    let address = prefix.split_once('/').map_or(prefix, |(address, _)| address);
    address.parse().ok().map(|address: IpAddr| address.to_canonical())
}
