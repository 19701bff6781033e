//! The configuration: flags and the daemon config (apf.json), valid as a whole.
//!
//! In: the arguments of the process, the daemon config's file. Out: a [`Config`], or every fault with its fix.

pub mod flags;
mod go_flags;

pub mod file;

mod daemon_config;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use secure_comms_keys::{KeyError, PodKeys, WorkerNodeKeys, base64};
use secure_comms_protocol::tag::{self, InboundTag, OutboundTag, Tag, TagErrors};
use secure_comms_tunnel::netns::Namespace;
use zeroize::Zeroizing;

use crate::kata::sources::MountPrefixes;
use crate::pod_network::PodNetwork;
use crate::pod_network::spec::{Faults, InterfaceName};
pub use daemon_config::DaemonConfig;
use flags::{Options, StatePlace};

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Secure Comms is not enabled.
    #[error(
        "starting: Secure Comms is off, and this forwarder speaks nothing else; set the flag -secure-comms, or \
         \"sc\": true with sc-pp-prv and sc-wn-pub in {0}"
    )]
    NotSecureComms(String),
    /// The keys in the daemon config are incomplete or invalid. The agent does not fall back to attestation.
    #[error("reading the keys in {file}: {fault}")]
    UserData {
        /// Path of the daemon config.
        file: String,
        /// The fault, and its fix.
        fault: String,
    },
    /// All faults of all tags.
    #[error("reading the tunnels: {0}; correct the flags or apf.json")]
    Tags(String),
    /// The path of the kata agent's socket is invalid.
    #[error("reading -kata-agent-socket: {0}")]
    KataAgentSocket(String),
    /// The name of the interface for the pod network is invalid.
    #[error("reading -host-interface: '{0}': expected {expected}", expected = InterfaceName::EXPECTED)]
    HostInterface(String),
    /// All faults of the pod network.
    #[error("reading 'pod-network' in {file}: {faults}; correct the VM's user data")]
    PodNetwork {
        /// Path of the daemon config.
        file: String,
        /// Every fault.
        faults: Faults,
    },
    /// There is a pod network, but no namespace for it.
    #[error(
        "setting up the pod network: 'pod-network' is in {0}, but -pod-namespace is empty; name the pod's network \
         namespace, or take 'pod-network' out"
    )]
    NoPodNamespace(String),
}

impl ConfigError {
    /// Exit code of the process: 2 if the command line is at fault, 1 if the daemon config is.
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::NotSecureComms(_) | Self::Tags(_) | Self::KataAgentSocket(_) | Self::HostInterface(_) => 2,
            Self::UserData { .. } | Self::PodNetwork { .. } | Self::NoPodNamespace(_) => 1,
        }
    }
}

/// Where the keys of the Kubernetes phase come from.
#[derive(Clone, Debug)]
pub enum KeySource {
    /// The KBS, after attestation.
    Kbs {
        /// If present, clients of the Attestation phase must prove one of these keys.
        worker_node: Option<WorkerNodeKeys>,
    },
    /// The user data: there is no Attestation phase.
    UserData(PodKeys),
}

/// The configuration of the agent, valid as a whole.
#[derive(Clone, Debug)]
pub struct Config {
    /// Address that the SSH server listens on.
    pub listen: SocketAddr,
    /// Path of the kata agent's unix socket.
    pub kata_agent_socket: PathBuf,
    /// The pod's network namespace, a name or a path; none for our own.
    pub pod_namespace: Option<String>,
    /// Address of `api-server-rest` in the pod's network namespace.
    pub guest_api: SocketAddr,
    /// Directory of the latched keys.
    pub state_dir: PathBuf,
    /// Where that directory may be.
    pub state_place: StatePlace,
    /// Whether only post-quantum key exchange is offered and accepted.
    pub require_pq: bool,
    /// Directories below which the sources of bind mounts are made.
    pub mount_prefixes: MountPrefixes,
    /// Bytes on a connection after which it is rekeyed.
    pub rekey_bytes: usize,
    /// All inbounds, with the built-in one.
    pub inbounds: Vec<InboundTag>,
    /// All outbounds, with the built-in one.
    pub outbounds: Vec<OutboundTag>,
    /// Source of the keys.
    pub source: KeySource,
    /// `namespace/name` of the pod, if known: for logs.
    pub pod: Option<String>,
    /// The pod's network, if the daemon config has one.
    pub pod_network: Option<PodNetwork>,
}

impl Config {
    /// Checks the flags alone, for faults that are the same with any daemon config.
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
    /// The first fault; all faults of all tags count as one.
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
            state_place: options.state_place,
            require_pq: options.require_pq,
            mount_prefixes: options.mount_prefixes,
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

/// The name of the daemon config in errors.
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
