//! Settings: the flags and the environment, validated as a whole. All faults are reported together.

mod channel;
mod connect;
mod file;
mod init_data;
mod reader;
mod serve;
mod service;
mod units;
mod variables;

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use secure_comms_adaptor::address::Address;
use secure_comms_adaptor::kbs::KbsSettings;
use secure_comms_adaptor::key_source::KeySource;
use secure_comms_adaptor::pod::AgentTunnels;
use secure_comms_keys::WorkerNodeKeys;
use secure_comms_protocol::{InboundTag, InitDataDigest, OutboundTag, PodId};

use self::reader::SettingsReader;
use crate::cli::setting::{Flags, LOG, LOG_FORMAT, PP_INBOUNDS, PP_OUTBOUNDS, STORE};
use crate::cli::{KeygenArgs, UserDataArgs};
use crate::logging::{Level, LogFormat};
pub use file::DEFAULT_CONFIG;
pub use reader::Source;
pub use serve::{EffectiveSetting, ServeSettings, with_log_flags};
pub use service::{KeysSettings, PodStartSettings, ServiceSettings};
pub use variables::unknown_variables;

/// Settings of `connect`.
#[derive(Clone, Debug)]
pub struct ConnectSettings {
    /// Id of the pod.
    pub pod: PodId,
    /// Addresses of the pod's agent; never empty.
    pub addresses: Vec<Address>,
    /// Local inbounds, the built-in KATAAGENT included.
    pub inbounds: Vec<InboundTag>,
    /// Local outbounds, the built-in KBS included.
    pub outbounds: Vec<OutboundTag>,
    /// Tunnels that the VM's agent may have.
    pub agent: AgentTunnels,
    /// Whether only an attesting agent's requests pass to the KBS.
    pub kbs_filter: bool,
    /// Directory of the key store.
    pub store: PathBuf,
    /// Where the VM gets its keys.
    pub key_source: KeySource<KbsSettings>,
    /// The init-data that the VM is started with.
    pub init_data: ExpectedInitData,
    /// Further worker nodes that may log in to the pod.
    pub worker_nodes: Option<WorkerNodeKeys>,
    /// Whether agents before version 0.2 are served.
    pub old_agents: bool,
    /// Time limit of the start, calls to the KBS included.
    pub deadline: Duration,
    /// Bytes in one direction after which the session keys are renewed.
    pub rekey_bytes: usize,
    /// Whether only post-quantum key exchange is offered and accepted.
    pub require_pq: bool,
    /// Whether the end deletes the pod's key and its KBS resource.
    pub delete_on_exit: bool,
    /// Whether events are written to standard output, as JSON.
    pub events: bool,
    /// What is valid and probably not meant, one a line.
    pub warnings: Vec<String>,
}

/// The init-data that a VM is expected to have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ExpectedInitData {
    /// Not given: that of the pod's first start; none if it is new.
    #[default]
    AsBefore,
    /// A rule says that none is expected.
    Unbound,
    /// Init-data of this digest.
    Digest(InitDataDigest),
}

/// Settings of the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogSettings {
    /// The least severe level that is logged.
    pub level: Level,
    /// The form of the lines.
    pub format: LogFormat,
}

/// Settings of `user-data`.
#[derive(Clone, Debug)]
pub struct UserDataSettings {
    /// Id of the pod.
    pub pod: PodId,
    /// Inbounds of the VM's agent.
    pub inbounds: Vec<InboundTag>,
    /// Outbounds of the VM's agent.
    pub outbounds: Vec<OutboundTag>,
    /// Directory of the key store.
    pub store: PathBuf,
    /// File to write; `None`: standard output.
    pub output: Option<PathBuf>,
}

/// Settings of `keygen`.
#[derive(Clone, Debug)]
pub struct KeygenSettings {
    /// Id of a pod whose key is made, too.
    pub pod: Option<PodId>,
    /// Directory of the key store.
    pub store: PathBuf,
}

/// All faults of the command line and the environment, one a line; never empty.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", .0.join("\n"))]
pub struct UsageError(Vec<String>);

impl UsageError {
    /// The faults, one line each.
    pub fn faults(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }
}

/// Looks up an environment variable. A function, so that tests need not change their process's environment.
pub type Env<'a> = &'a dyn Fn(&str) -> Option<OsString>;

impl LogSettings {
    /// Reads `--log` and `--log-format`, or their variables.
    ///
    /// # Errors
    /// A value is neither a level nor a format.
    pub fn read(level: Option<String>, format: Option<String>, env: Env<'_>) -> Result<Self, UsageError> {
        let mut reader = SettingsReader::with_flags(env, log_flags(level, format));
        let log = Self::of(&mut reader);
        reader.done(log)
    }

    fn of(reader: &mut SettingsReader<'_>) -> Option<Self> {
        let (level, format) = (reader.value(&LOG), reader.value(&LOG_FORMAT));
        Some(Self { level: level?, format: format? })
    }
}

fn log_flags(level: Option<String>, format: Option<String>) -> Flags {
    let mut flags = Flags::default();
    flags.insert_value(&LOG, level);
    flags.insert_value(&LOG_FORMAT, format);
    flags
}

impl UserDataSettings {
    /// Reads the flags and the environment.
    ///
    /// # Errors
    /// The faults of the flags and variables.
    pub fn read(args: UserDataArgs, env: Env<'_>) -> Result<Self, UsageError> {
        let mut flags = Flags::default();
        for (setting, values) in [(&PP_INBOUNDS, args.pp_inbounds), (&PP_OUTBOUNDS, args.pp_outbounds)] {
            if !values.is_empty() {
                flags.insert(setting, values.into_iter().map(Into::into).collect());
            }
        }
        flags.insert_value(&STORE, args.store);
        let mut reader = SettingsReader::with_flags(env, flags);
        reader.refuse_if_off();
        let pod = reader.pod(args.pod_id.as_deref());
        let (inbounds, outbounds) = (reader.tags(&PP_INBOUNDS), reader.tags(&PP_OUTBOUNDS));
        let settings = pod.zip(reader.path(&STORE));
        reader.done(settings.map(|(pod, store)| Self {
            pod,
            inbounds,
            outbounds,
            store,
            output: args.output,
        }))
    }
}

impl KeygenSettings {
    /// Reads the flags.
    ///
    /// # Errors
    /// The faults of the flags and variables.
    pub fn read(args: KeygenArgs, env: Env<'_>) -> Result<Self, UsageError> {
        let mut flags = Flags::default();
        flags.insert_value(&STORE, args.store);
        let mut reader = SettingsReader::with_flags(env, flags);
        let pod = args.pod_id.and_then(|id| reader.pod(Some(&id)));
        let store = reader.path(&STORE);
        reader.done(store.map(|store| Self { pod, store }))
    }
}
