//! The validated configuration: flags and the daemon config (apf.json) together.

use std::fmt;
use std::marker::PhantomData;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use secure_comms_keys::{KeyError, PodKeys, WorkerNodeKeys, base64};
use secure_comms_protocol::tag::{self, InboundTag, OutboundTag, Tag, TagErrors};
use secure_comms_tunnel::netns::Namespace;
use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeOwned, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};
use zeroize::Zeroizing;

use crate::cli::Options;
use crate::pod_network::PodNetwork;
use crate::pod_network::spec::{Faults, InterfaceName, PodNetworkConfig};

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Nobody asked for Secure Comms.
    #[error(
        "starting: Secure Comms is off, and this forwarder speaks nothing else; set the flag -secure-comms, or \
         \"sc\": true with sc-pp-prv and sc-wn-pub in {0}"
    )]
    NotSecureComms(String),
    /// Keys in the daemon config that don't add up. There is no way back to attestation from here.
    #[error("reading the keys in {file}: {fault}")]
    UserData {
        /// The daemon config.
        file: String,
        /// What is wrong, and what to do.
        fault: String,
    },
    /// Everything that is wrong with the tags.
    #[error("reading the tunnels: {0}; correct the flags or apf.json")]
    Tags(String),
    /// The kata agent's socket is not a socket's path.
    #[error("reading -kata-agent-socket: {0}")]
    KataAgentSocket(String),
    /// The interface for the pod network can't be one.
    #[error("reading -host-interface: '{0}': expected {expected}", expected = InterfaceName::EXPECTED)]
    HostInterface(String),
    /// Everything that is wrong with the pod network.
    #[error("reading 'pod-network' in {file}: {faults}; correct the VM's user data")]
    PodNetwork {
        /// The daemon config.
        file: String,
        /// What is wrong.
        faults: Faults,
    },
    /// A pod network without a namespace for it.
    #[error(
        "setting up the pod network: 'pod-network' is in {0}, but -pod-namespace is empty; name the pod's network \
         namespace, or take 'pod-network' out"
    )]
    NoPodNamespace(String),
}

impl ConfigError {
    /// 2 where the command line is wrong, 1 where what it names is.
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::NotSecureComms(_) | Self::Tags(_) | Self::KataAgentSocket(_) | Self::HostInterface(_) => 2,
            Self::UserData { .. } | Self::PodNetwork { .. } | Self::NoPodNamespace(_) => 1,
        }
    }
}

/// A text whose memory is wiped, and that Debug does not print.
#[derive(Clone)]
pub struct Secret(Zeroizing<String>);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(|text| Self(Zeroizing::new(text)))
    }
}

/// What apf.json says to us. Other keys are ignored.
#[derive(Clone, Debug, Default)]
pub struct DaemonConfig {
    /// `pod-name`, for logs.
    pub pod_name: Option<String>,
    /// `pod-namespace` (Kubernetes' word, not the network's), for logs.
    pub pod_namespace: Option<String>,
    /// `sc`: the keys are in this file.
    pub sc: Option<bool>,
    /// `sc-pp-prv`: base64 of the pod's private key.
    pub private_key: Option<Secret>,
    /// `sc-wn-pub`: base64 of the worker node's authorized_keys lines.
    pub worker_node: Option<String>,
    /// `sc-inbounds`: tags.
    pub inbounds: Option<String>,
    /// `sc-outbounds`: tags.
    pub outbounds: Option<String>,
    /// `pod-network`.
    pub pod_network: Option<PodNetworkConfig>,
}

impl<'de> Deserialize<'de> for DaemonConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(ByKey)
    }
}

/// By hand, for what the derived code leaves out: which key a value of the wrong type belongs to.
struct ByKey;

impl<'de> Visitor<'de> for ByKey {
    type Value = DaemonConfig;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<DaemonConfig, A::Error> {
        let mut config = DaemonConfig::default();
        let mut seen = Vec::new();
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                "pod-name" => config.pod_name = value(&key, &mut map)?,
                "pod-namespace" => config.pod_namespace = value(&key, &mut map)?,
                "pod-network" => {
                    config.pod_network = value(&key, &mut map)?.map(|Object(network)| network);
                }
                "sc" => config.sc = value(&key, &mut map)?,
                "sc-pp-prv" => config.private_key = value(&key, &mut map)?,
                "sc-wn-pub" => config.worker_node = value(&key, &mut map)?,
                "sc-inbounds" => config.inbounds = value(&key, &mut map)?,
                "sc-outbounds" => config.outbounds = value(&key, &mut map)?,
                _ => {
                    map.next_value::<IgnoredAny>()?;
                    continue;
                }
            }
            // Of two keys for one thing the reader and the writer may each mean another.
            if seen.contains(&key) {
                return Err(A::Error::custom(format!("key '{key}': given twice")));
            }
            seen.push(key);
        }
        Ok(config)
    }
}

/// What an object says: the derived reader would take a list as the fields in their order, which nobody means.
struct Object<T>(T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Fields(PhantomData)).map(Self)
    }
}

struct Fields<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for Fields<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
        T::deserialize(MapAccessDeserializer::new(map))
    }
}

fn value<'de, A: MapAccess<'de>, T: DeserializeOwned>(key: &str, map: &mut A) -> Result<Option<T>, A::Error> {
    map.next_value().map_err(|error| A::Error::custom(format!("key '{key}': {error}")))
}

/// Where the keys of the Kubernetes phase come from.
#[derive(Clone, Debug)]
pub enum KeySource {
    /// From the KBS, after attestation.
    Kbs {
        /// If given, attestation users must hold one of these keys.
        worker_node: Option<WorkerNodeKeys>,
    },
    /// From the user data: no Attestation phase at all.
    UserData(PodKeys),
}

/// What the agent runs with: valid as a whole.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where the SSH server listens.
    pub listen: SocketAddr,
    /// The kata agent's unix socket.
    pub kata_agent_socket: PathBuf,
    /// The pod's network namespace, a name or a path; none: our own.
    pub pod_namespace: Option<String>,
    /// Where `api-server-rest` is, in the pod's namespace.
    pub guest_api: SocketAddr,
    /// Where the latched keys are kept for this boot.
    pub state_dir: PathBuf,
    /// Data after which new session keys are asked for, in bytes.
    pub rekey_bytes: usize,
    /// All inbounds, the built-in one too.
    pub inbounds: Vec<InboundTag>,
    /// All outbounds, the built-in one too.
    pub outbounds: Vec<OutboundTag>,
    /// Where the keys come from.
    pub source: KeySource,
    /// `namespace/name` of the pod, if known: for logs.
    pub pod: Option<String>,
    /// The pod's network, if it is ours to make.
    pub pod_network: Option<PodNetwork>,
}

impl Config {
    /// Finds the faults of the flags that no daemon config could mend.
    ///
    /// # Errors
    /// As [`Config::resolve`].
    pub fn check_flags(options: &Options) -> Result<(), ConfigError> {
        match Self::resolve(options.clone(), None) {
            Err(ConfigError::NotSecureComms(_)) => {
                Self::resolve(Options { secure_comms: true, ..options.clone() }, None).map(drop)
            }
            other => other.map(drop),
        }
    }

    /// Validates flags and daemon config together.
    ///
    /// # Errors
    /// The first thing that is wrong; all faults of all tags count as one thing.
    pub fn resolve(options: Options, daemon: Option<DaemonConfig>) -> Result<Self, ConfigError> {
        let daemon = daemon.unwrap_or_default();
        let source = key_source(&options, &daemon)?;
        let kata_agent = kata_agent_outbound(&options.kata_agent_socket)?;
        let file_tags = |tags: &'_ Option<String>| tags.clone().unwrap_or_default();
        let inbounds = parse_tags::<InboundTag>(&options.inbounds, &file_tags(&daemon.inbounds));
        let outbounds = parse_tags::<OutboundTag>(&options.outbounds, &file_tags(&daemon.outbounds));
        let (inbounds, outbounds) = match (inbounds, outbounds) {
            (Ok(inbounds), Ok(outbounds)) => (inbounds, outbounds),
            (inbounds, outbounds) => return Err(tag_faults(inbounds.err(), outbounds.err())),
        };
        let kbs = InboundTag::parse("BOTH_PHASES:KBS:8080")
            .map_err(|error| ConfigError::Tags(error.to_string()))?;
        let pod_network = pod_network(&options, &daemon)?;
        Ok(Self {
            listen: options.listen,
            kata_agent_socket: options.kata_agent_socket,
            pod_namespace: options.pod_namespace,
            guest_api: options.guest_api,
            state_dir: options.state_dir,
            rekey_bytes: options.rekey_bytes,
            inbounds: tag::with_built_in(inbounds, kbs),
            outbounds: tag::with_built_in(outbounds, kata_agent),
            source,
            pod: pod(&daemon),
            pod_network,
        })
    }
}

fn pod(daemon: &DaemonConfig) -> Option<String> {
    let name = daemon.pod_name.as_deref().filter(|name| !name.is_empty())?;
    match daemon.pod_namespace.as_deref() {
        None | Some("") => Some(name.to_owned()),
        Some(namespace) => Some(format!("{namespace}/{name}")),
    }
}

fn pod_network(options: &Options, daemon: &DaemonConfig) -> Result<Option<PodNetwork>, ConfigError> {
    let named = options.host_interface.as_deref();
    let host_interface: Option<InterfaceName> = named
        .map(|name| name.parse().map_err(|()| ConfigError::HostInterface(name.to_owned())))
        .transpose()?;
    let Some(config) = daemon.pod_network.as_ref().filter(|config| !config.is_empty()) else {
        return Ok(None);
    };
    let spec =
        config.validate().map_err(|faults| ConfigError::PodNetwork { file: file_of(options), faults })?;
    let namespace =
        options.pod_namespace.as_deref().ok_or_else(|| ConfigError::NoPodNamespace(file_of(options)))?;
    Ok(Some(PodNetwork::new(spec, Namespace::new(namespace), host_interface)))
}

/// What errors call the daemon config.
fn file_of(options: &Options) -> String {
    match &options.config {
        Some(path) => path.display().to_string(),
        None => "a daemon config (-config)".to_owned(),
    }
}

fn parse_tags<T: Tag>(flag: &str, file: &str) -> Result<Vec<T>, TagErrors> {
    tag::parse_lists([flag, file])
}

fn tag_faults(inbounds: Option<TagErrors>, outbounds: Option<TagErrors>) -> ConfigError {
    let inbounds = inbounds.map(|errors| format!("inbounds: {errors}"));
    let outbounds = outbounds.map(|errors| format!("outbounds: {errors}"));
    ConfigError::Tags(inbounds.into_iter().chain(outbounds).collect::<Vec<_>>().join("; "))
}

fn kata_agent_outbound(socket: &Path) -> Result<OutboundTag, ConfigError> {
    let error = |fault: String| ConfigError::KataAgentSocket(fault);
    let path = socket
        .to_str()
        .filter(|path| path.starts_with('/'))
        .ok_or_else(|| error(format!("'{}': expected an absolute path in UTF-8", socket.display())))?;
    OutboundTag::parse(&format!("KUBERNETES_PHASE:KATAAGENT:{path}"))
        .map_err(|fault| error(fault.to_string()))
}

fn key_source(options: &Options, daemon: &DaemonConfig) -> Result<KeySource, ConfigError> {
    let fault = |fault: &str| ConfigError::UserData { file: file_of(options), fault: fault.to_owned() };
    let user_data = daemon.sc == Some(true);
    if !options.secure_comms && !user_data {
        return Err(ConfigError::NotSecureComms(file_of(options)));
    }
    match (user_data, &daemon.private_key, &daemon.worker_node) {
        (true, Some(private), Some(worker_node)) => {
            let private = decode("sc-pp-prv", &private.0).map_err(|text| fault(&text))?;
            let worker_node = decode("sc-wn-pub", worker_node).map_err(|text| fault(&text))?;
            let keys = PodKeys::parse(&private, &worker_node).map_err(|error| fault(&key_fault(error)))?;
            Ok(KeySource::UserData(keys))
        }
        (true, None, Some(_)) => Err(fault("'sc' is true, but 'sc-pp-prv' is missing; give both keys")),
        (true, Some(_), None) => Err(fault("'sc' is true, but 'sc-wn-pub' is missing; give both keys")),
        (true, None, None) => Err(fault(
            "'sc' is true, but 'sc-pp-prv' and 'sc-wn-pub' are missing; give both, or leave 'sc' out to get the keys \
             from the KBS",
        )),
        (false, Some(_), _) => Err(fault(
            "'sc-pp-prv' is given, but 'sc' is not true; set 'sc' to use it, or remove it to get the keys from the KBS",
        )),
        (false, None, Some(worker_node)) => {
            let lines = decode("sc-wn-pub", worker_node).map_err(|text| fault(&text))?;
            let keys = WorkerNodeKeys::parse(&lines).map_err(|error| fault(&key_fault(error)))?;
            Ok(KeySource::Kbs { worker_node: Some(keys) })
        }
        (false, None, None) => Ok(KeySource::Kbs { worker_node: None }),
    }
}

fn key_fault(error: KeyError) -> String {
    let key = if matches!(error, KeyError::WorkerNodeKeys(_)) { "sc-wn-pub" } else { "sc-pp-prv" };
    format!("'{key}': {error}")
}

fn decode(key: &str, text: &str) -> Result<Zeroizing<Vec<u8>>, String> {
    base64::decode(text).ok_or_else(|| format!("'{key}': not base64; encode the key file with 'base64 -w0'"))
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
