//! What the VM's user data (apf.json) may decide. The cloud writes it, and no measurement holds it.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use secure_comms_keys::text::one_line;
use secure_comms_protocol::limits::USER_DATA_TUNNELS_MAX;
use secure_comms_protocol::tag::{Bind, Host, InboundTag, OutboundTag, Tag, Target};
use secure_comms_protocol::{PhaseName, TunnelName};
use secure_comms_tunnel::netns::Namespace;

/// Longest tag in a warning, in bytes.
const TAG_SHOWN: usize = 200;
/// Refused tags that are named one by one.
const REFUSED_SHOWN: usize = 16;

/// Value of `-secure-comms-user-data`: what user data may decide beyond the pod's network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UserDataMode {
    /// Nothing.
    #[default]
    None,
    /// Tunnels of the Kubernetes phase within the VM, and who may attest.
    Tunnels,
    /// The keys, too: for pods that are not confidential.
    All,
}

impl UserDataMode {
    /// The word of the flag.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Tunnels => "tunnels",
            Self::All => "all",
        }
    }

    /// The value that lets user data decide `key` of apf.json, if this one does not.
    pub(super) fn needed_for(self, key: &str) -> Option<Self> {
        let needed = match key {
            "sc" | "sc-pp-prv" => Self::All,
            "sc-wn-pub" | "sc-inbounds" | "sc-outbounds" => Self::Tunnels,
            _ => return None,
        };
        let suffices = self == Self::All || self == needed;
        (!suffices).then_some(needed)
    }
}

impl fmt::Display for UserDataMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for UserDataMode {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        [Self::None, Self::Tunnels, Self::All].into_iter().find(|mode| mode.as_str() == text).ok_or(())
    }
}

/// A host, or one port of it, to which user data may lead an outbound.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AllowedHost {
    host: Host,
    port: Option<u16>,
}

impl AllowedHost {
    fn allows(&self, host: &Host, port: u16) -> bool {
        same_host(&self.host, host) && self.port.is_none_or(|own| own == port)
    }
}

fn same_host(one: &Host, other: &Host) -> bool {
    match (one, other) {
        (Host::Ip(one), Host::Ip(other)) => one == other,
        (Host::Name(one), Host::Name(other)) => one.eq_ignore_ascii_case(other),
        _ => false,
    }
}

/// As it is read.
impl fmt::Display for AllowedHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Ip(IpAddr::V6(ip)) => write!(f, "[{ip}]")?,
            Host::Ip(ip) => write!(f, "{ip}")?,
            Host::Name(name) => f.write_str(name)?,
        }
        self.port.map_or(Ok(()), |port| write!(f, ":{port}"))
    }
}

impl FromStr for AllowedHost {
    type Err = ();

    /// `HOST` or `HOST:PORT`, read as a tag reads them.
    fn from_str(text: &str) -> Result<Self, ()> {
        let has_port =
            text.rsplit_once(':').is_some_and(|(host, _)| !host.starts_with('[') || host.ends_with(']'));
        let target = if has_port { text.to_owned() } else { format!("{text}:1") };
        match OutboundTag::parse(&format!("KUBERNETES_PHASE:X:{target}")).map(|tag| tag.target) {
            Ok(Target::Tcp { host, port }) => Ok(Self { host, port: has_port.then_some(port) }),
            _ => Err(()),
        }
    }
}

/// The rules for tunnels of user data.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules<'a> {
    pub(super) mode: UserDataMode,
    pub(super) hosts: &'a [AllowedHost],
    /// The pod's network namespace.
    pub(super) pod_namespace: Option<&'a str>,
}

/// The part of a tag that the rules depend on.
pub(super) trait Ruled: Tag {
    /// The rule that this tag breaks, and what to do; none if it breaks none.
    fn broken(&self, rules: Rules<'_>) -> Option<String>;
}

const UNIX_PATH: &str = "user data may name no unix socket; give the tag by a flag or by init-data";

fn broken_by_any<T: Tag>(tag: &T) -> Option<String> {
    let built_in = [TunnelName::kata_agent(), TunnelName::kbs()].contains(tag.name());
    built_in.then(|| format!("user data may not move {}; give the tag by a flag", tag.name()))
}

impl Ruled for InboundTag {
    fn broken(&self, rules: Rules<'_>) -> Option<String> {
        if let Some(broken) = broken_by_any(self) {
            return Some(broken);
        }
        let namespace = match &self.bind {
            Bind::Unix(_) => return Some(UNIX_PATH.to_owned()),
            Bind::Tcp { namespace, .. } => namespace.as_deref(),
        };
        if rules.mode == UserDataMode::All {
            return None;
        }
        if self.phases.includes(PhaseName::Attestation) {
            return Some(
                "user data may add tunnels to the Kubernetes phase only; give it KUBERNETES_PHASE".into(),
            );
        }
        // By its name: a path may lead anywhere, through links that user data has a hand in.
        let is_pods = |name: &str| {
            !name.contains('/') && rules.pod_namespace.map(Namespace::new) == Some(Namespace::new(name))
        };
        match namespace {
            Some(name) if !is_pods(name) => Some(
                "user data may listen in our network namespace or, by its name, in the pod's; give the tag by a flag".into(),
            ),
            _ => None,
        }
    }
}

impl Ruled for OutboundTag {
    fn broken(&self, rules: Rules<'_>) -> Option<String> {
        if let Some(broken) = broken_by_any(self) {
            return Some(broken);
        }
        let (host, port) = match &self.target {
            Target::Unix(_) => return Some(UNIX_PATH.to_owned()),
            Target::Tcp { host, port } => (host, *port),
        };
        if self.phases.includes(PhaseName::Attestation) {
            return Some("user data may open no outbound to unproven peers; give it KUBERNETES_PHASE".into());
        }
        let is_local = match host {
            Host::Ip(ip) => *ip == std::net::Ipv4Addr::LOCALHOST || *ip == std::net::Ipv6Addr::LOCALHOST,
            Host::Name(name) => name.eq_ignore_ascii_case("localhost"),
        };
        if rules.mode == UserDataMode::All || is_local || rules.hosts.iter().any(|own| own.allows(host, port))
        {
            return None;
        }
        Some("user data may lead to 127.0.0.1, [::1] and localhost only; list the host in -secure-comms-user-data-hosts".into())
    }
}

/// The tags of user data that keep the rules. One that breaks a rule, is no tag, or has a name that `taken` has is refused with
/// a warning, and the others stay.
///
/// An error would serve the attacker and no other: the cloud can end the VM anyway, and an honest file that asks for too much
/// would cost the pod its start instead of one tunnel.
pub(super) fn admit<T: Ruled>(
    key: &str,
    list: &str,
    rules: Rules<'_>,
    taken: &[(&str, &[T])],
    warnings: &mut Vec<String>,
) -> Vec<T> {
    let mut admitted: Vec<T> = Vec::new();
    let mut refused = 0_usize;
    for text in list.split(',').map(str::trim).filter(|text| !text.is_empty()) {
        match judge(text, rules, taken, &admitted) {
            Ok(tag) => admitted.push(tag),
            Err(fault) => {
                refused += 1;
                if refused <= REFUSED_SHOWN {
                    warnings
                        .push(format!("user data: '{key}': {fault}; the agent goes on without this tunnel"));
                }
            }
        }
    }
    if let Some(more @ 1..) = refused.checked_sub(REFUSED_SHOWN) {
        warnings.push(format!("user data: '{key}': {more} more tags refused"));
    }
    admitted
}

fn judge<T: Ruled>(
    text: &str,
    rules: Rules<'_>,
    taken: &[(&str, &[T])],
    admitted: &[T],
) -> Result<T, String> {
    let named = |fault: &str| format!("tag '{}' refused: {fault}", one_line(text, TAG_SHOWN));
    let tag = T::parse(text).map_err(|error| one_line(&format!("{error}"), 2 * TAG_SHOWN))?;
    if let Some(rule) = tag.broken(rules) {
        return Err(named(&rule));
    }
    if admitted.len() >= USER_DATA_TUNNELS_MAX {
        return Err(named(&format!("user data may add {USER_DATA_TUNNELS_MAX} tunnels")));
    }
    let same = |other: &&T| same_tunnel(*other, &tag);
    let found = taken.iter().find_map(|(source, tags)| Some((*source, tags.iter().find(same)?)));
    match found.or_else(|| Some(("user data", admitted.iter().find(same)?))) {
        Some((source, other)) => {
            let other = one_line(&other.to_string(), TAG_SHOWN);
            Err(named(&format!("a name once in a phase; '{other}' of {source} has it too")))
        }
        None => Ok(tag),
    }
}

/// Whether two tags name the same tunnel in a phase.
pub(super) fn same_tunnel<T: Tag>(one: &T, other: &T) -> bool {
    one.name() == other.name() && one.phases().overlaps(other.phases())
}

#[cfg(test)]
#[path = "user_data_tests.rs"]
mod tests;
