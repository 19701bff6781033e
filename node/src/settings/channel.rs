//! Reads the settings of the pods' channels: tunnels, keys, the KBS, and what binds a VM. They are the same for one pod
//! and for all pods of a node.

use std::path::PathBuf;
use std::time::Duration;

use secure_comms_adaptor::address::host_port;
use secure_comms_adaptor::kbs::{AdminSettings, KbsSettings};
use secure_comms_adaptor::key_source::KeySource;
use secure_comms_adaptor::pod::AgentTunnels;
use secure_comms_protocol::limits::REKEY_BYTES;
use secure_comms_protocol::tag::{Host, Tag, UNIX_PATH_MAX, with_built_in};
use secure_comms_protocol::{Bind, InboundTag, OutboundTag, PhaseSet, Target, TunnelName};
use url::Url;

use super::reader::SettingsReader;
use super::units;
use crate::cli::setting::{
    ALLOW_OLD_AGENTS, INBOUNDS, INIT_DATA, INIT_DATA_DIGEST, INIT_DATA_RULES, KATA_AGENT_SOCKET, KBS,
    KBS_ADMIN_ISSUER, KBS_ADMIN_KEY, KBS_ADMIN_ROLE, KBS_CA, KBS_FILTER, KBS_URL, NO_TRUSTEE, OUTBOUNDS,
    PP_INBOUNDS, PP_OUTBOUNDS, REKEY_BYTES as REKEY, REQUIRE_PQ, RUN_DIR, Setting, WORKER_NODE_KEYS,
};

const DEADLINE_MIN: Duration = Duration::from_secs(1);
/// Keeps sums of durations in range.
const DEADLINE_MAX: Duration = Duration::from_secs(86_400);
const REKEY_BYTES_MIN: usize = 1 << 20;

/// Settings of channels.
pub(super) struct Channel {
    pub(super) inbounds: Vec<InboundTag>,
    pub(super) outbounds: Vec<OutboundTag>,
    pub(super) agent: AgentTunnels,
    pub(super) kbs_filter: bool,
    pub(super) key_source: KeySource<KbsSettings>,
    pub(super) deadline: Duration,
    pub(super) rekey_bytes: usize,
    pub(super) require_pq: bool,
    pub(super) old_agents: bool,
}

impl Channel {
    /// Reads them; `None` after a fault. `deadline` is the one of the command.
    pub(super) fn read(reader: &mut SettingsReader<'_>, deadline: &Setting) -> Option<Self> {
        let inbounds = reader.tags(&INBOUNDS);
        let outbounds = reader.tags(&OUTBOUNDS);
        let agent = agent_tunnels(reader);
        let kata_agent = kata_agent_inbound(reader);
        let kbs_filter = reader.switch(&KBS_FILTER);
        let deadline = duration(reader, deadline, DEADLINE_MIN);
        let rekey_bytes = rekey_bytes(reader);
        let require_pq = reader.switch(&REQUIRE_PQ);
        let (key_source, built_in) = if reader.switch(&NO_TRUSTEE) {
            refuse_kbs_settings(reader);
            (Some(KeySource::UserData), None)
        } else {
            kbs(reader, kbs_filter)
        };
        let has_kbs = matches!(key_source, Some(KeySource::Kbs(_)));
        let old_agents = has_kbs && reader.switch(&ALLOW_OLD_AGENTS);
        let outbounds = match built_in {
            Some(tag) => with_built_in(outbounds, tag),
            None => outbounds,
        };
        let inbounds = with_built_in(inbounds, kata_agent?);
        let (key_source, deadline, rekey_bytes) = (key_source?, deadline?, rekey_bytes?);
        Some(Self {
            inbounds,
            outbounds,
            agent,
            kbs_filter,
            key_source,
            deadline,
            rekey_bytes,
            require_pq,
            old_agents,
        })
    }
}

/// A unix socket that only our user can reach: who connects to it drives the pod.
fn kata_agent_inbound(reader: &mut SettingsReader<'_>) -> Option<InboundTag> {
    let (name, dir) = reader.text(&RUN_DIR)?;
    let tag = format!("KUBERNETES_PHASE:KATAAGENT:{}/pods/{{pod}}/agent.ttrpc", dir.trim_end_matches('/'));
    let parsed = InboundTag::parse(&tag).ok();
    let parsed = parsed.filter(|tag| dir.starts_with('/') && matches!(tag.bind, Bind::Unix(_)));
    if parsed.is_none() {
        let room = UNIX_PATH_MAX - "/pods/{pod}/agent.ttrpc".len();
        reader.fault(&name, &dir, format!("expected an absolute path of at most {room} bytes"));
    }
    parsed
}

/// What the VM's agent may have, beyond the built-in tunnels.
fn agent_tunnels(reader: &mut SettingsReader<'_>) -> AgentTunnels {
    let inbounds = reader.tags(&PP_INBOUNDS);
    let outbounds = reader.tags(&PP_OUTBOUNDS);
    let (name, kata_agent_sockets) = reader.list(&KATA_AGENT_SOCKET);
    for path in kata_agent_sockets.iter().filter(|path| !path.starts_with('/')) {
        reader.fault(&name, path, "expected an absolute path");
    }
    AgentTunnels { inbounds, outbounds, kata_agent_sockets }
}

fn kbs_outbound((host, port): (Host, u16)) -> OutboundTag {
    OutboundTag { phases: PhaseSet::Both, name: TunnelName::kbs(), target: Target::Tcp { host, port } }
}

/// A time from `min` to a day.
pub(super) fn duration(
    reader: &mut SettingsReader<'_>,
    setting: &Setting,
    min: Duration,
) -> Option<Duration> {
    let (name, text) = reader.text(setting)?;
    let found = units::duration(&text).filter(|time| (min..=DEADLINE_MAX).contains(time));
    if found.is_none() {
        let min = min.as_secs();
        let expected = format!("expected a time from {min}s to 24h, such as 90s, 5m or 1h30m");
        reader.fault(&name, &text, expected);
    }
    found
}

fn rekey_bytes(reader: &mut SettingsReader<'_>) -> Option<usize> {
    let (name, text) = reader.text(&REKEY)?;
    let found = units::bytes(&text).filter(|bytes| (REKEY_BYTES_MIN..=REKEY_BYTES).contains(bytes));
    if found.is_none() {
        let max = REKEY_BYTES >> 30;
        let expected = format!("expected a size from 1MiB to {max}GiB, such as 64MiB, 1GiB or bytes");
        reader.fault(&name, &text, expected);
    }
    found
}

/// Settings of a KBS contradict `--no-trustee`. Variables do not: a config map sets them for all pods.
fn refuse_kbs_settings(reader: &mut SettingsReader<'_>) {
    let all: [&Setting; 11] = [
        &KBS,
        &KBS_URL,
        &KBS_CA,
        &KBS_ADMIN_KEY,
        &KBS_ADMIN_ISSUER,
        &KBS_ADMIN_ROLE,
        &INIT_DATA,
        &INIT_DATA_DIGEST,
        &INIT_DATA_RULES,
        &WORKER_NODE_KEYS,
        &ALLOW_OLD_AGENTS,
    ];
    for setting in all {
        if let Some(given) = reader.given_on_purpose(setting) {
            reader.contradicts_no_trustee(&given.name);
        }
    }
}

fn kbs(
    reader: &mut SettingsReader<'_>,
    filters: bool,
) -> (Option<KeySource<KbsSettings>>, Option<OutboundTag>) {
    let (name, address) = reader.text(&KBS).unwrap_or_default();
    let target = host_port(&address);
    if target.is_none() {
        reader.fault(
            &name,
            &address,
            "expected HOST:PORT or [IPv6]:PORT, without a scheme (for publishing there is --kbs-url)",
        );
    }
    let built_in = target.map(kbs_outbound);
    let url = match (reader.text(&KBS_URL), &built_in) {
        (Some((name, text)), _) => url(reader, &name, &text),
        (None, Some(tag)) => Url::parse(&format!("http://{}", tag.target)).ok(),
        (None, None) => None,
    };
    let ca = reader.given(&KBS_CA);
    if let Some(ca) = &ca
        && url.as_ref().is_some_and(|url| url.scheme() != "https")
    {
        reader.faults.push(format!("{}: needs HTTPS: give an https URL with --kbs-url", ca.name));
    }
    let admin = admin(reader);
    if let Some(url) = &url {
        warn_of_token(reader, url, admin.is_some());
        // Over TLS the filter sees no requests.
        if !filters || url.scheme() != "http" {
            warn_of_one_place(reader, url, built_in.as_ref());
        }
    }
    let ca = ca.and_then(|ca| ca.values.into_iter().next()).map(PathBuf::from);
    let key_source = url.map(|url| KeySource::Kbs(KbsSettings { url, ca, admin }));
    (key_source, built_in)
}

/// Warns of an admin token that others can read.
fn warn_of_token(reader: &mut SettingsReader<'_>, url: &Url, has_admin: bool) {
    if has_admin && url.scheme() == "http" {
        reader.warnings.push(format!(
            "--kbs-admin-key over {url}: anyone who reads the cluster's network can take the admin token and is the KBS's \
             admin for two minutes; the pods' keys pass it in the clear; give an https URL with --kbs-url"
        ));
    }
}

/// Warns of a tunnel that leads to the KBS's admin API.
fn warn_of_one_place(reader: &mut SettingsReader<'_>, url: &Url, built_in: Option<&OutboundTag>) {
    // As the URL without a flag is made: so that the same place is written the same.
    let tunnels = built_in.and_then(|tag| Url::parse(&format!("http://{}", tag.target)).ok());
    let place = |url: &Url| Some((url.host_str()?.to_owned(), url.port_or_known_default()?));
    if tunnels.as_ref().and_then(place).is_some_and(|tunnels| place(url) == Some(tunnels)) {
        reader.warnings.push(format!(
            "--kbs and --kbs-url are the same place, {url}: the tunnel KBS leads anyone who answers at a VM's address to the port \
             of the KBS's admin API; let --kbs lead to a listener that serves attestation only, and give the place of the \
             admin API with --kbs-url"
        ));
    }
}

fn url(reader: &mut SettingsReader<'_>, name: &str, text: &str) -> Option<Url> {
    let plain = |url: &Url| {
        matches!(url.scheme(), "http" | "https")
            && url.has_host()
            && url.username().is_empty()
            && url.password().is_none()
            && url.query().is_none()
            && url.fragment().is_none()
    };
    let url = Url::parse(text).ok().filter(plain);
    if url.is_none() {
        // The text is not quoted: it may hold a password.
        let expected = "expected http://HOST[:PORT] or https://HOST[:PORT], without user, query or fragment";
        reader.faults.push(format!("{name}: {expected}"));
    }
    url
}

fn admin(reader: &mut SettingsReader<'_>) -> Option<AdminSettings> {
    let Some(key_file) = reader.path(&KBS_ADMIN_KEY) else {
        for setting in [&KBS_ADMIN_ISSUER, &KBS_ADMIN_ROLE] {
            if let Some(given) = reader.given_on_purpose(setting) {
                reader.faults.push(format!("{}: needs --kbs-admin-key", given.name));
            }
        }
        return None;
    };
    let (_, issuer) = reader.text(&KBS_ADMIN_ISSUER)?;
    let (_, role) = reader.text(&KBS_ADMIN_ROLE)?;
    Some(AdminSettings { key_file, issuer, role })
}
