//! Reads the settings of `connect`.

use std::net::Ipv6Addr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use secure_comms_adaptor::address::{Address, host_port};
use secure_comms_adaptor::kbs::{AdminSettings, KbsSettings};
use secure_comms_adaptor::key_source::KeySource;
use secure_comms_adaptor::pod::AgentTunnels;
use secure_comms_protocol::limits::{REKEY_BYTES, SSH_PORT};
use secure_comms_protocol::tag::{Host, Tag, UNIX_PATH_MAX, with_built_in};
use secure_comms_protocol::{Bind, InboundTag, OutboundTag, PhaseSet, Target, TunnelName};
use url::Url;

use super::{
    ConnectSettings, DEFAULT_KBS, DEFAULT_RUN_DIR, Env, SettingsReader, UsageError, init_data,
    store_or_default, units,
};
use crate::cli::ConnectArgs;

const DEADLINE: Duration = Duration::from_secs(300);
const DEADLINE_MIN: Duration = Duration::from_secs(1);
/// Keeps sums of durations in range.
const DEADLINE_MAX: Duration = Duration::from_secs(86_400);
const REKEY_BYTES_MIN: usize = 1 << 20;
const ISSUER: &str = "secure-comms-adaptor";
const ROLE: &str = "admin";

impl ConnectSettings {
    /// Reads the flags and the environment.
    ///
    /// # Errors
    /// The faults of the flags and variables.
    pub fn read(mut args: ConnectArgs, env: Env<'_>) -> Result<Self, UsageError> {
        let mut reader = SettingsReader::new(env);
        reader.refuse_if_off();
        let pod = reader.pod(args.pod_id.as_deref());
        let addresses = addresses(&mut reader, &args.addresses);
        let inbounds =
            reader.tags(("--inbounds", std::mem::take(&mut args.inbounds)), "SECURE_COMMS_INBOUNDS");
        let outbounds =
            reader.tags(("--outbounds", std::mem::take(&mut args.outbounds)), "SECURE_COMMS_OUTBOUNDS");
        let agent = agent_tunnels(&mut reader, &mut args);
        let kata_agent = kata_agent_inbound(&mut reader, args.run_dir.take());
        let kbs_filter: Option<Switch> =
            reader.value_or_default(("--kbs-filter", args.kbs_filter.take()), "SECURE_COMMS_KBS_FILTER");
        let deadline = deadline(&mut reader, args.deadline.as_deref());
        let rekey_bytes = rekey_bytes(&mut reader, args.rekey_bytes.as_deref());
        let require_pq = reader.boolean("SECURE_COMMS_REQUIRE_PQ").unwrap_or(false) || args.require_pq;
        let events: Option<Events> =
            reader.value_or_default(("--events", args.events.take()), "SECURE_COMMS_EVENTS");
        let no_trustee = reader.boolean("SECURE_COMMS_NO_TRUSTEE").unwrap_or(false) || args.no_trustee;
        let (key_source, built_in) = if no_trustee {
            refuse_kbs_flags(&mut reader, &args);
            (Some(KeySource::UserData), None)
        } else {
            kbs(&mut reader, &args, kbs_filter != Some(Switch::Off))
        };
        let (init_data, worker_nodes, old_agents) = if no_trustee {
            Default::default()
        } else {
            let old_agents = reader.boolean("SECURE_COMMS_ALLOW_OLD_AGENTS").unwrap_or(false);
            let init_data = init_data::expected(&mut reader, &args);
            (init_data, init_data::worker_nodes(&mut reader, &args), old_agents || args.allow_old_agents)
        };
        let outbounds = match built_in {
            Some(tag) => with_built_in(outbounds, tag),
            None => outbounds,
        };
        let warnings = std::mem::take(&mut reader.warnings);
        let settings = pod.zip(key_source).zip(kata_agent).map(|((pod, key_source), kata_agent)| Self {
            pod,
            addresses,
            inbounds: with_built_in(inbounds, kata_agent),
            outbounds,
            agent,
            kbs_filter: kbs_filter != Some(Switch::Off),
            store: store_or_default(args.store),
            key_source,
            init_data,
            worker_nodes,
            old_agents,
            deadline,
            rekey_bytes,
            require_pq,
            delete_on_exit: args.delete_on_exit,
            events: events == Some(Events::Json),
            warnings,
        });
        reader.done(settings)
    }
}

/// The value of `--events`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Events {
    #[default]
    None,
    Json,
}

impl FromStr for Events {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.to_ascii_lowercase().as_str() {
            "none" => Ok(Self::None),
            "json" => Ok(Self::Json),
            _ => Err("expected json or none"),
        }
    }
}

/// The value of `--kbs-filter`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Switch {
    #[default]
    On,
    Off,
}

impl FromStr for Switch {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.to_ascii_lowercase().as_str() {
            "on" => Ok(Self::On),
            "off" => Ok(Self::Off),
            _ => Err("expected on or off"),
        }
    }
}

/// A unix socket that only our user can reach: who connects to it drives the pod.
fn kata_agent_inbound(reader: &mut SettingsReader<'_>, run_dir: Option<PathBuf>) -> Option<InboundTag> {
    let given = run_dir.map(|dir| ("--run-dir", dir.into_os_string().into_string()));
    let given =
        given.or_else(|| Some(("SECURE_COMMS_RUN_DIR", Ok(reader.variable("SECURE_COMMS_RUN_DIR")?))));
    let (name, dir) = match given {
        Some((name, Ok(dir))) => (name, dir),
        Some((name, Err(dir))) => {
            reader.fault(name, &dir.to_string_lossy(), "expected UTF-8");
            return None;
        }
        None => ("--run-dir", DEFAULT_RUN_DIR.to_owned()),
    };
    let tag = format!("KUBERNETES_PHASE:KATAAGENT:{}/pods/{{pod}}/agent.ttrpc", dir.trim_end_matches('/'));
    let parsed = InboundTag::parse(&tag).ok();
    let parsed = parsed.filter(|tag| dir.starts_with('/') && matches!(tag.bind, Bind::Unix(_)));
    if parsed.is_none() {
        let room = UNIX_PATH_MAX - "/pods/{pod}/agent.ttrpc".len();
        reader.fault(name, &dir, format!("expected an absolute path of at most {room} bytes"));
    }
    parsed
}

/// What the VM's agent may have, beyond the built-in tunnels.
fn agent_tunnels(reader: &mut SettingsReader<'_>, args: &mut ConnectArgs) -> AgentTunnels {
    let defaults = AgentTunnels::default();
    let inbounds =
        reader.tags(("--pp-inbounds", std::mem::take(&mut args.pp_inbounds)), "SECURE_COMMS_PP_INBOUNDS");
    let outbounds =
        reader.tags(("--pp-outbounds", std::mem::take(&mut args.pp_outbounds)), "SECURE_COMMS_PP_OUTBOUNDS");
    let given = std::mem::take(&mut args.kata_agent_sockets);
    for path in given.iter().filter(|path| !path.starts_with('/')) {
        reader.fault("--kata-agent-socket", path, "expected an absolute path");
    }
    let kata_agent_sockets = if given.is_empty() { defaults.kata_agent_sockets } else { given };
    AgentTunnels { inbounds, outbounds, kata_agent_sockets }
}

fn kbs_outbound((host, port): (Host, u16)) -> OutboundTag {
    OutboundTag { phases: PhaseSet::Both, name: TunnelName::kbs(), target: Target::Tcp { host, port } }
}

fn addresses(reader: &mut SettingsReader<'_>, texts: &[String]) -> Vec<Address> {
    if texts.is_empty() {
        reader.missing("--address", "give the pod VM's address, HOST or HOST:PORT");
    }
    let mut addresses: Vec<Address> = Vec::new();
    for text in texts {
        let address = reader.parsed("--address", text);
        reader.warnings.extend(brackets_forgotten(text));
        // An address that is given twice would be raced against itself.
        addresses.extend(address.filter(|address| !addresses.contains(address)));
    }
    addresses
}

/// `::1:2222` is an IPv6 address whose last group is 2222. With brackets, `[::1]:2222`, it is an address and a port.
fn brackets_forgotten(text: &str) -> Option<String> {
    let whole: Ipv6Addr = text.parse().ok()?;
    let (host, port) = text.rsplit_once(':')?;
    let (host, port): (Ipv6Addr, u16) = (host.parse().ok()?, port.parse().ok()?);
    // Groups of one or two digits are common in addresses, and not in ports.
    (port >= 100).then(|| {
        format!(
            "--address '{text}': taken as the address {whole}, port {SSH_PORT}; for port {port} of {host} write \
             [{host}]:{port}"
        )
    })
}

fn deadline(reader: &mut SettingsReader<'_>, text: Option<&str>) -> Duration {
    let Some(text) = text else { return DEADLINE };
    let found = units::duration(text).filter(|time| (DEADLINE_MIN..=DEADLINE_MAX).contains(time));
    if found.is_none() {
        reader.fault("--deadline", text, "expected a time from 1s to 24h, such as 90s, 5m or 1h30m");
    }
    found.unwrap_or(DEADLINE)
}

fn rekey_bytes(reader: &mut SettingsReader<'_>, text: Option<&str>) -> usize {
    let Some(text) = text else { return REKEY_BYTES };
    let found = units::bytes(text).filter(|bytes| (REKEY_BYTES_MIN..=REKEY_BYTES).contains(bytes));
    if found.is_none() {
        let max = REKEY_BYTES >> 30;
        let expected = format!("expected a size from 1MiB to {max}GiB, such as 64MiB, 1GiB or bytes");
        reader.fault("--rekey-bytes", text, expected);
    }
    found.unwrap_or(REKEY_BYTES)
}

/// Flags of a KBS contradict `--no-trustee`. Variables do not: a config map sets them for all pods.
fn refuse_kbs_flags(reader: &mut SettingsReader<'_>, args: &ConnectArgs) {
    let flags = [
        ("--kbs", args.kbs.is_some()),
        ("--kbs-url", args.kbs_url.is_some()),
        ("--kbs-ca", args.kbs_ca.is_some()),
        ("--kbs-admin-key", args.kbs_admin_key.is_some()),
        ("--kbs-admin-issuer", args.kbs_admin_issuer.is_some()),
        ("--kbs-admin-role", args.kbs_admin_role.is_some()),
    ];
    for (flag, _) in flags.into_iter().chain(init_data::kbs_flags(args)).filter(|(_, given)| *given) {
        let advice = "contradicts --no-trustee (or SECURE_COMMS_NO_TRUSTEE=true): remove one of them";
        reader.faults.push(format!("{flag}: {advice}"));
    }
}

fn kbs(
    reader: &mut SettingsReader<'_>,
    args: &ConnectArgs,
    filters: bool,
) -> (Option<KeySource<KbsSettings>>, Option<OutboundTag>) {
    let given = reader.flag_or(("--kbs", args.kbs.clone()), "SECURE_COMMS_KBS_ADDR");
    let (name, address) = given.unwrap_or(("--kbs", DEFAULT_KBS.to_owned()));
    let target = host_port(&address);
    if target.is_none() {
        reader.fault(
            name,
            &address,
            "expected HOST:PORT or [IPv6]:PORT, without a scheme (for publishing there is --kbs-url)",
        );
    }
    let built_in = target.map(kbs_outbound);
    let url = match (&args.kbs_url, &built_in) {
        (Some(text), _) => url(reader, text),
        (None, Some(tag)) => Url::parse(&format!("http://{}", tag.target)).ok(),
        (None, None) => None,
    };
    if args.kbs_ca.is_some() && url.as_ref().is_some_and(|url| url.scheme() != "https") {
        reader.faults.push("--kbs-ca: needs HTTPS: give an https URL with --kbs-url".to_owned());
    }
    let admin = admin(reader, args);
    if let Some(url) = &url {
        warn_of_token(reader, url, admin.is_some());
        // Over TLS the filter sees no requests.
        if !filters || url.scheme() != "http" {
            warn_of_one_place(reader, url, built_in.as_ref());
        }
    }
    let key_source = url.map(|url| KeySource::Kbs(KbsSettings { url, ca: args.kbs_ca.clone(), admin }));
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

fn url(reader: &mut SettingsReader<'_>, text: &str) -> Option<Url> {
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
        reader.faults.push(format!("--kbs-url: {expected}"));
    }
    url
}

fn admin(reader: &mut SettingsReader<'_>, args: &ConnectArgs) -> Option<AdminSettings> {
    if args.kbs_admin_key.is_none() {
        let unused =
            [("--kbs-admin-issuer", &args.kbs_admin_issuer), ("--kbs-admin-role", &args.kbs_admin_role)];
        for (flag, _) in unused.into_iter().filter(|(_, value)| value.is_some()) {
            reader.faults.push(format!("{flag}: needs --kbs-admin-key"));
        }
    }
    let text = |value: &Option<String>, default: &str| value.clone().unwrap_or_else(|| default.to_owned());
    args.kbs_admin_key.clone().map(|key_file| AdminSettings {
        key_file,
        issuer: text(&args.kbs_admin_issuer, ISSUER),
        role: text(&args.kbs_admin_role, ROLE),
    })
}
