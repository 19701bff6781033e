//! The command line: Go-style flags, so that existing unit files work word for word.
//!
//! argh parses `--flag value` only. So `go_flags` reads the arguments by the rules of Go's `flag` package, and argh gets
//! them in that one form.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;

use argh::FromArgs;
use secure_comms_keys::text::escape;
use secure_comms_protocol::{PodId, limits};

use crate::kata::podvm_volumes;
use crate::kata::sources::MountPrefixes;
use crate::pod_network::spec::Prefix;

use super::go_flags::{FLAGS, Stop, normalise};
use super::user_data::{AllowedHost, UserDataMode};

const NAME: &str = "agent-protocol-forwarder";
const ABOUT: &str = "\
The agent in a pod VM: serves the kata agent and named tunnels to the worker
node over SSH. Flags may have two dashes. If one is repeated, the last value
wins.
";
/// The smallest `-secure-comms-rekey-bytes`: less would spend the connection on key exchanges.
pub const REKEY_BYTES_MIN: usize = 1024 * 1024;

/// The command line, parsed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Path of the daemon config (apf.json), which is waited for; none if there is none.
    pub config: Option<PathBuf>,
    /// Path of the kata agent's unix socket.
    pub kata_agent_socket: PathBuf,
    /// The pod's network namespace; none for our own.
    pub pod_namespace: Option<String>,
    /// What to do if the pod's network namespace is missing.
    pub missing_namespace: MissingNamespace,
    /// An address for `lo` of the namespace that is made; none for 127.0.0.1 and ::1 alone.
    pub namespace_address: Option<Prefix>,
    /// The interface for the pod network tunnel; none for the one with the default route.
    pub host_interface: Option<String>,
    /// Whether `-secure-comms` is set.
    pub secure_comms: bool,
    /// Inbound tags as written.
    pub inbounds: String,
    /// Outbound tags as written.
    pub outbounds: String,
    /// What user data may decide.
    pub user_data: UserDataMode,
    /// Hosts to which outbounds of user data may lead.
    pub user_data_hosts: Vec<AllowedHost>,
    /// Path of init-data's `secure-comms.toml`; none if there is none.
    pub init_data: Option<PathBuf>,
    /// Path of the digest of init-data; none if there is none.
    pub init_data_digest: Option<PathBuf>,
    /// The pod that this VM is for, if the image says so.
    pub pod_id: Option<PodId>,
    /// Whether the keys are fetched as the two resources of versions before 0.2.
    pub separate_resources: bool,
    /// Address that the SSH server listens on.
    pub listen: SocketAddr,
    /// Address of `api-server-rest` in the pod's network namespace.
    pub guest_api: SocketAddr,
    /// Directory of the latched keys.
    pub state_dir: PathBuf,
    /// Where that directory may be.
    pub state_place: StatePlace,
    /// Whether `-secure-comms-require-pq` is set.
    pub require_pq: bool,
    /// Directories below which the sources of bind mounts are made.
    pub mount_prefixes: MountPrefixes,
    /// Path of the unix socket of the program that mounts cloud volumes.
    pub volumes_socket: PathBuf,
    /// Bytes on a connection after which it is rekeyed.
    pub rekey_bytes: usize,
    /// Flags that were given and are ignored.
    pub unused: Vec<&'static str>,
}

/// What to do if the pod's network namespace is missing at the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MissingNamespace {
    /// Wait for it: another program makes it.
    Awaited,
    /// Make it.
    Made,
    /// Make it, and exit.
    MadeOnly,
}

/// Where the directory of the latched keys may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatePlace {
    /// In memory only, which ends with the boot and which the host can't read.
    Memory,
    /// Anywhere: the operator says that the disk is encrypted with a key of this VM.
    AnyDisk,
}

/// An early end of the process: it prints `text` and exits with `code`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exit {
    /// 0 for help and version, 2 for a usage error.
    pub code: i32,
    /// Text to print, with its newline.
    pub text: String,
    /// Whether the text is printed to stderr.
    pub to_stderr: bool,
}

impl Exit {
    fn usage(fault: impl AsRef<str>) -> Self {
        let fault: String = fault.as_ref().chars().flat_map(escape_control).collect();
        Self { code: 2, text: format!("{NAME}: {fault} (-help lists the flags)\n"), to_stderr: true }
    }

    fn print(text: impl Into<String>) -> Self {
        Self { code: 0, text: text.into(), to_stderr: false }
    }
}

fn escape_control(c: char) -> impl Iterator<Item = char> {
    let escaped = c.is_control().then(|| c.escape_default());
    let plain = if escaped.is_some() { None } else { Some(c) };
    escaped.into_iter().flatten().chain(plain)
}

/// See ABOUT.
#[derive(FromArgs)]
#[expect(dead_code, reason = "ignored flags are only accepted and listed in the help")]
struct Flags {
    /// print name and version
    #[argh(switch)]
    version: bool,
    /// path of the daemon config, which is waited for; empty: none (default /run/peerpod/apf.json)
    #[argh(option, default = "Some(\"/run/peerpod/apf.json\".into())", from_str_fn(path_or_none))]
    config: Option<PathBuf>,
    /// ignored; accepted for compatibility with the TLS mode
    #[argh(option)]
    listen: Option<String>,
    /// unix socket of the kata agent (default /run/kata-containers/agent.sock)
    #[argh(option, default = "PathBuf::from(\"/run/kata-containers/agent.sock\")", from_str_fn(path))]
    kata_agent_socket: PathBuf,
    /// network namespace of the pod, a name or a path; empty: our own (default /run/netns/podns)
    #[argh(option)]
    pod_namespace: Option<String>,
    /// older name of -pod-namespace
    #[argh(option)]
    kata_agent_namespace: Option<String>,
    /// create the pod's network namespace if missing
    #[argh(switch)]
    create_pod_namespace: bool,
    /// create the pod's network namespace if missing, then exit
    #[argh(switch)]
    create_pod_namespace_only: bool,
    /// an address for lo of that namespace, such as 169.254.169.254/32 (default none)
    #[argh(option, from_str_fn(prefix))]
    pod_namespace_address: Option<Prefix>,
    /// interface for the pod network tunnel (default: the one with the default route)
    #[argh(option)]
    host_interface: Option<String>,
    /// enable Secure Comms, with keys from the KBS after attestation
    #[argh(switch)]
    secure_comms: bool,
    /// inbound tags, comma separated, e.g. KUBERNETES_PHASE:NAME:8000
    #[argh(option, default = "String::new()")]
    secure_comms_inbounds: String,
    /// outbound tags, comma separated, e.g. KUBERNETES_PHASE:NAME:127.0.0.1:8000
    #[argh(option, default = "String::new()")]
    secure_comms_outbounds: String,
    /// what the daemon config may decide beyond the pod's network: none, tunnels, or all (keys too; for pods that are not
    /// confidential) (default none)
    #[argh(option, default = "UserDataMode::None", from_str_fn(user_data_mode))]
    secure_comms_user_data: UserDataMode,
    /// hosts to which its outbounds may lead, beyond 127.0.0.1 and [::1]: HOST or HOST:PORT, comma separated
    #[argh(option, default = "Hosts(Vec::new())", from_str_fn(hosts))]
    secure_comms_user_data_hosts: Hosts,
    /// secure-comms.toml of measured init-data; empty: none (default /run/peerpod/secure-comms.toml)
    #[argh(option, default = "Some(\"/run/peerpod/secure-comms.toml\".into())", from_str_fn(path_or_none))]
    secure_comms_init_data: Option<PathBuf>,
    /// digest of init-data, in hex; empty: none (default /run/peerpod/initdata.digest)
    #[argh(option, default = "Some(\"/run/peerpod/initdata.digest\".into())", from_str_fn(path_or_none))]
    secure_comms_init_data_digest: Option<PathBuf>,
    /// pod that this VM is for; an adaptor that names another is refused
    #[argh(option, from_str_fn(pod_id))]
    secure_comms_pod_id: Option<PodId>,
    /// fetch the keys as the two resources of versions before 0.2, which nothing binds to one another
    #[argh(switch)]
    secure_comms_separate_resources: bool,
    /// address of the SSH server (default [::]:2222)
    #[argh(option, default = "default_listen()", from_str_fn(listener))]
    secure_comms_listen: SocketAddr,
    /// address of api-server-rest in the pod's namespace (default 127.0.0.1:8006)
    #[argh(option, default = "SocketAddr::from(([127, 0, 0, 1], 8006))", from_str_fn(server))]
    secure_comms_guest_api: SocketAddr,
    /// directory for this boot's keys, on a tmpfs (default /run/secure-comms)
    #[argh(option, default = "PathBuf::from(\"/run/secure-comms\")", from_str_fn(path))]
    secure_comms_state_dir: PathBuf,
    /// let that directory be on a disk, which must be encrypted with a key of this VM
    #[argh(switch)]
    secure_comms_state_dir_on_disk: bool,
    /// only post-quantum key exchange (mlkem768x25519-sha256), in both phases
    #[argh(switch)]
    secure_comms_require_pq: bool,
    /// directories below which missing sources of bind mounts are made, comma separated; empty: none
    /// (default /run/kata-containers,/run/cloud-volumes,/var/lib/kubelet)
    #[argh(option, default = "default_mount_prefixes()", from_str_fn(mount_prefixes))]
    secure_comms_mount_prefixes: MountPrefixes,
    /// unix socket of podvm-volumes, which mounts cloud volumes (default /run/podvm-volumes/volumes.sock)
    #[argh(option, default = "PathBuf::from(podvm_volumes::SOCKET)", from_str_fn(path))]
    secure_comms_volumes_socket: PathBuf,
    /// bytes after which a connection is rekeyed, e.g. 64M or 1GiB (default 32GiB, at least 1MiB)
    #[argh(option, default = "limits::REKEY_BYTES", from_str_fn(rekey_bytes))]
    secure_comms_rekey_bytes: usize,
    /// ignored; accepted for compatibility with the TLS mode
    #[argh(option)]
    ca_cert_file: Option<String>,
    /// ignored; accepted for compatibility with the TLS mode
    #[argh(option)]
    cert_file: Option<String>,
    /// ignored; accepted for compatibility with the TLS mode
    #[argh(option)]
    cert_key: Option<String>,
    /// ignored; accepted for compatibility with the TLS mode
    #[argh(switch)]
    tls_skip_verify: bool,
    /// ignored; accepted for compatibility with the TLS mode
    #[argh(switch)]
    disable_tls: bool,
}

fn default_listen() -> SocketAddr {
    (std::net::Ipv6Addr::UNSPECIFIED, limits::SSH_PORT).into()
}

fn default_mount_prefixes() -> MountPrefixes {
    MountPrefixes::default()
}

fn mount_prefixes(text: &str) -> Result<MountPrefixes, String> {
    text.parse()
}

fn path(text: &str) -> Result<PathBuf, String> {
    if text.starts_with('/') { Ok(text.into()) } else { Err("expected an absolute path".into()) }
}

fn path_or_none(text: &str) -> Result<Option<PathBuf>, String> {
    if text.is_empty() { Ok(None) } else { path(text).map(Some) }
}

fn prefix(text: &str) -> Result<Prefix, String> {
    text.parse().map_err(|()| format!("expected {}", Prefix::EXPECTED))
}

fn user_data_mode(text: &str) -> Result<UserDataMode, String> {
    text.parse().map_err(|()| "expected none, tunnels or all".into())
}

/// As a type of its own: a `Vec` would be a flag that may be repeated.
struct Hosts(Vec<AllowedHost>);

fn hosts(text: &str) -> Result<Hosts, String> {
    let list = text.split(',').map(str::trim).filter(|host| !host.is_empty());
    let hosts = list.map(|host| {
        host.parse().map_err(|()| {
            format!("'{}': expected HOST or HOST:PORT, an IPv6 address in brackets", escape(host))
        })
    });
    hosts.collect::<Result<_, _>>().map(Hosts)
}

fn pod_id(text: &str) -> Result<PodId, String> {
    text.parse().map_err(|_| "expected the runtime's sandbox id: letters, digits, . _ -".into())
}

/// Go writes `:2222` for every address of the host.
fn listener(text: &str) -> Result<SocketAddr, String> {
    let every = text.strip_prefix(':').and_then(|port| port.parse::<u16>().ok());
    if let Some(port) = every {
        return Ok((std::net::Ipv6Addr::UNSPECIFIED, port).into());
    }
    text.parse().map_err(|_| "expected an address and a port, such as [::]:2222 or 0.0.0.0:2222".into())
}

/// Go connects to the host itself for `:8006`.
fn server(text: &str) -> Result<SocketAddr, String> {
    let own = text.strip_prefix(':').and_then(|port| port.parse::<u16>().ok());
    own.map(|port| SocketAddr::from(([127, 0, 0, 1], port)))
        .or_else(|| text.parse().ok())
        .filter(|address: &SocketAddr| address.port() != 0)
        .ok_or_else(|| "expected an address and a port from 1 to 65535, such as 127.0.0.1:8006".into())
}

fn rekey_bytes(text: &str) -> Result<usize, String> {
    bytes(text).filter(|&bytes| bytes >= REKEY_BYTES_MIN).ok_or_else(|| {
        format!(
            "expected a number of bytes, at least {REKEY_BYTES_MIN}; 64M, 1GiB and the like are understood"
        )
    })
}

/// A number of bytes, with the units of GNU's tools: 1K and 1KiB are 1024, 1kB is 1000.
fn bytes(text: &str) -> Option<usize> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (count, unit) = text.split_at_checked(end)?;
    let unit = unit.to_ascii_lowercase();
    let base: usize = match unit.get(1..) {
        None | Some("" | "ib") => 1024,
        Some("b") => 1000,
        Some(_) => return None,
    };
    let power = match unit.as_str() {
        "" | "b" => 0,
        unit => 1 + u32::try_from("kmgt".find(unit.chars().next()?)?).ok()?,
    };
    count.parse::<usize>().ok()?.checked_mul(base.checked_pow(power)?)
}

/// The help of argh, with flags as every document writes them, and without its list of all flags in the first line.
fn help() -> Exit {
    let output = match Flags::from_args(&[NAME], &["--help"]) {
        Err(exit) => exit.output,
        Ok(_) => String::new(),
    };
    let (_, list) = output.split_once("Options:\n").unwrap_or_default();
    let list = list.replacen("  --help, help ", "  --help       ", 1);
    let mut text =
        format!("Usage: {NAME} [-FLAG VALUE | -FLAG=VALUE]... | help | version\n\n{ABOUT}\nFlags:\n");
    for line in list.lines() {
        match line.strip_prefix("  --").map(|flag| flag.split_once(' ').ok_or(flag)) {
            // One dash less, so one space more.
            Some(Ok((name, rest))) => text.push_str(&format!("  -{name}  {rest}")),
            Some(Err(name)) => text.push_str(&format!("  -{name}")),
            None => text.push_str(line),
        }
        text.push('\n');
    }
    Exit::print(text)
}

fn version() -> Exit {
    Exit::print(format!("{NAME} {}\n", env!("CARGO_PKG_VERSION")))
}

/// argh's error about a value, in our words.
fn value_fault(output: &str) -> String {
    let output = output.trim_end().replacen("option '--", "flag '-", 1);
    let output = output.strip_prefix("Error parsing ").unwrap_or(&output);
    output.replacen("' with value '", "': value '", 1)
}

/// Reads the arguments, without the program's name.
///
/// # Errors
/// An [`Exit`] for help, the version and every fault.
pub fn parse(args: impl Iterator<Item = OsString>) -> Result<Options, Exit> {
    let given = normalise(args).map_err(|stop| match stop {
        Stop::Help => help(),
        Stop::Version => version(),
        Stop::Usage(fault) => Exit::usage(fault),
    })?;
    let argh_args = given.to_long_options();
    let argh_args: Vec<&str> = argh_args.iter().map(String::as_str).collect();
    let flags =
        Flags::from_args(&[NAME], &argh_args).map_err(|exit| Exit::usage(value_fault(&exit.output)))?;
    if flags.version {
        return Err(version());
    }
    let missing_namespace = match (flags.create_pod_namespace, flags.create_pod_namespace_only) {
        (_, true) => MissingNamespace::MadeOnly,
        (true, false) => MissingNamespace::Made,
        (false, false) => MissingNamespace::Awaited,
    };
    let pod_namespace = pod_namespace(flags.pod_namespace, flags.kata_agent_namespace)?;
    if pod_namespace.is_none() && missing_namespace != MissingNamespace::Awaited {
        return Err(Exit::usage("flag -create-pod-namespace: -pod-namespace is empty; name the one to make"));
    }
    if flags.pod_namespace_address.is_some() && missing_namespace == MissingNamespace::Awaited {
        return Err(Exit::usage(
            "flag -pod-namespace-address: the namespace is another unit's; add -create-pod-namespace",
        ));
    }
    let unused = FLAGS.iter().filter(|flag| flag.unused && given.0.contains_key(flag.name));
    Ok(Options {
        config: flags.config,
        kata_agent_socket: flags.kata_agent_socket,
        pod_namespace,
        missing_namespace,
        namespace_address: flags.pod_namespace_address,
        host_interface: flags.host_interface.filter(|name| !name.is_empty()),
        secure_comms: flags.secure_comms,
        inbounds: flags.secure_comms_inbounds,
        outbounds: flags.secure_comms_outbounds,
        user_data: flags.secure_comms_user_data,
        user_data_hosts: flags.secure_comms_user_data_hosts.0,
        init_data: flags.secure_comms_init_data,
        init_data_digest: flags.secure_comms_init_data_digest,
        pod_id: flags.secure_comms_pod_id,
        separate_resources: flags.secure_comms_separate_resources,
        listen: flags.secure_comms_listen,
        guest_api: flags.secure_comms_guest_api,
        state_dir: flags.secure_comms_state_dir,
        state_place: if flags.secure_comms_state_dir_on_disk {
            StatePlace::AnyDisk
        } else {
            StatePlace::Memory
        },
        require_pq: flags.secure_comms_require_pq,
        mount_prefixes: flags.secure_comms_mount_prefixes,
        volumes_socket: flags.secure_comms_volumes_socket,
        rekey_bytes: flags.secure_comms_rekey_bytes,
        unused: unused.map(|flag| flag.name).collect(),
    })
}

fn pod_namespace(name: Option<String>, older: Option<String>) -> Result<Option<String>, Exit> {
    let namespace = match (name, older) {
        (Some(name), Some(older)) if name != older => {
            return Err(Exit::usage(format!(
                "flags -pod-namespace '{name}' and -kata-agent-namespace '{older}': two names of one flag with \
                 different values; keep -pod-namespace"
            )));
        }
        (name, older) => name.or(older).unwrap_or_else(|| "/run/netns/podns".into()),
    };
    Ok(Some(namespace).filter(|namespace| !namespace.is_empty()))
}

#[cfg(test)]
#[path = "flags_tests.rs"]
mod tests;
