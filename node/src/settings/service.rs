//! Where the commands that ask the service find it, and the orders of `pod start`.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use secure_comms_adaptor::address::Address;
use secure_comms_keys::text::escape;
use secure_comms_protocol::{InitDataDigest, PodId};

use super::reader::SettingsReader;
use super::{Env, UsageError, units};
use crate::api::DEFAULT_SOCKET;
use crate::cli::service::{PodStartArgs, ServiceArgs};
use crate::cli::setting::{Flags, STORE};

/// The socket's name in the run directory.
const SOCKET: &str = "adaptor.sock";
/// How long a start may take.
const DEADLINE: Duration = Duration::from_secs(300);
/// The longest deadline.
const DEADLINE_MAX: Duration = Duration::from_secs(86_400);

/// Where the service is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceSettings {
    /// Its socket.
    pub socket: PathBuf,
    /// Whether the flag or the variable names it; else it is the default one.
    pub is_given: bool,
}

impl ServiceSettings {
    /// Reads the flag and the environment.
    ///
    /// # Errors
    /// The path is not absolute.
    pub fn read(args: ServiceArgs, env: Env<'_>) -> Result<Self, UsageError> {
        let set = |name: &str| env(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let flag = args.socket.map(|socket| ("--socket", socket));
        let given = flag.or_else(|| Some(("SECURE_COMMS_SOCKET", set("SECURE_COMMS_SOCKET")?)));
        match given {
            Some((name, socket)) if !socket.is_absolute() => {
                Err(UsageError::of_value(name, &socket.to_string_lossy(), "expected an absolute path"))
            }
            Some((_, socket)) => Ok(Self { socket, is_given: true }),
            None => {
                // As the service's own setting.
                let run_dir = set("SECURE_COMMS_RUN_DIR").map(|run_dir| run_dir.join(SOCKET));
                Ok(Self { socket: run_dir.unwrap_or_else(|| DEFAULT_SOCKET.into()), is_given: false })
            }
        }
    }
}

/// Settings of `keys`.
#[derive(Clone, Debug)]
pub struct KeysSettings {
    /// Directory of the key store.
    pub store: PathBuf,
}

impl KeysSettings {
    /// Reads the flags, the environment and the settings' file, as the service does.
    ///
    /// # Errors
    /// The file cannot be read, or the store is not named well.
    pub fn read(store: Option<PathBuf>, config: Option<PathBuf>, env: Env<'_>) -> Result<Self, UsageError> {
        let mut flags = Flags::default();
        flags.insert_value(&STORE, store);
        let reader = SettingsReader::with_file(env, flags, config);
        let store = reader.path(&STORE);
        reader.done(store.map(|store| Self { store }))
    }
}

/// The orders of `pod start`.
#[derive(Clone, Debug)]
pub struct PodStartSettings {
    /// The pod.
    pub pod: PodId,
    /// Where its VM's agent is.
    pub addresses: Vec<Address>,
    /// Its namespace and name in Kubernetes.
    pub name: Option<(String, String)>,
    /// Digest of the init-data that its VM must show.
    pub init_data: Option<InitDataDigest>,
    /// How long the start may take.
    pub deadline: Duration,
    /// Whether to wait until the pod can be used.
    pub wait: bool,
}

impl PodStartSettings {
    /// Validates the flags.
    ///
    /// # Errors
    /// The faults of all of them.
    pub fn read(args: PodStartArgs) -> Result<Self, UsageError> {
        let mut faults = Vec::new();
        let mut fault = |name: &str, value: &str, expected: &dyn fmt::Display| {
            faults.push(escape(&format!("{name} '{value}': {expected}")));
        };
        let pod = args.id.parse::<PodId>().map_err(|error| fault("the pod's id", &args.id, &error)).ok();
        let mut addresses = Vec::new();
        for text in &args.addresses {
            match text.parse::<Address>() {
                Ok(address) if addresses.contains(&address) => {}
                Ok(address) => addresses.push(address),
                Err(error) => fault("--address", text, &error),
            }
        }
        let init_data = args.init_data_digest.as_deref().and_then(|text| {
            text.parse::<InitDataDigest>().map_err(|error| fault("--init-data-digest", text, &error)).ok()
        });
        let deadline = match args.deadline.as_deref() {
            None => Some(DEADLINE),
            Some(text) => {
                let deadline = units::duration(text);
                let deadline = deadline.filter(|time| (Duration::from_secs(1)..=DEADLINE_MAX).contains(time));
                if deadline.is_none() {
                    fault("--deadline", text, &"expected a time of 1s to 24h, as 90s, 5m or 1h30m");
                }
                deadline
            }
        };
        match (pod, deadline) {
            (Some(pod), Some(deadline)) if faults.is_empty() => Ok(Self {
                pod,
                addresses,
                name: args.namespace.zip(args.name),
                init_data,
                deadline,
                wait: !args.no_wait,
            }),
            _ => Err(UsageError(faults)),
        }
    }
}

impl UsageError {
    /// A value that is not what is expected.
    pub(crate) fn of_value(name: &str, value: &str, expected: impl fmt::Display) -> Self {
        Self(vec![escape(&format!("{name} '{value}': {expected}"))])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn socket(flag: Option<&str>, set: &[(&str, &str)]) -> Result<String, String> {
        let env = |name: &str| set.iter().find(|(known, _)| *known == name).map(|(_, value)| value.into());
        let read = ServiceSettings::read(ServiceArgs { socket: flag.map(PathBuf::from) }, &env);
        read.map(|read| read.socket.to_string_lossy().into_owned()).map_err(|error| error.to_string())
    }

    #[test]
    fn the_flag_counts_before_the_variables() {
        let set = [("SECURE_COMMS_SOCKET", "/v"), ("SECURE_COMMS_RUN_DIR", "/r")];
        assert_eq!(socket(Some("/f"), &set), Ok("/f".to_owned()));
        assert_eq!(socket(None, &set), Ok("/v".to_owned()));
        assert_eq!(socket(None, &[set[1], ("SECURE_COMMS_SOCKET", "")]), Ok("/r/adaptor.sock".to_owned()));
        assert_eq!(socket(None, &[]), Ok("/run/secure-comms/adaptor.sock".to_owned()));
        assert_eq!(socket(Some("f"), &set), Err("--socket 'f': expected an absolute path".to_owned()));
    }

    #[test]
    fn all_faults_of_a_start_come_at_once() {
        let args = PodStartArgs {
            id: "a b".to_owned(),
            addresses: vec!["x y".to_owned()],
            namespace: None,
            name: None,
            init_data_digest: Some("12".to_owned()),
            deadline: Some("0s".to_owned()),
            no_wait: false,
        };
        let error = PodStartSettings::read(args).unwrap_err();
        assert_eq!(error.faults().count(), 4, "{error}");
    }
}
