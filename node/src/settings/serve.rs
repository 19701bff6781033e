//! Reads the settings of `serve`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use secure_comms_adaptor::kbs::KbsSettings;
use secure_comms_adaptor::key_source::KeySource;
use secure_comms_adaptor::pod::AgentTunnels;
use secure_comms_keys::WorkerNodeKeys;
use secure_comms_protocol::{InboundTag, OutboundTag};

use super::{ConnectSettings, Env, SettingsReader, UsageError};
use crate::caa::CaaSettings;
use crate::cli::ConnectArgs;
use crate::cli::serve::ServeArgs;
use crate::init_data::InitDataPolicy;

/// Settings of `serve`.
#[derive(Clone, Debug)]
pub struct ServeSettings {
    /// Local inbounds of each pod, the built-in KATAAGENT included.
    pub inbounds: Vec<InboundTag>,
    /// Local outbounds of each pod, the built-in KBS included.
    pub outbounds: Vec<OutboundTag>,
    /// Tunnels that the VMs' agents may have.
    pub agent: AgentTunnels,
    /// Whether only an attesting agent's requests pass to the KBS.
    pub kbs_filter: bool,
    /// Directory of the key store.
    pub store: PathBuf,
    /// Where the VMs get their keys.
    pub key_source: KeySource<KbsSettings>,
    /// Which init-data the VMs are started with.
    pub init_data: InitDataPolicy,
    /// Further worker nodes that may log in to the pods.
    pub worker_nodes: Option<WorkerNodeKeys>,
    /// Whether agents before version 0.2 are served.
    pub old_agents: bool,
    /// Time limit of a call to the KBS, and of a start that names none.
    pub deadline: Duration,
    /// Bytes in one direction after which the session keys are renewed.
    pub rekey_bytes: usize,
    /// Whether only post-quantum key exchange is offered and accepted.
    pub require_pq: bool,
    /// The way in of cloud-api-adaptor; `None`: off.
    pub caa: Option<CaaSettings>,
    /// The API's socket.
    pub socket: PathBuf,
    /// Where monitoring reads; `None`: nowhere.
    pub metrics_listen: Option<SocketAddr>,
    /// What is valid and probably not meant, one a line.
    pub warnings: Vec<String>,
}

impl ServeSettings {
    /// Reads the flags, the environment and the settings' file.
    ///
    /// # Errors
    /// The faults of all of them.
    pub fn read(args: ServeArgs, env: Env<'_>) -> Result<Self, UsageError> {
        let connect = ConnectSettings::read(
            ConnectArgs {
                pod_id: Some("serve".to_owned()),
                addresses: vec!["serve".to_owned()],
                run_dir: args.run_dir,
                store: args.store,
                kbs: args.kbs,
                kbs_url: args.kbs_url,
                kbs_admin_key: args.kbs_admin_key,
                no_trustee: args.no_trustee,
                ..ConnectArgs::default()
            },
            env,
        )?;
        let mut reader = SettingsReader::new(env);
        let metrics_listen = match args.metrics_listen.as_deref() {
            Some("") => None,
            Some(text) => reader.parsed("--metrics-listen", text),
            None => Some(SocketAddr::from(([127, 0, 0, 1], 9464))),
        };
        let caa = CaaSettings::default();
        let pods_directory = args.pods_directory.unwrap_or(caa.pods_directory);
        let caa = (args.caa.as_deref() != Some("off")).then_some(CaaSettings { pods_directory, ..caa });
        reader.done(Some(Self {
            inbounds: connect.inbounds,
            outbounds: connect.outbounds,
            agent: connect.agent,
            kbs_filter: connect.kbs_filter,
            store: connect.store,
            key_source: connect.key_source,
            init_data: InitDataPolicy::Unbound,
            worker_nodes: connect.worker_nodes,
            old_agents: connect.old_agents,
            deadline: connect.deadline,
            rekey_bytes: connect.rekey_bytes,
            require_pq: connect.require_pq,
            caa,
            socket: args.socket.unwrap_or_else(|| PathBuf::from("/run/secure-comms/adaptor.sock")),
            metrics_listen,
            warnings: connect.warnings,
        }))
    }
}
