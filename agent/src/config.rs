//! The configuration: flags, measured init-data and the daemon config (apf.json), valid as a whole.
//!
//! In: the arguments of the process and the files. Out: a [`Config`], or every fault with its fix. What a source may decide depends
//! on who can write it: flags are measured and decide everything, init-data counts once the keys are here, and user data
//! decides what the flag `-secure-comms-user-data` allows.

pub mod flags;
mod go_flags;

pub mod file;

mod daemon_config;
pub mod user_data;

pub mod init_data;
mod toml;

mod announced;
mod error;
mod tunnels;

use std::net::SocketAddr;
use std::path::PathBuf;

use secure_comms_keys::{KeyError, PodKeys, WorkerNodeKeys, base64};
use secure_comms_protocol::tag::{InboundTag, OutboundTag};
use secure_comms_protocol::{InitDataDigest, PodId};
use secure_comms_tunnel::netns::Namespace;
use zeroize::Zeroizing;

use crate::kata::sources::MountPrefixes;
use crate::pod_network::PodNetwork;
use crate::pod_network::spec::InterfaceName;
pub(crate) use announced::Announced;
pub use daemon_config::DaemonConfig;
pub use error::ConfigError;
use flags::{Options, StatePlace};
use init_data::InitData;
use tunnels::{Sources, Tunnels};
use user_data::UserDataMode;

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

/// What the configuration is read from, beyond the flags.
#[derive(Clone, Debug, Default)]
pub struct Inputs {
    /// The daemon config, read under the mode of the flags.
    pub daemon: Option<DaemonConfig>,
    /// The `secure-comms.toml` of init-data.
    pub init_data: Option<InitData>,
    /// The digest of init-data.
    pub digest: Option<InitDataDigest>,
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
    /// Path of the unix socket of the program that mounts cloud volumes.
    pub volumes_socket: PathBuf,
    /// Bytes on a connection after which it is rekeyed.
    pub rekey_bytes: usize,
    /// All inbounds, with the built-in one.
    pub inbounds: Vec<InboundTag>,
    /// All outbounds, with the built-in one.
    pub outbounds: Vec<OutboundTag>,
    /// Source of the keys.
    pub source: KeySource,
    /// Whether the keys are fetched as the two resources of versions before 0.2.
    pub separate_resources: bool,
    /// The digest of init-data, if the VM has any.
    pub init_data: Option<InitDataDigest>,
    /// The only pod that an adaptor may name, if flags or init-data say so.
    pub pod_id: Option<PodId>,
    /// What user data may decide.
    pub user_data: UserDataMode,
    /// `namespace/name` of the pod, if known: for logs.
    pub pod: Option<String>,
    /// The pod's network, if the daemon config has one.
    pub pod_network: Option<PodNetwork>,
    /// What was ignored or is weak, for the log.
    pub warnings: Vec<String>,
    /// What hello announces of all this.
    pub(crate) announced: Announced,
}

impl Config {
    /// Checks the flags alone, for faults that are the same with any daemon config.
    ///
    /// # Errors
    /// As [`Config::resolve`].
    pub fn check_flags(options: &Options) -> Result<(), ConfigError> {
        match Self::resolve(options.clone(), Inputs::default()) {
            Err(ConfigError::NotSecureComms(_)) if options.user_data == UserDataMode::All => {
                Self::resolve(Options { secure_comms: true, ..options.clone() }, Inputs::default()).map(drop)
            }
            other => other.map(drop),
        }
    }

    /// Validates flags, init-data and daemon config together.
    ///
    /// # Errors
    /// The first fault; all faults of all tags count as one.
    pub fn resolve(options: Options, inputs: Inputs) -> Result<Self, ConfigError> {
        let Inputs { daemon, init_data, digest } = inputs;
        let daemon = daemon.unwrap_or_default();
        let mut warnings = ignored(&options, &daemon);
        let mut source = key_source(&options, &daemon)?;
        let attests = matches!(source, KeySource::Kbs { .. });
        if !attests && init_data.is_some() {
            warnings.push(
                "init-data: secure-comms.toml ignored: the keys are from the user data, not from the KBS"
                    .into(),
            );
        }
        let init_data = init_data.filter(|_| attests).unwrap_or_default();
        if let (KeySource::Kbs { worker_node }, Some(keys)) = (&mut source, &init_data.worker_node)
            && worker_node.replace(keys.clone()).is_some()
        {
            warnings.push("user data: 'sc-wn-pub' ignored: init-data has it too".into());
        }
        let sources = Sources { options: &options, init_data: &init_data, daemon: &daemon };
        let Tunnels { inbounds, outbounds } = tunnels::collect(&sources, &mut warnings)?;
        let pod_network = pod_network(&options, &daemon)?;
        if attests {
            warnings.extend(weaknesses(&options, digest.as_ref()));
        }
        let announced = Announced {
            init_data: digest.clone(),
            inbounds: inbounds.iter().map(ToString::to_string).collect(),
            outbounds: outbounds.iter().map(ToString::to_string).collect(),
            user_data: options.user_data,
        };
        announced.check()?;
        Ok(Self {
            pod_id: pod_id(options.pod_id, init_data.pod_id)?,
            listen: options.listen,
            kata_agent_socket: options.kata_agent_socket,
            pod_namespace: options.pod_namespace,
            guest_api: options.guest_api,
            state_dir: options.state_dir,
            state_place: options.state_place,
            require_pq: options.require_pq,
            mount_prefixes: options.mount_prefixes,
            volumes_socket: options.volumes_socket,
            rekey_bytes: options.rekey_bytes,
            inbounds,
            outbounds,
            source,
            separate_resources: options.separate_resources,
            init_data: digest,
            user_data: options.user_data,
            pod: pod(&daemon),
            pod_network,
            warnings,
            announced,
        })
    }
}

/// A warning for each key of the daemon config that user data may not decide.
fn ignored(options: &Options, daemon: &DaemonConfig) -> Vec<String> {
    let warning = |key: &&str| {
        let needed = options.user_data.needed_for(key)?;
        let only = if needed == UserDataMode::All { ", for pods that are not confidential" } else { "" };
        Some(format!(
            "{}: '{key}' ignored: whoever runs the cloud can write it; -secure-comms-user-data {needed} in the image \
             would let it count{only}",
            file_of(options)
        ))
    };
    daemon.ignored.iter().filter_map(warning).collect()
}

/// What is weaker than it could be where the keys are from the KBS.
fn weaknesses(options: &Options, digest: Option<&InitDataDigest>) -> Vec<String> {
    let mut warnings = Vec::new();
    if options.separate_resources {
        warnings.push(
            "-secure-comms-separate-resources: nothing binds the pod's key to the worker node's: whoever is on the way to \
             the KBS can add a worker node; update the adaptor, and remove the flag"
                .to_owned(),
        );
    } else if digest.is_none() {
        let file = options.init_data_digest.as_ref().map_or_else(
            || "-secure-comms-init-data-digest is empty".to_owned(),
            |path| format!("{} does not exist", path.display()),
        );
        warnings.push(format!(
            "no digest of init-data: {file}; the keys are fetched from default/pp-<pod id>/keys, which no resource \
             policy can bind to this VM"
        ));
    }
    warnings
}

fn pod_id(flag: Option<PodId>, init_data: Option<PodId>) -> Result<Option<PodId>, ConfigError> {
    match (flag, init_data) {
        (Some(flag), Some(init_data)) if flag != init_data => Err(ConfigError::PodId { flag, init_data }),
        (flag, init_data) => Ok(flag.or(init_data)),
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
