//! Reads the settings of `serve`: flags, variables, and a file.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use secure_comms_adaptor::kbs::KbsSettings;
use secure_comms_adaptor::key_source::KeySource;
use secure_comms_adaptor::pod::AgentTunnels;
use secure_comms_keys::WorkerNodeKeys;
use secure_comms_keys::text::escape;
use secure_comms_protocol::tag::UNIX_PATH_MAX;
use secure_comms_protocol::{Bind, InboundTag, OutboundTag};

use super::channel::{Channel, duration};
use super::reader::{SettingsReader, Source};
use super::{Env, LogSettings, UsageError, init_data, log_flags, units};
use crate::caa::CaaSettings;
use crate::cli::Cli;
use crate::cli::setting::{
    ALLOWED_UIDS, CAA, CERTIFICATES, FORWARDER_PORT, Flags, GRACE, INBOUNDS, KBS_ADMIN_KEY, KBS_URL,
    LISTEN_PORT, MEMORY, METRICS_LISTEN, METRICS_PODS, NO_TRUSTEE, PODS_DIRECTORY, RUN_DIR, SERVE,
    SERVE_DEADLINE, SOCKET, STORE, Setting,
};
use crate::init_data::InitDataPolicy;

/// The longest pause of cloud-api-adaptor between two dials of a VM.
const CAA_PAUSE: Duration = Duration::from_secs(5);
const MEMORY_MIN: usize = 4 << 20;
/// The API's socket in the run directory.
const SOCKET_NAME: &str = "adaptor.sock";
/// Longest path of a unix socket, in bytes.
const SOCKET_MAX: usize = UNIX_PATH_MAX;

const UNBOUND: &str = "the keys of pods are bound to no VM, unless the API names its init-data: none is expected, so anyone \
                       who starts a VM that the KBS accepts can fetch them, also the cloud; give init-data-rules, \
                       init-data or init-data-digest, and use the resource policy of deploy/";

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
    /// Time limit of a pod's start, unless its launcher names one.
    pub deadline: Duration,
    /// Bytes in one direction after which the session keys are renewed.
    pub rekey_bytes: usize,
    /// Memory for the data of all pods' streams, in bytes.
    pub memory: usize,
    /// Whether only post-quantum key exchange is offered and accepted.
    pub require_pq: bool,
    /// The way in of cloud-api-adaptor; `None`: off.
    pub caa: Option<CaaSettings>,
    /// The API's socket.
    pub socket: PathBuf,
    /// Users that may use the API, beyond root and our own.
    pub allowed_uids: Vec<u32>,
    /// Where monitoring reads; `None`: nowhere.
    pub metrics_listen: Option<SocketAddr>,
    /// Whether there are metrics of each pod.
    pub metrics_pods: bool,
    /// The log.
    pub log: LogSettings,
    /// Each setting's value, and where it comes from.
    pub effective: Vec<EffectiveSetting>,
    /// What is valid and probably not meant, one a line.
    pub warnings: Vec<String>,
}

/// A setting, its value, and where that comes from.
#[derive(Clone, Debug)]
pub struct EffectiveSetting {
    /// The setting.
    pub setting: &'static Setting,
    /// The value, as it was given; `None`: there is none.
    pub value: Option<Vec<String>>,
    /// Where it comes from.
    pub source: Source,
}

impl ServeSettings {
    /// Reads the flags, the environment and the settings' file. Of a setting, the flag counts before the variable, the
    /// variable before the file, and the file before the default.
    ///
    /// # Errors
    /// The faults of all of them.
    pub fn read(flags: Flags, config: Option<PathBuf>, env: Env<'_>) -> Result<Self, UsageError> {
        let mut reader = SettingsReader::with_file(env, flags, config);
        reader.refuse_if_off();
        let log = LogSettings::of(&mut reader);
        let channel = Channel::read(&mut reader, &SERVE_DEADLINE);
        refuse_inbounds_of_one_pod(&mut reader);
        refuse_admin_key_of_others(&mut reader);
        let (init_data, worker_nodes) = if reader.switch(&NO_TRUSTEE) {
            Default::default()
        } else {
            (init_data::policy(&mut reader), init_data::worker_nodes(&mut reader))
        };
        let has_kbs = channel.as_ref().is_some_and(|channel| matches!(channel.key_source, KeySource::Kbs(_)));
        if has_kbs && init_data == InitDataPolicy::Unbound {
            reader.warnings.push(UNBOUND.to_owned());
        }
        let socket = socket(&mut reader);
        let allowed_uids = allowed_uids(&mut reader);
        let metrics_listen = metrics_listen(&mut reader);
        let metrics_pods = reader.switch(&METRICS_PODS);
        let caa = caa(&mut reader, channel.as_ref().map(|channel| channel.deadline));
        let (store, memory) = (reader.path(&STORE), memory(&mut reader));
        let effective = effective(&reader, channel.as_ref(), socket.as_deref());
        let warnings = std::mem::take(&mut reader.warnings);
        let read = channel.zip(store).zip(log).zip(socket).zip(caa).zip(memory);
        let settings = read.map(|(((((channel, store), log), socket), caa), memory)| Self {
            inbounds: channel.inbounds,
            outbounds: channel.outbounds,
            agent: channel.agent,
            kbs_filter: channel.kbs_filter,
            store,
            key_source: channel.key_source,
            init_data,
            worker_nodes,
            old_agents: channel.old_agents,
            deadline: channel.deadline,
            rekey_bytes: channel.rekey_bytes,
            memory,
            require_pq: channel.require_pq,
            caa,
            socket,
            allowed_uids,
            metrics_listen,
            metrics_pods,
            log,
            effective,
            warnings,
        });
        reader.done(settings)
    }
}

/// The flags of the settings, with those that every command has.
pub fn with_log_flags(mut flags: Flags, cli: &Cli) -> Flags {
    flags.extend(log_flags(cli.log.clone(), cli.log_format.clone()));
    flags
}

/// All pods have the same tags, and a port or path can be listened on once.
fn refuse_inbounds_of_one_pod(reader: &mut SettingsReader<'_>) {
    let Some(given) = reader.given(&INBOUNDS) else { return };
    let tags: Vec<InboundTag> = reader.tags(&INBOUNDS);
    for tag in tags {
        let fault = match &tag.bind {
            Bind::Tcp { port: 0, .. } => continue,
            Bind::Tcp { .. } => {
                "a fixed port serves one pod only: use port 0, or a unix path with {pod} in it"
            }
            Bind::Unix(path) if path.contains("{pod}") => continue,
            Bind::Unix(_) => "a fixed path serves one pod only: put {pod}, the pod's id, into it",
        };
        reader.faults.push(escape(&format!("{}: tag '{tag}': {fault}", given.name)));
    }
}

/// The holder of this key is the admin of the KBS. A file that cannot be opened is reported when it is read.
fn refuse_admin_key_of_others(reader: &mut SettingsReader<'_>) {
    let Some(given) = reader.given(&KBS_ADMIN_KEY) else { return };
    let Some(path) = given.values.first().map(PathBuf::from) else { return };
    let Ok(status) = std::fs::metadata(&path) else { return };
    let mode = status.permissions().mode() & 0o7777;
    // Kubernetes lets the group read a secret if the pod has an fsGroup.
    if mode & 0o037 != 0 {
        let advice = "run chmod 0600 on it, or give the Secret's volume defaultMode 0400, and make a new key if others did";
        let fault =
            format!("{}: {}: others may access it (mode {mode:04o}): {advice}", given.name, path.display());
        reader.faults.push(escape(&fault));
    }
}

fn socket(reader: &mut SettingsReader<'_>) -> Option<PathBuf> {
    let (name, path) = match reader.text(&SOCKET) {
        Some(given) => given,
        None => {
            let (name, dir) = reader.text(&RUN_DIR)?;
            (name, format!("{}/{SOCKET_NAME}", dir.trim_end_matches('/')))
        }
    };
    let is_valid = path.starts_with('/') && path.len() <= SOCKET_MAX && !path.contains('\0');
    if !is_valid {
        reader.fault(&name, &path, format!("expected an absolute path of at most {SOCKET_MAX} bytes"));
    }
    is_valid.then(|| path.into())
}

fn allowed_uids(reader: &mut SettingsReader<'_>) -> Vec<u32> {
    let (name, texts) = reader.list(&ALLOWED_UIDS);
    // A variable holds the list in one text.
    let ids = texts.iter().flat_map(|text| text.split(',')).map(str::trim).filter(|id| !id.is_empty());
    let mut uids = Vec::new();
    for id in ids {
        match id.parse() {
            Ok(uid) => uids.push(uid),
            Err(_) => reader.fault(&name, id, "expected the number of a user, as id -u prints it"),
        }
    }
    uids
}

fn metrics_listen(reader: &mut SettingsReader<'_>) -> Option<SocketAddr> {
    let (name, text) = reader.text(&METRICS_LISTEN)?;
    if text.is_empty() || text.eq_ignore_ascii_case("off") {
        return None;
    }
    let address = text.parse().ok();
    if address.is_none() {
        reader.fault(&name, &text, "expected IP:PORT, [IPv6]:PORT or off");
    }
    address
}

/// `None` after a fault, `Some(None)` if it is off.
fn caa(reader: &mut SettingsReader<'_>, deadline: Option<Duration>) -> Option<Option<CaaSettings>> {
    let is_on = reader.switch(&CAA);
    let forwarder_port = port(reader, &FORWARDER_PORT);
    let listen_port = port(reader, &LISTEN_PORT);
    if forwarder_port.is_some() && forwarder_port == listen_port {
        reader.faults.push(format!(
            "{}: is also {}: the service's own port must be another one",
            LISTEN_PORT.flag(),
            FORWARDER_PORT.flag()
        ));
    }
    let (pods_directory, grace) = (pods_directory(reader), grace(reader));
    let settings = CaaSettings {
        pods_directory: pods_directory?,
        forwarder_port: forwarder_port?,
        listen_port: listen_port?,
        certificates: reader.path(&CERTIFICATES).filter(|path| !path.as_os_str().is_empty()),
        grace: grace?,
        start_deadline: deadline?,
    };
    Some(is_on.then_some(settings))
}

/// The kernel lists the sockets in it by their whole paths, which show what lives.
fn pods_directory(reader: &mut SettingsReader<'_>) -> Option<PathBuf> {
    let given = reader.given_or_default(&PODS_DIRECTORY)?;
    let path = reader.path(&PODS_DIRECTORY)?;
    if path.is_absolute() {
        return Some(path);
    }
    reader.fault(&given.name, &path.to_string_lossy(), "expected an absolute path");
    None
}

/// A grace that is shorter than cloud-api-adaptor's pauses ends pods that are starting.
fn grace(reader: &mut SettingsReader<'_>) -> Option<Duration> {
    let grace = duration(reader, &GRACE, Duration::ZERO)?;
    if grace <= CAA_PAUSE {
        reader.warnings.push(format!(
            "{}: {} s: cloud-api-adaptor pauses up to {} s between two dials, so that a restart of this service may end pods \
             that are starting: give a longer time",
            GRACE.flag(),
            grace.as_secs(),
            CAA_PAUSE.as_secs()
        ));
    }
    Some(grace)
}

fn memory(reader: &mut SettingsReader<'_>) -> Option<usize> {
    let (name, text) = reader.text(&MEMORY)?;
    let found = units::bytes(&text).filter(|bytes| *bytes >= MEMORY_MIN);
    if found.is_none() {
        reader.fault(&name, &text, "expected a size of at least 4MiB, such as 64MiB, 1GiB or bytes");
    }
    found
}

fn port(reader: &mut SettingsReader<'_>, setting: &Setting) -> Option<u16> {
    let (name, text) = reader.text(setting)?;
    let port = text.parse().ok().filter(|port| *port != 0);
    if port.is_none() {
        reader.fault(&name, &text, "expected a port, from 1 to 65535");
    }
    port
}

fn effective(
    reader: &SettingsReader<'_>,
    channel: Option<&Channel>,
    socket: Option<&Path>,
) -> Vec<EffectiveSetting> {
    let kbs_url = channel.and_then(|channel| match &channel.key_source {
        KeySource::Kbs(kbs) => Some(kbs.url.to_string()),
        KeySource::UserData => None,
    });
    let derived = |setting: &Setting| match setting.name {
        name if name == SOCKET.name => socket.map(|path| path.display().to_string()),
        name if name == KBS_URL.name => kbs_url.clone(),
        _ => None,
    };
    let of = |setting: &&'static Setting| {
        let given = reader.given_or_default(setting);
        let source = given.as_ref().map_or(Source::Default, |given| given.source.clone());
        let texts =
            |values: Vec<OsString>| values.iter().map(|value| value.to_string_lossy().into_owned()).collect();
        let value: Option<Vec<String>> = given.map(|given| texts(given.values));
        EffectiveSetting { setting, value: value.or_else(|| Some(vec![derived(setting)?])), source }
    };
    SERVE.iter().map(of).collect()
}
