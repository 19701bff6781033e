//! What measured init-data says: `secure-comms.toml`, and the digest of the whole.
//!
//! The evidence binds init-data, but only a resource policy, or the adaptor, compares it. So what stands here counts once the
//! KBS has released the keys: it may add tunnels of the Kubernetes phase. Before that it can only take away: who may attest, and
//! for which pod.

use std::fmt;
use std::path::{Path, PathBuf};

use secure_comms_keys::text::escape;
use secure_comms_keys::{FileError, KeyError, WorkerNodeKeys, private_file};
use secure_comms_protocol::limits::INIT_DATA_MAX;
use secure_comms_protocol::tag::{self, InboundTag, OutboundTag, PhaseSet, Tag};
use secure_comms_protocol::{InitDataDigest, InitDataDigestError, PodId, TunnelName};

use super::toml::{self, TomlFault};

/// The keys of `secure-comms.toml`.
const KEYS: [&str; 4] = ["sc-inbounds", "sc-outbounds", "sc-wn-pub", "sc-pod-id"];
/// The longest unknown key that an error shows, in bytes.
const KEY_SHOWN: usize = 40;
/// The longest digest with its newline, in bytes.
const DIGEST_FILE_MAX: usize = 130;

/// What `secure-comms.toml` says.
#[derive(Clone, Debug, Default)]
pub struct InitData {
    /// `sc-inbounds`: inbounds of the Kubernetes phase.
    pub inbounds: Vec<InboundTag>,
    /// `sc-outbounds`: outbounds of the Kubernetes phase.
    pub outbounds: Vec<OutboundTag>,
    /// `sc-wn-pub`: the worker nodes that may attest.
    pub worker_node: Option<WorkerNodeKeys>,
    /// `sc-pod-id`: the pod that the VM is for.
    pub pod_id: Option<PodId>,
}

/// All faults of a `secure-comms.toml`; never empty. None quotes a value, except a tag's.
#[derive(Debug)]
pub struct InitDataFaults(Vec<Fault>);

#[derive(Debug)]
enum Fault {
    Toml(TomlFault),
    Unknown(String),
    NotText(&'static str),
    Twice(&'static str),
    Tags(&'static str, tag::TagErrors),
    Rule(&'static str, String, &'static str),
    WorkerNode(KeyError),
    PodId,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Toml(fault) => write!(f, "{fault}"),
            Self::Unknown(key) => write!(f, "key '{key}': not known; expected {}", KEYS.join(", ")),
            Self::NotText(key) => write!(f, "key '{key}': expected a string"),
            Self::Twice(key) => write!(f, "key '{key}': given twice"),
            Self::Tags(key, errors) => write!(f, "key '{key}': {errors}"),
            Self::Rule(key, tag, rule) => write!(f, "key '{key}': tag '{tag}': {rule}"),
            Self::WorkerNode(error) => write!(f, "key 'sc-wn-pub': {error}"),
            Self::PodId => f.write_str(
                "key 'sc-pod-id': not a pod id; expected the runtime's sandbox id: letters, digits, . _ -",
            ),
        }
    }
}

impl fmt::Display for InitDataFaults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, fault) in self.0.iter().enumerate() {
            write!(f, "{}{fault}", if index > 0 { "; " } else { "" })?;
        }
        Ok(())
    }
}

impl std::error::Error for InitDataFaults {}

/// Why a file of init-data can't be used. That it is missing is not an error.
#[derive(Debug, thiserror::Error)]
pub enum InitDataError {
    /// It can't be read, others can write it, or it is too large.
    #[error("reading init-data: {}", with_cause(.0))]
    File(#[from] FileError),
    /// It is not what it should be.
    #[error("reading init-data: {}: {faults}; correct secure-comms.toml in the pod's init-data", path.display())]
    Toml {
        /// Path of the file.
        path: PathBuf,
        /// Every fault.
        faults: InitDataFaults,
    },
    /// The file of the digest holds anything else.
    #[error("reading the digest of init-data: {}: {fault}; check what writes it in the VM", path.display())]
    Digest {
        /// Path of the file.
        path: PathBuf,
        /// The fault.
        fault: InitDataDigestError,
    },
}

fn with_cause(error: &FileError) -> String {
    match std::error::Error::source(error) {
        Some(cause) => format!("{error}: {cause}; make it a file that this service may read"),
        None => error.to_string(),
    }
}

/// Reads the text of a `secure-comms.toml`.
///
/// # Errors
/// Every fault of the text.
pub fn parse(text: &[u8]) -> Result<InitData, InitDataFaults> {
    let mut faults = Vec::new();
    let mut init_data = InitData::default();
    let mut seen = Vec::new();
    let pairs = toml::pairs(text).map_err(|fault| InitDataFaults(vec![Fault::Toml(fault)]))?;
    for (name, value) in pairs {
        let Some(key) = KEYS.into_iter().find(|key| *key == name) else {
            // A list that is one long line may stand in the key's place.
            let end = name.char_indices().map(|(at, _)| at).find(|at| *at >= KEY_SHOWN).unwrap_or(name.len());
            faults.push(Fault::Unknown(escape(name.get(..end).unwrap_or_default())));
            continue;
        };
        if seen.contains(&key) {
            faults.push(Fault::Twice(key));
            continue;
        }
        seen.push(key);
        match value {
            Some(value) => {
                if let Err(fault) = init_data.set(key, &value) {
                    faults.extend(fault);
                }
            }
            None => faults.push(Fault::NotText(key)),
        }
    }
    if faults.is_empty() { Ok(init_data) } else { Err(InitDataFaults(faults)) }
}

impl InitData {
    fn set(&mut self, key: &'static str, value: &str) -> Result<(), Vec<Fault>> {
        match key {
            "sc-inbounds" => self.inbounds = tags(key, value)?,
            "sc-outbounds" => self.outbounds = tags(key, value)?,
            "sc-wn-pub" => {
                let keys = WorkerNodeKeys::parse(value.as_bytes());
                self.worker_node = Some(keys.map_err(|error| vec![Fault::WorkerNode(error)])?);
            }
            _ => self.pod_id = Some(value.parse().map_err(|_| vec![Fault::PodId])?),
        }
        Ok(())
    }
}

fn tags<T: Tag>(key: &'static str, list: &str) -> Result<Vec<T>, Vec<Fault>> {
    let tags: Vec<T> = tag::parse_list(list).map_err(|errors| vec![Fault::Tags(key, errors)])?;
    let rule = |tag: &T| {
        if tag.phases() != PhaseSet::Kubernetes {
            Some("init-data counts once the keys are here; give it KUBERNETES_PHASE")
        } else if [TunnelName::kata_agent(), TunnelName::kbs()].contains(tag.name()) {
            Some("only a flag may move this tunnel; give it another name")
        } else {
            None
        }
    };
    let broken = |tag: &T| rule(tag).map(|rule| Fault::Rule(key, escape(&tag.to_string()), rule));
    let faults: Vec<Fault> = tags.iter().filter_map(broken).collect();
    if faults.is_empty() { Ok(tags) } else { Err(faults) }
}

/// Reads `secure-comms.toml`; none if it does not exist.
///
/// # Errors
/// It can't be read or used.
pub fn read(path: &Path) -> Result<Option<InitData>, InitDataError> {
    let Some(text) = read_file(path, INIT_DATA_MAX)? else { return Ok(None) };
    let parsed = parse(&text);
    parsed.map(Some).map_err(|faults| InitDataError::Toml { path: path.to_owned(), faults })
}

/// Reads the file with the digest of init-data, in hex; none if it does not exist.
///
/// # Errors
/// It can't be read, or holds anything else.
pub fn read_digest(path: &Path) -> Result<Option<InitDataDigest>, InitDataError> {
    let Some(text) = read_file(path, DIGEST_FILE_MAX)? else { return Ok(None) };
    let text = std::str::from_utf8(&text).unwrap_or_default();
    let digits = text.strip_suffix('\n').map_or(text, |line| line.strip_suffix('\r').unwrap_or(line));
    digits.parse().map(Some).map_err(|fault| InitDataError::Digest { path: path.to_owned(), fault })
}

fn read_file(path: &Path, max: usize) -> Result<Option<Vec<u8>>, FileError> {
    match private_file::read_ours(path, max) {
        Err(error) if error.is_not_found() => Ok(None),
        bytes => bytes.map(|bytes| Some(bytes.to_vec())),
    }
}

#[cfg(test)]
#[path = "init_data_tests.rs"]
mod tests;
