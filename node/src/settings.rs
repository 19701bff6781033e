//! Settings: the flags and the environment, validated as a whole. All faults are reported together.

mod connect;
mod init_data;
mod serve;
mod units;
mod variables;

use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use secure_comms_adaptor::address::Address;
use secure_comms_adaptor::kbs::KbsSettings;
use secure_comms_adaptor::key_source::KeySource;
use secure_comms_adaptor::pod::AgentTunnels;
use secure_comms_keys::WorkerNodeKeys;
use secure_comms_keys::text::escape;
use secure_comms_protocol::tag::{Tag, parse_lists};
use secure_comms_protocol::{InboundTag, InitDataDigest, OutboundTag, PodId};

use crate::cli::{KeygenArgs, UserDataArgs};
use crate::logging::{Level, LogFormat};
pub use serve::ServeSettings;
pub use variables::unknown_variables;

/// Default of `--store`.
pub const DEFAULT_STORE: &str = "/var/lib/secure-comms-adaptor";
/// Default of `--run-dir`.
pub const DEFAULT_RUN_DIR: &str = "/run/secure-comms";
/// Default of `--kbs`.
pub const DEFAULT_KBS: &str = "kbs-service.trustee-operator-system:8080";

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

/// Reads flags and variables, and collects their faults.
struct SettingsReader<'a> {
    env: Env<'a>,
    faults: Vec<String>,
    warnings: Vec<String>,
}

impl<'a> SettingsReader<'a> {
    fn new(env: Env<'a>) -> Self {
        Self { env, faults: Vec::new(), warnings: Vec::new() }
    }

    fn fault(&mut self, name: &str, value: &str, expected: impl fmt::Display) {
        self.faults.push(escape(&format!("{name} '{value}': {expected}")));
    }

    fn missing(&mut self, flag: &str, what: &str) {
        self.faults.push(format!("{flag}: missing: {what}"));
    }

    /// A variable that is set and not empty. Empty counts as unset, because a config map cannot leave a variable out for
    /// single pods.
    fn variable(&mut self, name: &str) -> Option<String> {
        let value = (self.env)(name)?;
        match value.into_string() {
            Ok(text) => Some(text).filter(|text| !text.is_empty()),
            Err(value) => {
                self.fault(name, &value.to_string_lossy(), "expected UTF-8");
                None
            }
        }
    }

    fn boolean(&mut self, name: &str) -> Option<bool> {
        let value = self.variable(name)?;
        match value.to_ascii_lowercase().as_str() {
            "true" => Some(true),
            "false" => Some(false),
            _ => {
                self.fault(name, &value, "expected true or false");
                None
            }
        }
    }

    /// The flag's value, else the variable's, with the name of the flag or variable.
    fn flag_or<'n>(
        &mut self,
        flag: (&'n str, Option<String>),
        variable: &'n str,
    ) -> Option<(&'n str, String)> {
        let (name, value) = flag;
        value.map(|value| (name, value)).or_else(|| Some((variable, self.variable(variable)?)))
    }

    fn parsed<T: FromStr<Err: fmt::Display>>(&mut self, name: &str, value: &str) -> Option<T> {
        value.parse().map_err(|error| self.fault(name, value, error)).ok()
    }

    fn value_or_default<T: FromStr<Err: fmt::Display> + Default>(
        &mut self,
        flag: (&str, Option<String>),
        variable: &str,
    ) -> Option<T> {
        match self.flag_or(flag, variable) {
            Some((name, value)) => self.parsed(name, &value),
            None => Some(T::default()),
        }
    }

    fn pod(&mut self, value: Option<&str>) -> Option<PodId> {
        match value {
            // The parser's error quotes the text.
            Some(text) => text.parse().map_err(|error| self.faults.push(format!("--pod-id: {error}"))).ok(),
            None => {
                self.missing("--pod-id", "give the pod's id (the runtime's sandbox id)");
                None
            }
        }
    }

    /// The tags of all lists of a flag, or of the variable if the flag is not given.
    fn tags<T: Tag>(&mut self, flag: (&str, Vec<String>), variable: &str) -> Vec<T> {
        let (name, lists) = match flag {
            (_, lists) if lists.is_empty() => (variable, Vec::from_iter(self.variable(variable))),
            given => given,
        };
        parse_lists(lists.iter().map(String::as_str)).unwrap_or_else(|errors| {
            self.faults.extend(errors.iter().map(|error| format!("{name}: {error}")));
            Vec::new()
        })
    }

    /// `SECURE_COMMS=false` is a fault: every command of this program needs Secure Comms.
    fn refuse_if_off(&mut self) {
        if self.boolean("SECURE_COMMS") == Some(false) {
            self.fault(
                "SECURE_COMMS",
                "false",
                "Secure Comms is off: set it to true, or do not start this program",
            );
        }
    }

    /// The settings, or all faults. `None` without a fault would be a bug; it is reported as an incomplete command line.
    fn done<T>(mut self, settings: Option<T>) -> Result<T, UsageError> {
        match settings {
            Some(settings) if self.faults.is_empty() => Ok(settings),
            _ => {
                if self.faults.is_empty() {
                    self.faults.push("the command line is incomplete: see --help".to_owned());
                }
                Err(UsageError(self.faults))
            }
        }
    }
}

fn store_or_default(store: Option<PathBuf>) -> PathBuf {
    store.unwrap_or_else(|| PathBuf::from(DEFAULT_STORE))
}

impl LogSettings {
    /// Reads `--log` and `--log-format`, or their variables.
    ///
    /// # Errors
    /// A value is neither a level nor a format.
    pub fn read(level: Option<String>, format: Option<String>, env: Env<'_>) -> Result<Self, UsageError> {
        let mut reader = SettingsReader::new(env);
        let level = reader.value_or_default(("--log", level), "SECURE_COMMS_LOG");
        let format = reader.value_or_default(("--log-format", format), "SECURE_COMMS_LOG_FORMAT");
        reader.done(level.zip(format).map(|(level, format)| Self { level, format }))
    }
}

impl UserDataSettings {
    /// Reads the flags and the environment.
    ///
    /// # Errors
    /// The faults of the flags and variables.
    pub fn read(args: UserDataArgs, env: Env<'_>) -> Result<Self, UsageError> {
        let mut reader = SettingsReader::new(env);
        reader.refuse_if_off();
        let pod = reader.pod(args.pod_id.as_deref());
        let inbounds = reader.tags(("--pp-inbounds", args.pp_inbounds), "SECURE_COMMS_PP_INBOUNDS");
        let outbounds = reader.tags(("--pp-outbounds", args.pp_outbounds), "SECURE_COMMS_PP_OUTBOUNDS");
        let store = store_or_default(args.store);
        reader.done(pod.map(|pod| Self { pod, inbounds, outbounds, store, output: args.output }))
    }
}

impl KeygenSettings {
    /// Reads the flags.
    ///
    /// # Errors
    /// The faults of the flags and variables.
    pub fn read(args: KeygenArgs, env: Env<'_>) -> Result<Self, UsageError> {
        let mut reader = SettingsReader::new(env);
        let pod = args.pod_id.and_then(|id| reader.pod(Some(&id)));
        reader.done(Some(Self { pod, store: store_or_default(args.store) }))
    }
}
