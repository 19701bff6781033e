//! What the command line and the environment ask for, valid as a whole or refused as a whole.

mod connect;

use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use secure_comms_keys::text::escape;
use secure_comms_protocol::tag::{Tag, parse_list};
use secure_comms_protocol::{InboundTag, OutboundTag, PodId};
use url::Url;

use crate::address::Address;
use crate::cli::{KeygenArgs, UserDataArgs};
use crate::log::Level;

/// Where keys are kept unless `--store` says otherwise.
pub const DEFAULT_STORE: &str = "/var/lib/secure-comms-adaptor";
/// Where the VM's KBS tunnel leads unless `--kbs` says otherwise.
pub const DEFAULT_KBS: &str = "kbs-service.trustee-operator-system:8080";

/// What `connect` is to do.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The pod.
    pub pod: PodId,
    /// Where its agent may be; never empty.
    pub addresses: Vec<Address>,
    /// Our inbounds, the built-in one included.
    pub inbounds: Vec<InboundTag>,
    /// Our outbounds, the built-in one included.
    pub outbounds: Vec<OutboundTag>,
    /// Where keys are kept.
    pub store: PathBuf,
    /// How the VM comes to its keys.
    pub trust: Trust,
    /// How long the start may take.
    pub deadline: Duration,
    /// Data in a direction after which new session keys are made, in bytes.
    pub rekey_bytes: usize,
    /// Whether a clean end forgets the pod.
    pub delete_on_exit: bool,
}

/// How the VM comes to its keys.
#[derive(Clone, Debug)]
pub enum Trust {
    /// From the KBS, once it has attested.
    Kbs(KbsSettings),
    /// From its user data; it never attests.
    UserData,
}

/// The KBS, as its admin sees it.
#[derive(Clone, Debug)]
pub struct KbsSettings {
    /// Where it is, http or https, without `/kbs/v0`.
    pub url: Url,
    /// A PEM file with the CA that signed its certificate; the system's CAs if none.
    pub ca: Option<PathBuf>,
    /// Who we are; none for a KBS that asks nobody.
    pub admin: Option<AdminSettings>,
}

/// The KBS's admin.
#[derive(Clone, Debug)]
pub struct AdminSettings {
    /// An Ed25519 private key, PKCS#8 PEM.
    pub key_file: PathBuf,
    /// `iss` of the token.
    pub issuer: String,
    /// `role` of the token.
    pub role: String,
}

/// What `user-data` is to do.
#[derive(Clone, Debug)]
pub struct UserDataSettings {
    /// The pod.
    pub pod: PodId,
    /// Inbounds of the VM's agent.
    pub inbounds: Vec<InboundTag>,
    /// Outbounds of the VM's agent.
    pub outbounds: Vec<OutboundTag>,
    /// Where keys are kept.
    pub store: PathBuf,
    /// The file to write; standard output if none.
    pub output: Option<PathBuf>,
}

/// What `keygen` is to do.
#[derive(Clone, Debug)]
pub struct KeygenSettings {
    /// The pod whose key is made too.
    pub pod: Option<PodId>,
    /// Where keys are kept.
    pub store: PathBuf,
}

/// Everything that is wrong with the command line and the environment; one fault a line, never empty.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", .0.join("\n"))]
pub struct UsageError(Vec<String>);

impl UsageError {
    /// The faults.
    pub fn faults(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }
}

/// The environment: a function, so that tests need not change their process's own.
pub type Env<'a> = &'a dyn Fn(&str) -> Option<OsString>;

/// Reads flags and variables, and collects what is wrong with them.
struct Reader<'a> {
    env: Env<'a>,
    faults: Vec<String>,
}

impl<'a> Reader<'a> {
    fn new(env: Env<'a>) -> Self {
        Self { env, faults: Vec::new() }
    }

    fn fault(&mut self, name: &str, value: &str, expected: impl fmt::Display) {
        self.faults.push(escape(&format!("{name} '{value}': {expected}")));
    }

    fn missing(&mut self, flag: &str, what: &str) {
        self.faults.push(format!("{flag}: missing: {what}"));
    }

    /// A variable that is set and not empty: config maps cannot leave one out for some pods.
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
        let value = (self.env)(name)?;
        match value.to_str() {
            Some("true") => Some(true),
            Some("false") => Some(false),
            _ => {
                self.fault(name, &value.to_string_lossy(), "expected true or false");
                None
            }
        }
    }

    /// The flag's value, else the variable's, with the name of where it is from.
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

    fn pod(&mut self, value: Option<&str>) -> Option<PodId> {
        match value {
            // The error names the text itself.
            Some(text) => text.parse().map_err(|error| self.faults.push(format!("--pod-id: {error}"))).ok(),
            None => {
                self.missing("--pod-id", "give the pod's id (the runtime's sandbox id)");
                None
            }
        }
    }

    fn tags<T: Tag>(&mut self, flag: (&str, Option<String>), variable: &str) -> Vec<T> {
        let Some((name, list)) = self.flag_or(flag, variable) else { return Vec::new() };
        parse_list(&list).unwrap_or_else(|errors| {
            self.faults.extend(errors.iter().map(|error| format!("{name}: {error}")));
            Vec::new()
        })
    }

    /// Secure Comms switched off is an answer to nothing that this program does.
    fn refuse_if_off(&mut self) {
        if self.boolean("SECURE_COMMS") == Some(false) {
            self.fault(
                "SECURE_COMMS",
                "false",
                "Secure Comms is off: set it to true, or do not start this program",
            );
        }
    }

    /// All or nothing. `None` without a fault cannot be; were it, the user hears of it rather than nothing.
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

/// How much to log: `--log`, else `SECURE_COMMS_LOG`, else info.
///
/// # Errors
/// It is not a level.
pub fn log_level(flag: Option<String>, env: Env<'_>) -> Result<Level, UsageError> {
    let mut reader = Reader::new(env);
    let level = match reader.flag_or(("--log", flag), "SECURE_COMMS_LOG") {
        Some((name, value)) => reader.parsed(name, &value),
        None => Some(Level::default()),
    };
    reader.done(level)
}

impl UserDataSettings {
    /// Reads the flags and the environment.
    ///
    /// # Errors
    /// All that is wrong with them.
    pub fn read(args: UserDataArgs, env: Env<'_>) -> Result<Self, UsageError> {
        let mut reader = Reader::new(env);
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
    /// All that is wrong with them.
    pub fn read(args: KeygenArgs, env: Env<'_>) -> Result<Self, UsageError> {
        let mut reader = Reader::new(env);
        let pod = args.pod_id.and_then(|id| reader.pod(Some(&id)));
        reader.done(Some(Self { pod, store: store_or_default(args.store) }))
    }
}
