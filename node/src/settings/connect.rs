//! Reads the settings of `connect`.

use std::net::Ipv6Addr;
use std::str::FromStr;

use secure_comms_adaptor::address::Address;
use secure_comms_protocol::limits::SSH_PORT;

use super::channel::Channel;
use super::reader::SettingsReader;
use super::{ConnectSettings, Env, UsageError, init_data};
use crate::cli::ConnectArgs;
use crate::cli::setting::{self, Flags, STORE};

impl ConnectSettings {
    /// Reads the flags and the environment.
    ///
    /// # Errors
    /// The faults of the flags and variables.
    pub fn read(args: ConnectArgs, env: Env<'_>) -> Result<Self, UsageError> {
        let mut reader = SettingsReader::with_flags(env, flags(&args));
        reader.refuse_if_off();
        let pod = reader.pod(args.pod_id.as_deref());
        let addresses = addresses(&mut reader, &args.addresses);
        let channel = Channel::read(&mut reader, &setting::CONNECT_DEADLINE);
        let events = match reader.flag_or(("--events", args.events), "SECURE_COMMS_EVENTS") {
            Some((name, text)) => reader.parsed(name, &text),
            None => Some(Events::default()),
        };
        let has_kbs = !reader.switch(&setting::NO_TRUSTEE);
        let (init_data, worker_nodes) = if has_kbs {
            (init_data::expected(&mut reader, args.pod), init_data::worker_nodes(&mut reader))
        } else {
            if args.pod.is_some() {
                reader.contradicts_no_trustee("--pod");
            }
            Default::default()
        };
        let store = reader.path(&STORE);
        let warnings = std::mem::take(&mut reader.warnings);
        let settings = pod.zip(channel).zip(store).map(|((pod, channel), store)| Self {
            pod,
            addresses,
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
            require_pq: channel.require_pq,
            delete_on_exit: args.delete_on_exit,
            events: events == Some(Events::Json),
            warnings,
        });
        reader.done(settings)
    }
}

/// The flags that `connect` has in common with `serve`.
fn flags(args: &ConnectArgs) -> Flags {
    let mut flags = Flags::default();
    let lists = [
        (&setting::INBOUNDS, &args.inbounds),
        (&setting::OUTBOUNDS, &args.outbounds),
        (&setting::PP_INBOUNDS, &args.pp_inbounds),
        (&setting::PP_OUTBOUNDS, &args.pp_outbounds),
        (&setting::KATA_AGENT_SOCKET, &args.kata_agent_sockets),
    ];
    for (setting, values) in lists.into_iter().filter(|(_, values)| !values.is_empty()) {
        flags.insert(setting, values.iter().map(Into::into).collect());
    }
    let paths = [
        (&setting::RUN_DIR, &args.run_dir),
        (&setting::STORE, &args.store),
        (&setting::KBS_CA, &args.kbs_ca),
        (&setting::KBS_ADMIN_KEY, &args.kbs_admin_key),
    ];
    for (setting, value) in paths {
        flags.insert_value(setting, value.as_ref());
    }
    let texts = [
        (&setting::KBS_FILTER, &args.kbs_filter),
        (&setting::KBS, &args.kbs),
        (&setting::KBS_URL, &args.kbs_url),
        (&setting::KBS_ADMIN_ISSUER, &args.kbs_admin_issuer),
        (&setting::KBS_ADMIN_ROLE, &args.kbs_admin_role),
        (&setting::INIT_DATA, &args.init_data),
        (&setting::INIT_DATA_DIGEST, &args.init_data_digest),
        (&setting::INIT_DATA_RULES, &args.init_data_rules),
        (&setting::WORKER_NODE_KEYS, &args.worker_node_keys),
        (&setting::CONNECT_DEADLINE, &args.deadline),
        (&setting::REKEY_BYTES, &args.rekey_bytes),
    ];
    for (setting, value) in texts {
        flags.insert_value(setting, value.as_ref());
    }
    let switches = [
        (&setting::ALLOW_OLD_AGENTS, args.allow_old_agents),
        (&setting::NO_TRUSTEE, args.no_trustee),
        (&setting::REQUIRE_PQ, args.require_pq),
    ];
    for (setting, _) in switches.into_iter().filter(|(_, on)| *on) {
        flags.insert_value(setting, Some("true"));
    }
    flags
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
