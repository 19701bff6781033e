//! Tags: the syntax in which operators configure tunnels.
//!
//! ```text
//! Inbound  = Phase:Name:Port | Phase:Name:Namespace:Port | Phase:Name:/unix/path
//! Outbound = Phase:Name:Port | Phase:Name:Host:Port | Phase:Name:[v6]:Port | Phase:Name:/unix/path
//! ```
//! Several are separated by commas; blanks around a tag and empty tags are skipped. Phases are read in any case. A part
//! that starts with `/` is a unix path, unless a port follows it: then it is the path of a network namespace. A
//! namespace whose name could be a host (an address, `localhost`, a name with a dot) must be given by its path.

use alloc::borrow::ToOwned;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::{PhaseName, TunnelName};

/// Longest unix socket path of Linux, in bytes (`sun_path` without its NUL).
pub const UNIX_PATH_MAX: usize = 107;

/// Phases in which a tunnel exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PhaseSet {
    /// `ATTESTATION_PHASE`
    Attestation,
    /// `KUBERNETES_PHASE`
    Kubernetes,
    /// `BOTH_PHASES`
    Both,
}

impl PhaseSet {
    /// Whether a tunnel of this set exists in `phase`.
    pub fn includes(self, phase: PhaseName) -> bool {
        match self {
            Self::Both => true,
            Self::Attestation => phase == PhaseName::Attestation,
            Self::Kubernetes => phase == PhaseName::Kubernetes,
        }
    }

    /// Whether there is a phase in which tunnels of both sets exist.
    pub fn overlaps(self, other: Self) -> bool {
        [PhaseName::Attestation, PhaseName::Kubernetes]
            .into_iter()
            .any(|phase| self.includes(phase) && other.includes(phase))
    }

    fn parse(text: &str) -> Option<Self> {
        [Self::Attestation, Self::Kubernetes, Self::Both]
            .into_iter()
            .find(|phases| text.eq_ignore_ascii_case(phases.as_str()))
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::Attestation => "ATTESTATION_PHASE",
            Self::Kubernetes => "KUBERNETES_PHASE",
            Self::Both => "BOTH_PHASES",
        }
    }
}

impl fmt::Display for PhaseSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Address on which an inbound listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Bind {
    /// 127.0.0.1 in a network namespace (a name under /run/netns, or a path), or in our own.
    Tcp {
        /// Network namespace; none for our own.
        namespace: Option<String>,
        /// Port; 0 means any free port.
        port: u16,
    },
    /// Path of a unix socket.
    Unix(String),
}

impl fmt::Display for Bind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { namespace: None, port } => write!(f, "{port}"),
            Self::Tcp { namespace: Some(namespace), port } => write!(f, "{namespace}:{port}"),
            Self::Unix(path) => f.write_str(path),
        }
    }
}

/// Host of an outbound's server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Host {
    /// IP address.
    Ip(IpAddr),
    /// Host name, looked up at every connect.
    Name(String),
}

/// Server to which an outbound connects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A TCP server.
    Tcp {
        /// Host of the server.
        host: Host,
        /// Port of the server, never 0.
        port: u16,
    },
    /// Path of a unix socket.
    Unix(String),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host: Host::Ip(IpAddr::V6(ip)), port } => write!(f, "[{ip}]:{port}"),
            Self::Tcp { host: Host::Ip(ip), port } => write!(f, "{ip}:{port}"),
            Self::Tcp { host: Host::Name(name), port } => write!(f, "{name}:{port}"),
            Self::Unix(path) => f.write_str(path),
        }
    }
}

/// One inbound: its phases, its name, and where it listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InboundTag {
    /// Phases in which the tunnel exists.
    pub phases: PhaseSet,
    /// Name of the tunnel.
    pub name: TunnelName,
    /// Address on which it listens.
    pub bind: Bind,
}

/// One outbound: its phases, its name, and the server it connects to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutboundTag {
    /// Phases in which the tunnel exists.
    pub phases: PhaseSet,
    /// Name of the tunnel.
    pub name: TunnelName,
    /// Server to which it connects.
    pub target: Target,
}

impl fmt::Display for InboundTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.phases, self.name, self.bind)
    }
}

impl fmt::Display for OutboundTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.phases, self.name, self.target)
    }
}

/// Fault of one tag.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TagError {
    tag: String,
    part: &'static str,
    fault: String,
}

impl fmt::Display for TagError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "tag '{}': {}: {}", self.tag.escape_default(), self.part, self.fault)
    }
}

/// All faults of a list of tags; never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TagErrors(Vec<TagError>);

impl TagErrors {
    /// Faults, in the order of the tags.
    pub fn iter(&self) -> impl Iterator<Item = &TagError> {
        self.0.iter()
    }
}

impl fmt::Display for TagErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, error) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str("; ")?;
            }
            write!(f, "{error}")?;
        }
        Ok(())
    }
}

impl core::error::Error for TagErrors {}

/// Common part of inbound and outbound tags: a name, phases, and a syntax for the rest.
pub trait Tag: Sized + fmt::Display {
    /// Phases in which the tunnel exists.
    fn phases(&self) -> PhaseSet;
    /// Name of the tunnel.
    fn name(&self) -> &TunnelName;
    /// This tunnel in other phases.
    fn in_phases(self, phases: PhaseSet) -> Self;
    /// Reads one tag.
    ///
    /// # Errors
    /// The first fault of the tag.
    fn parse(text: &str) -> Result<Self, TagError>;
}

impl Tag for InboundTag {
    fn phases(&self) -> PhaseSet {
        self.phases
    }

    fn name(&self) -> &TunnelName {
        &self.name
    }

    fn in_phases(self, phases: PhaseSet) -> Self {
        Self { phases, ..self }
    }

    fn parse(text: &str) -> Result<Self, TagError> {
        let (phases, name, rest) =
            split(text, "Phase:Name:Port, Phase:Name:Namespace:Port or Phase:Name:/unix/path")?;
        let error = |part, expected: &str| TagError::new(text, part, expected);
        let bind = match rest.rsplit_once(':') {
            Some((namespace, number)) if is_number(number) => {
                if is_host(namespace) {
                    return Err(TagError::host_of_an_inbound(text, namespace));
                }
                if !is_namespace(namespace) {
                    return Err(error("namespace", "a name under /run/netns or an absolute path"));
                }
                Bind::Tcp { namespace: Some(namespace.to_owned()), port: port(text, number, 0)? }
            }
            _ if rest.starts_with('/') => Bind::Unix(unix_path(text, rest)?),
            Some((_, number)) => return Err(TagError::port(text, number, 0)),
            None => Bind::Tcp { namespace: None, port: port(text, rest, 0)? },
        };
        Ok(Self { phases, name, bind })
    }
}

impl Tag for OutboundTag {
    fn phases(&self) -> PhaseSet {
        self.phases
    }

    fn name(&self) -> &TunnelName {
        &self.name
    }

    fn in_phases(self, phases: PhaseSet) -> Self {
        Self { phases, ..self }
    }

    fn parse(text: &str) -> Result<Self, TagError> {
        let (phases, name, rest) =
            split(text, "Phase:Name:Port, Phase:Name:Host:Port or Phase:Name:/unix/path")?;
        let target = if rest.starts_with('/') {
            Target::Unix(unix_path(text, rest)?)
        } else {
            match rest.rsplit_once(':') {
                None => {
                    Target::Tcp { host: Host::Ip(Ipv4Addr::LOCALHOST.into()), port: port(text, rest, 1)? }
                }
                Some((host, number)) => {
                    Target::Tcp { host: parse_host(text, host)?, port: port(text, number, 1)? }
                }
            }
        };
        Ok(Self { phases, name, target })
    }
}

impl TagError {
    fn new(tag: &str, part: &'static str, expected: &str) -> Self {
        Self { tag: tag.to_owned(), part, fault: format!("expected {expected}") }
    }

    fn port(tag: &str, found: &str, min: u16) -> Self {
        Self::new(tag, "port", &format!("a number from {min} to 65535, found '{}'", found.escape_default()))
    }

    fn host_of_an_inbound(tag: &str, host: &str) -> Self {
        let host = host.escape_default();
        let fault = format!(
            "an inbound has no host, it listens on 127.0.0.1; {host} would be a network namespace (if there is one \
             of this name, give its path: /run/netns/{host})"
        );
        Self { tag: tag.to_owned(), part: "host", fault }
    }
}

fn split<'a>(text: &'a str, grammar: &str) -> Result<(PhaseSet, TunnelName, &'a str), TagError> {
    // Otherwise the rest of the list is taken for a part of this tag, and of a path that is no fault.
    let starts_tag =
        |text: &str| text.split_once(':').is_some_and(|(phase, _)| PhaseSet::parse(phase).is_some());
    if text.trim_start().split([';', ' ', '\t', '\n']).skip(1).any(starts_tag) {
        return Err(TagError::new(text, "separator", "',' between tags"));
    }
    let mut parts = text.splitn(3, ':');
    let phase = parts.next().unwrap_or_default();
    let phases = PhaseSet::parse(phase)
        .ok_or_else(|| TagError::new(text, "phase", "ATTESTATION_PHASE, KUBERNETES_PHASE or BOTH_PHASES"))?;
    let (Some(name), Some(rest)) = (parts.next(), parts.next()) else {
        return Err(TagError::new(text, "parts", grammar));
    };
    let name = name
        .parse()
        .map_err(|_| TagError::new(text, "name", "1 to 64 characters out of A-Z a-z 0-9 . _ -"))?;
    Ok((phases, name, rest))
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|c| c.is_ascii_digit())
}

/// Whether the text is more likely a host than the name of a network namespace.
fn is_host(text: &str) -> bool {
    let address = text.strip_prefix('[').map_or(text, |inner| inner.trim_end_matches(']'));
    let is_address = address.parse::<IpAddr>().is_ok() || text.starts_with('[') || text == "*";
    is_address
        || text.eq_ignore_ascii_case("localhost")
        // No host name starts with a dot: "." and ".." get the advice on names.
        || (text.contains('.') && !text.starts_with('.') && !text.contains('/'))
}

/// A name must not lead out of /run/netns, and neither a name nor a path may forge a log line.
fn is_namespace(text: &str) -> bool {
    let name_ok = !matches!(text, "" | "." | "..") && !text.contains(['/', ':']);
    (text.starts_with('/') || name_ok) && !text.chars().any(char::is_control)
}

fn port(tag: &str, text: &str, min: u16) -> Result<u16, TagError> {
    let error = || TagError::port(tag, text, min);
    if !is_number(text) {
        return Err(error());
    }
    text.parse().ok().filter(|&port| port >= min).ok_or_else(error)
}

fn unix_path(tag: &str, path: &str) -> Result<String, TagError> {
    if path.len() > UNIX_PATH_MAX || path.chars().any(char::is_control) || path.ends_with('/') {
        let expected =
            format!("the path of a socket, at most {UNIX_PATH_MAX} bytes, without control characters");
        return Err(TagError::new(tag, "unix path", &expected));
    }
    Ok(path.to_owned())
}

fn parse_host(tag: &str, text: &str) -> Result<Host, TagError> {
    let error = || TagError::new(tag, "host", "a host name, an IPv4 address or an IPv6 address in brackets");
    if let Some(inner) = text.strip_prefix('[') {
        let ip: Ipv6Addr = inner.strip_suffix(']').and_then(|ip| ip.parse().ok()).ok_or_else(error)?;
        return Ok(Host::Ip(ip.into()));
    }
    if let Ok(ip) = text.parse::<Ipv4Addr>() {
        return Ok(Host::Ip(ip.into()));
    }
    // RFC 1123 2.1 host names, and underscores, which cluster DNS uses.
    let label_ok = |label: &str| {
        (1..=63).contains(&label.len())
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|c| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_'))
    };
    let name = text.strip_suffix('.').unwrap_or(text);
    // Only digits and dots: a mistyped address, not a name.
    let numeric = name.bytes().all(|c| c.is_ascii_digit() || c == b'.');
    if name.len() <= 253 && !numeric && name.split('.').all(label_ok) {
        Ok(Host::Name(text.to_owned()))
    } else {
        Err(error())
    }
}

/// Reads a comma-separated list. A name that occurs twice in a phase is a fault.
///
/// # Errors
/// All faults of the list together.
pub fn parse_list<T: Tag>(list: &str) -> Result<Vec<T>, TagErrors> {
    parse_lists([list])
}

/// Reads several lists, for example of a flag and of a file, as one.
///
/// # Errors
/// All faults of all lists together.
pub fn parse_lists<'a, T: Tag>(lists: impl IntoIterator<Item = &'a str>) -> Result<Vec<T>, TagErrors> {
    let mut tags: Vec<T> = Vec::new();
    let mut errors = Vec::new();
    for text in
        lists.into_iter().flat_map(|list| list.split(',')).map(str::trim).filter(|tag| !tag.is_empty())
    {
        match T::parse(text) {
            Err(error) => errors.push(error),
            Ok(tag) => {
                let duplicate =
                    tags.iter().find(|t| t.name() == tag.name() && t.phases().overlaps(tag.phases()));
                match duplicate {
                    Some(duplicate) => {
                        let expected = format!(
                            "a name once in a phase; '{}' has it too",
                            duplicate.to_string().escape_default()
                        );
                        errors.push(TagError::new(text, "name", &expected));
                    }
                    None => tags.push(tag),
                }
            }
        }
    }
    if errors.is_empty() { Ok(tags) } else { Err(TagErrors(errors)) }
}

/// Adds a built-in tunnel in the phases in which the operator's tags do not name it. The operator's tag replaces it in
/// the others.
pub fn with_built_in<T: Tag>(mut tags: Vec<T>, built_in: T) -> Vec<T> {
    let is_free = |phase: PhaseName| {
        built_in.phases().includes(phase)
            && !tags.iter().any(|tag| tag.name() == built_in.name() && tag.phases().includes(phase))
    };
    let phases = match (is_free(PhaseName::Attestation), is_free(PhaseName::Kubernetes)) {
        (true, true) => PhaseSet::Both,
        (true, false) => PhaseSet::Attestation,
        (false, true) => PhaseSet::Kubernetes,
        (false, false) => return tags,
    };
    tags.push(built_in.in_phases(phases));
    tags
}
