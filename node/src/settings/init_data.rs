//! Reads the settings that bind a pod to the init-data of its VM, and the worker nodes that may log in to it.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use secure_comms_keys::WorkerNodeKeys;
use secure_comms_keys::text::escape;

use super::ExpectedInitData;
use super::reader::{Given, SettingsReader, Source};
use crate::cli::setting::{INIT_DATA, INIT_DATA_DIGEST, INIT_DATA_RULES, Setting, WORKER_NODE_KEYS};
use crate::init_data::PodName;
use crate::init_data::rules::{self, of_pod};
use crate::init_data::{InitDataError, InitDataPolicy, digest_of_file};

/// The largest list of worker nodes, in bytes: with the pod's key it must fit into what an agent reads.
const WORKER_NODES_MAX: u64 = 48 * 1024;

const POD: (&str, &str) = ("--pod", "SECURE_COMMS_POD");

/// What says which init-data is expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    File,
    Digest,
    Rules,
}

/// The setting that says it, with its name for faults and its value. The strongest source counts; in one source, only one
/// setting may say it.
fn source(reader: &mut SettingsReader<'_>) -> Option<(Form, String, String)> {
    let settings: [(Form, &Setting); 3] =
        [(Form::File, &INIT_DATA), (Form::Digest, &INIT_DATA_DIGEST), (Form::Rules, &INIT_DATA_RULES)];
    let strength = |given: &Given| match given.source {
        Source::Flag => 3,
        Source::Variable(_) => 2,
        Source::File(..) => 1,
        Source::Default => 0,
    };
    let mut given: Vec<(Form, &Setting, Given)> = settings
        .into_iter()
        .filter_map(|(form, setting)| Some((form, setting, reader.given(setting)?)))
        .collect();
    let strongest = given.iter().map(|(.., given)| strength(given)).max()?;
    given.retain(|(.., given)| strength(given) == strongest);
    if let [_, (.., second), ..] = given.as_slice() {
        let names: Vec<&str> = given.iter().map(|(.., given)| given.name.as_str()).collect();
        let names = names.join(", ");
        let fault = format!("{}: contradicts another source of init-data: give one of {names}", second.name);
        reader.faults.push(fault);
        return None;
    }
    let (form, setting, _) = given.pop()?;
    let (name, value) = reader.text(setting)?;
    Some((form, name, value))
}

/// The init-data that is expected of one pod's VM. `pod` is the value of `--pod`.
pub(super) fn expected(reader: &mut SettingsReader<'_>, pod: Option<String>) -> ExpectedInitData {
    let faults = reader.faults.len();
    let found = source(reader);
    let is_rules = matches!(found, Some((Form::Rules, ..)));
    if pod.is_some() && !is_rules && reader.faults.len() == faults {
        reader.faults.push("--pod: needs --init-data-rules".to_owned());
    }
    let expected = match found {
        None => None,
        Some((Form::File, name, file)) => {
            digest_of_file(Path::new(&file)).map_err(|error| unusable(reader, &name, &file, &error)).ok()
        }
        Some((Form::Digest, name, digest)) => reader.parsed(&name, &digest),
        Some((Form::Rules, name, file)) => return from_rules(reader, pod, (&name, &file)),
    };
    expected.map_or(ExpectedInitData::AsBefore, ExpectedInitData::Digest)
}

/// The init-data that is expected of the VMs of a node. Rules are looked through now, and read again for each pod.
pub(super) fn policy(reader: &mut SettingsReader<'_>) -> InitDataPolicy {
    let policy = match source(reader) {
        None => None,
        Some((Form::File, name, file)) => {
            let digest = digest_of_file(Path::new(&file));
            digest.map(InitDataPolicy::Digest).map_err(|error| unusable(reader, &name, &file, &error)).ok()
        }
        Some((Form::Digest, name, digest)) => reader.parsed(&name, &digest).map(InitDataPolicy::Digest),
        Some((Form::Rules, name, file)) => rules::check(Path::new(&file))
            .map(|()| InitDataPolicy::Rules(file.clone().into()))
            .map_err(|error| unusable(reader, &name, &file, &error))
            .ok(),
    };
    policy.unwrap_or_default()
}

fn unusable(reader: &mut SettingsReader<'_>, name: &str, file: &str, error: &InitDataError) {
    reader.faults.push(escape(&format!("{name}: {file}: {error}")));
}

fn from_rules(
    reader: &mut SettingsReader<'_>,
    pod: Option<String>,
    (name, file): (&str, &str),
) -> ExpectedInitData {
    let Some((pod_name, pod)) = reader.flag_or((POD.0, pod), POD.1) else {
        reader.faults.push(format!("{name}: needs --pod NAMESPACE/NAME, or {}", POD.1));
        return ExpectedInitData::AsBefore;
    };
    let Some(pod) = reader.parsed::<PodName>(pod_name, &pod) else { return ExpectedInitData::AsBefore };
    match of_pod(Path::new(file), &pod) {
        Ok(Some(digest)) => ExpectedInitData::Digest(digest),
        Ok(None) => ExpectedInitData::Unbound,
        Err(error) => {
            unusable(reader, name, file, &error);
            ExpectedInitData::AsBefore
        }
    }
}

/// The further worker nodes that may log in.
pub(super) fn worker_nodes(reader: &mut SettingsReader<'_>) -> Option<WorkerNodeKeys> {
    let (name, file) = reader.text(&WORKER_NODE_KEYS)?;
    let mut lines = Vec::new();
    let read = File::open(&file).and_then(|file| file.take(WORKER_NODES_MAX + 1).read_to_end(&mut lines));
    let keys = match read {
        Err(error) => Err(error.to_string()),
        Ok(length) if u64::try_from(length).is_ok_and(|length| length > WORKER_NODES_MAX) => {
            Err("longer than 48 KiB".to_owned())
        }
        Ok(_) => WorkerNodeKeys::parse(&lines).map_err(|error| format!("{:#}", anyhow::Error::from(error))),
    };
    keys.map_err(|error| reader.faults.push(escape(&format!("{name}: {file}: {error}")))).ok()
}
