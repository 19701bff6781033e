//! The command line: Go-style flags, so that existing unit files work word for word.
//!
//! argh knows `--flag value` only. So [`normalise`] reads the arguments by the rules of Go's `flag` package
//! (<https://pkg.go.dev/flag#hdr-Command_line_flag_syntax>), and argh gets them in the one form it knows.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;

use argh::FromArgs;
use secure_comms_protocol::limits;

const NAME: &str = "agent-protocol-forwarder";
/// The smallest `-secure-comms-rekey-bytes`: less would spend the connection on key exchanges.
pub const REKEY_BYTES_MIN: usize = 1024 * 1024;

/// What the operator asked for on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// The daemon config (apf.json); may be missing.
    pub config: PathBuf,
    /// The kata agent's unix socket.
    pub kata_agent_socket: PathBuf,
    /// The pod's network namespace; none: our own.
    pub pod_namespace: Option<String>,
    /// The interface for the pod network tunnel; none: the one with the default route.
    pub host_interface: Option<String>,
    /// Whether `-secure-comms` is set.
    pub secure_comms: bool,
    /// Inbound tags as written.
    pub inbounds: String,
    /// Outbound tags as written.
    pub outbounds: String,
    /// Where the SSH server listens.
    pub listen: SocketAddr,
    /// Where `api-server-rest` is, seen from the pod's network namespace.
    pub guest_api: SocketAddr,
    /// Where the latched keys are kept for this boot.
    pub state_dir: PathBuf,
    /// Data after which new session keys are asked for, in bytes.
    pub rekey_bytes: usize,
    /// Flags that were given and mean nothing over SSH.
    pub unused: Vec<&'static str>,
}

/// Why there are no options: the process prints `text` and exits with `code`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exit {
    /// 0 for help and version, 2 for a usage error.
    pub code: i32,
    /// What to print, with its newline.
    pub text: String,
    /// Whether it goes to stderr.
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

/// The agent in a pod VM: serves the kata agent and named tunnels to the worker node over SSH.
/// Flags may be written -flag value, -flag=value or with two dashes; the last one counts.
#[derive(FromArgs)]
struct Flags {
    /// print name and version
    #[argh(switch)]
    version: bool,
    /// daemon config, may be missing (default /run/peerpod/apf.json)
    #[argh(option, default = "PathBuf::from(\"/run/peerpod/apf.json\")", from_str_fn(path))]
    config: PathBuf,
    /// address of the older TLS mode; unused over SSH
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
    /// interface for the pod network tunnel (default: the one with the default route)
    #[argh(option)]
    host_interface: Option<String>,
    /// speak Secure Comms; so does "sc": true in the daemon config
    #[argh(switch)]
    secure_comms: bool,
    /// inbound tags, comma separated, e.g. KUBERNETES_PHASE:NAME:8000
    #[argh(option, default = "String::new()")]
    secure_comms_inbounds: String,
    /// outbound tags, comma separated, e.g. KUBERNETES_PHASE:NAME:127.0.0.1:8000
    #[argh(option, default = "String::new()")]
    secure_comms_outbounds: String,
    /// address of the SSH server (default [::]:2222)
    #[argh(option, default = "default_listen()", from_str_fn(listen))]
    secure_comms_listen: SocketAddr,
    /// address of api-server-rest in the pod's namespace (default 127.0.0.1:8006)
    #[argh(option, default = "SocketAddr::from(([127, 0, 0, 1], 8006))", from_str_fn(server))]
    secure_comms_guest_api: SocketAddr,
    /// directory for this boot's keys, on a tmpfs (default /run/secure-comms)
    #[argh(option, default = "PathBuf::from(\"/run/secure-comms\")", from_str_fn(path))]
    secure_comms_state_dir: PathBuf,
    /// bytes after which new session keys are asked for (default 32 GiB, at least 1 MiB)
    #[argh(option, default = "limits::REKEY_BYTES", from_str_fn(rekey_bytes))]
    secure_comms_rekey_bytes: usize,
    /// unused over SSH
    #[argh(option)]
    ca_cert_file: Option<String>,
    /// unused over SSH
    #[argh(option)]
    cert_file: Option<String>,
    /// unused over SSH
    #[argh(option)]
    cert_key: Option<String>,
    /// unused over SSH
    #[argh(switch)]
    tls_skip_verify: bool,
    /// unused over SSH
    #[argh(switch)]
    disable_tls: bool,
}

fn default_listen() -> SocketAddr {
    (std::net::Ipv6Addr::UNSPECIFIED, limits::SSH_PORT).into()
}

fn path(text: &str) -> Result<PathBuf, String> {
    if text.starts_with('/') { Ok(text.into()) } else { Err("expected an absolute path".into()) }
}

fn listen(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| "expected an address and a port, such as [::]:2222 or 0.0.0.0:2222".into())
}

fn server(text: &str) -> Result<SocketAddr, String> {
    text.parse()
        .ok()
        .filter(|address: &SocketAddr| address.port() != 0)
        .ok_or_else(|| "expected an address and a port from 1 to 65535, such as 127.0.0.1:8006".into())
}

fn rekey_bytes(text: &str) -> Result<usize, String> {
    text.parse()
        .ok()
        .filter(|&bytes| bytes >= REKEY_BYTES_MIN)
        .ok_or_else(|| format!("expected a number of bytes, at least {REKEY_BYTES_MIN}"))
}

/// A flag as the normaliser knows it: its name, and whether it is a boolean.
struct Flag {
    name: &'static str,
    boolean: bool,
    unused: bool,
}

const fn value(name: &'static str) -> Flag {
    Flag { name, boolean: false, unused: false }
}

const fn boolean(name: &'static str) -> Flag {
    Flag { name, boolean: true, unused: false }
}

const fn unused(flag: Flag) -> Flag {
    Flag { unused: true, ..flag }
}

const FLAGS: &[Flag] = &[
    boolean("version"),
    value("config"),
    unused(value("listen")),
    value("kata-agent-socket"),
    value("pod-namespace"),
    value("kata-agent-namespace"),
    value("host-interface"),
    boolean("secure-comms"),
    value("secure-comms-inbounds"),
    value("secure-comms-outbounds"),
    value("secure-comms-listen"),
    value("secure-comms-guest-api"),
    value("secure-comms-state-dir"),
    value("secure-comms-rekey-bytes"),
    unused(value("ca-cert-file")),
    unused(value("cert-file")),
    unused(value("cert-key")),
    unused(boolean("tls-skip-verify")),
    unused(boolean("disable-tls")),
];

/// The flags that were given, each with its last value.
#[derive(Debug, Default, PartialEq, Eq)]
struct Given(BTreeMap<&'static str, String>);

/// Reads `args` as Go's `flag.Parse` does, but that an argument that is no flag is an error instead of the end
/// of the flags, and that empty arguments are skipped: a unit's `${OPTIONS}` may expand to one.
fn normalise(args: impl Iterator<Item = OsString>) -> Result<Given, Exit> {
    let mut given = Given::default();
    let mut args = args.map(|arg| {
        arg.into_string().map_err(|arg| {
            Exit::usage(format!("argument '{}': not UTF-8; write it in UTF-8", arg.to_string_lossy()))
        })
    });
    while let Some(arg) = args.next().transpose()? {
        if arg.is_empty() {
            continue;
        }
        if arg == "--" {
            break;
        }
        let (name, inline) = split(&arg)?;
        let Some(flag) = FLAGS.iter().find(|flag| flag.name == name) else {
            return Err(match name {
                "h" | "help" => help(),
                _ => Exit::usage(format!("flag '{arg}': no such flag; correct or remove it")),
            });
        };
        let value = match (inline, flag.boolean) {
            (Some(value), true) => parse_bool(&arg, value)?.to_string(),
            (None, true) => true.to_string(),
            (Some(value), false) => value.to_owned(),
            (None, false) => args.next().transpose()?.ok_or_else(|| {
                Exit::usage(format!("flag -{name}: needs a value: -{name} VALUE or -{name}=VALUE"))
            })?,
        };
        given.0.insert(flag.name, value);
    }
    while let Some(arg) = args.next().transpose()? {
        if !arg.is_empty() {
            return Err(not_a_flag(&arg));
        }
    }
    Ok(given)
}

fn split(arg: &str) -> Result<(&str, Option<&str>), Exit> {
    let body = arg.strip_prefix("--").or_else(|| arg.strip_prefix('-')).unwrap_or_default();
    if !arg.starts_with('-') || arg == "-" {
        return Err(not_a_flag(arg));
    }
    if body.is_empty() || body.starts_with(['-', '=']) {
        return Err(Exit::usage(format!("argument '{arg}': bad flag syntax; expected -flag or --flag")));
    }
    Ok(match body.split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (body, None),
    })
}

fn not_a_flag(arg: &str) -> Exit {
    Exit::usage(format!(
        "argument '{arg}': not a flag; remove it, or write -flag={arg} if it is the value of a boolean flag"
    ))
}

/// The texts Go's `strconv.ParseBool` takes.
fn parse_bool(arg: &str, text: &str) -> Result<bool, Exit> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err(Exit::usage(format!("flag '{arg}': expected true or false after the '='"))),
    }
}

fn help() -> Exit {
    match Flags::from_args(&[NAME], &["--help"]) {
        Err(exit) => Exit::print(exit.output),
        Ok(_) => Exit::print(format!("{NAME}\n")),
    }
}

impl Given {
    /// The one form argh knows.
    fn to_argh(&self) -> Vec<String> {
        let mut out = Vec::new();
        for flag in FLAGS {
            match self.0.get(flag.name) {
                Some(value) if flag.boolean && value != "true" => {}
                Some(_) if flag.boolean => out.push(format!("--{}", flag.name)),
                Some(value) => out.extend([format!("--{}", flag.name), value.clone()]),
                None => {}
            }
        }
        out
    }
}

/// Reads the arguments, without the program's name.
///
/// # Errors
/// An [`Exit`] for help, the version and every fault.
pub fn parse(args: impl Iterator<Item = OsString>) -> Result<Options, Exit> {
    let given = normalise(args)?;
    let argh_args = given.to_argh();
    let argh_args: Vec<&str> = argh_args.iter().map(String::as_str).collect();
    let flags = Flags::from_args(&[NAME], &argh_args)
        .map_err(|exit| Exit::usage(exit.output.trim_end().replace("option '--", "flag '-")))?;
    if flags.version {
        return Err(Exit::print(format!("{NAME} {}\n", env!("CARGO_PKG_VERSION"))));
    }
    let unused = FLAGS.iter().filter(|flag| flag.unused && given.0.contains_key(flag.name));
    Ok(Options {
        config: flags.config,
        kata_agent_socket: flags.kata_agent_socket,
        pod_namespace: pod_namespace(flags.pod_namespace, flags.kata_agent_namespace)?,
        host_interface: flags.host_interface.filter(|name| !name.is_empty()),
        secure_comms: flags.secure_comms,
        inbounds: flags.secure_comms_inbounds,
        outbounds: flags.secure_comms_outbounds,
        listen: flags.secure_comms_listen,
        guest_api: flags.secure_comms_guest_api,
        state_dir: flags.secure_comms_state_dir,
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
#[path = "cli_tests.rs"]
mod tests;
