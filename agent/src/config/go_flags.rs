//! Arguments by the rules of Go's `flag` package
//! (<https://pkg.go.dev/flag#hdr-Command_line_flag_syntax>).

use std::collections::BTreeMap;
use std::ffi::OsString;

use crate::os::environment::closest;

/// A flag in Go's sense: its name, and whether it is a boolean.
pub(super) struct Flag {
    pub(super) name: &'static str,
    pub(super) boolean: bool,
    /// Ignored over SSH.
    pub(super) unused: bool,
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

pub(super) const FLAGS: &[Flag] = &[
    boolean("version"),
    value("config"),
    unused(value("listen")),
    value("kata-agent-socket"),
    value("pod-namespace"),
    value("kata-agent-namespace"),
    boolean("create-pod-namespace"),
    boolean("create-pod-namespace-only"),
    value("pod-namespace-address"),
    value("host-interface"),
    boolean("secure-comms"),
    value("secure-comms-inbounds"),
    value("secure-comms-outbounds"),
    value("secure-comms-user-data"),
    value("secure-comms-user-data-hosts"),
    value("secure-comms-init-data"),
    value("secure-comms-init-data-digest"),
    value("secure-comms-pod-id"),
    boolean("secure-comms-separate-resources"),
    value("secure-comms-listen"),
    value("secure-comms-guest-api"),
    value("secure-comms-state-dir"),
    boolean("secure-comms-state-dir-on-disk"),
    boolean("secure-comms-require-pq"),
    value("secure-comms-mount-prefixes"),
    value("secure-comms-volumes-socket"),
    value("secure-comms-rekey-bytes"),
    unused(value("ca-cert-file")),
    unused(value("cert-file")),
    unused(value("cert-key")),
    unused(boolean("tls-skip-verify")),
    unused(boolean("disable-tls")),
];

/// Why there are no flags.
#[derive(Debug)]
pub(super) enum Stop {
    /// Help was asked for.
    Help,
    /// Name and version were asked for.
    Version,
    /// A usage error, with what to do about it.
    Usage(String),
}

/// The flags that were given, each with its last value.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Given(pub(super) BTreeMap<&'static str, String>);

/// Reads `args` as Go's `flag.Parse` does, with two differences. An argument that is not a flag is an error instead of the
/// end of the flags. Empty arguments are skipped, because a unit's `${OPTIONS}` may expand to one.
pub(super) fn normalise(args: impl Iterator<Item = OsString>) -> Result<Given, Stop> {
    let mut given = Given::default();
    let mut args = args.map(|arg| {
        arg.into_string().map_err(|arg| {
            Stop::Usage(format!("argument '{}': not UTF-8; write it in UTF-8", arg.to_string_lossy()))
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
                "h" | "help" => Stop::Help,
                "V" => Stop::Version,
                _ => Stop::Usage(format!("flag '{arg}': no such flag; {}", advice(name))),
            });
        };
        let value = match (inline, flag.boolean) {
            (Some(value), true) => parse_bool(&arg, value)?.to_string(),
            (None, true) => true.to_string(),
            (Some(value), false) => value.to_owned(),
            (None, false) => args.next().transpose()?.ok_or_else(|| {
                Stop::Usage(format!("flag -{name}: needs a value: -{name} VALUE or -{name}=VALUE"))
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

fn split(arg: &str) -> Result<(&str, Option<&str>), Stop> {
    let body = arg.strip_prefix("--").or_else(|| arg.strip_prefix('-')).unwrap_or_default();
    if !arg.starts_with('-') || arg == "-" {
        return Err(not_a_flag(arg));
    }
    if body.is_empty() || body.starts_with(['-', '=']) {
        return Err(Stop::Usage(format!("argument '{arg}': bad flag syntax; expected -flag or --flag")));
    }
    Ok(match body.split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (body, None),
    })
}

fn advice(name: &str) -> String {
    match closest(name, FLAGS.iter().map(|flag| flag.name)) {
        Some(flag) => format!("did you mean -{flag}?"),
        None => "correct or remove it".to_owned(),
    }
}

/// What to do about an argument that is not a flag. Two are commands of many programs.
fn not_a_flag(arg: &str) -> Stop {
    let name = arg.split_once('=').map_or(arg, |(name, _)| name);
    match arg {
        "help" => Stop::Help,
        "version" => Stop::Version,
        _ if FLAGS.iter().any(|flag| flag.name == name) => {
            Stop::Usage(format!("argument '{arg}': not a flag; did you mean -{arg}?"))
        }
        _ => Stop::Usage(format!(
            "argument '{arg}': not a flag; remove it, or write -flag={arg} if it is the value of a boolean flag"
        )),
    }
}

/// Parses the texts that Go's `strconv.ParseBool` accepts.
fn parse_bool(arg: &str, text: &str) -> Result<bool, Stop> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err(Stop::Usage(format!("flag '{arg}': expected true or false after the '='"))),
    }
}

impl Given {
    /// The flags as argh takes them: `--flag value`, and `--flag` for a boolean that is true.
    pub(super) fn to_long_options(&self) -> Vec<String> {
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
