//! Reads the settings that bind a pod to the init-data of its VM, and the worker nodes that may log in to it.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use secure_comms_keys::WorkerNodeKeys;
use secure_comms_keys::text::escape;

use super::{ExpectedInitData, SettingsReader};
use crate::cli::ConnectArgs;
use crate::init_data::rules::{PodName, of_pod};
use crate::init_data::{InitDataError, digest_of_file};

/// The largest list of worker nodes, in bytes: with the pod's key it must fit into what an agent reads.
const WORKER_NODES_MAX: u64 = 48 * 1024;

const FILE: (&str, &str) = ("--init-data", "SECURE_COMMS_INIT_DATA");
const DIGEST: (&str, &str) = ("--init-data-digest", "SECURE_COMMS_INIT_DATA_DIGEST");
const RULES: (&str, &str) = ("--init-data-rules", "SECURE_COMMS_INIT_DATA_RULES");
const POD: (&str, &str) = ("--pod", "SECURE_COMMS_POD");
const WORKER_NODES: (&str, &str) = ("--worker-node-keys", "SECURE_COMMS_WORKER_NODE_KEYS");

/// A source of the digest, the name of its flag or variable, and its value.
type Given = ((&'static str, &'static str), &'static str, String);

/// The init-data that is expected. One flag may say it; without a flag, one variable.
pub(super) fn expected(reader: &mut SettingsReader<'_>, args: &ConnectArgs) -> ExpectedInitData {
    let sources = [(FILE, &args.init_data), (DIGEST, &args.init_data_digest), (RULES, &args.init_data_rules)];
    let mut given: Vec<Given> =
        sources.into_iter().filter_map(|(source, value)| Some((source, source.0, value.clone()?))).collect();
    if given.is_empty() {
        for (source, _) in sources {
            given.extend(reader.variable(source.1).map(|value| (source, source.1, value)));
        }
    }
    if let [_, (_, second, _), ..] = given.as_slice() {
        let names: Vec<&str> = given.iter().map(|(_, name, _)| *name).collect();
        let fault =
            format!("{second}: contradicts another source of init-data: give one of {}", names.join(", "));
        reader.faults.push(fault);
        return ExpectedInitData::AsBefore;
    }
    if args.pod.is_some() && !given.iter().any(|(source, ..)| *source == RULES) {
        reader.faults.push("--pod: needs --init-data-rules".to_owned());
    }
    let Some((source, name, value)) = given.pop() else { return ExpectedInitData::AsBefore };
    match source {
        FILE => from_file(reader, name, &value),
        DIGEST => reader.parsed(name, &value).map_or(ExpectedInitData::AsBefore, ExpectedInitData::Digest),
        _ => from_rules(reader, args, (name, &value)),
    }
}

fn unusable(
    reader: &mut SettingsReader<'_>,
    name: &str,
    file: &str,
    error: &InitDataError,
) -> ExpectedInitData {
    reader.faults.push(escape(&format!("{name}: {file}: {error}")));
    ExpectedInitData::AsBefore
}

fn from_file(reader: &mut SettingsReader<'_>, name: &str, file: &str) -> ExpectedInitData {
    match digest_of_file(Path::new(file)) {
        Ok(digest) => ExpectedInitData::Digest(digest),
        Err(error) => unusable(reader, name, file, &error),
    }
}

fn from_rules(
    reader: &mut SettingsReader<'_>,
    args: &ConnectArgs,
    (name, file): (&str, &str),
) -> ExpectedInitData {
    let Some((pod_name, pod)) = reader.flag_or((POD.0, args.pod.clone()), POD.1) else {
        reader.faults.push(format!("{name}: needs --pod NAMESPACE/NAME, or {}", POD.1));
        return ExpectedInitData::AsBefore;
    };
    let Some(pod) = reader.parsed::<PodName>(pod_name, &pod) else { return ExpectedInitData::AsBefore };
    match of_pod(Path::new(file), &pod) {
        Ok(Some(digest)) => ExpectedInitData::Digest(digest),
        Ok(None) => ExpectedInitData::Unbound,
        Err(error) => unusable(reader, name, file, &error),
    }
}

/// The further worker nodes that may log in.
pub(super) fn worker_nodes(reader: &mut SettingsReader<'_>, args: &ConnectArgs) -> Option<WorkerNodeKeys> {
    let (name, file) = reader.flag_or((WORKER_NODES.0, args.worker_node_keys.clone()), WORKER_NODES.1)?;
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

/// Flags that need a KBS.
pub(super) fn kbs_flags(args: &ConnectArgs) -> [(&'static str, bool); 6] {
    [
        (FILE.0, args.init_data.is_some()),
        (DIGEST.0, args.init_data_digest.is_some()),
        (RULES.0, args.init_data_rules.is_some()),
        (POD.0, args.pod.is_some()),
        (WORKER_NODES.0, args.worker_node_keys.is_some()),
        ("--allow-old-agents", args.allow_old_agents),
    ]
}
