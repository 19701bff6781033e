//! The tunnels: those of the flags, of init-data and of user data, and the built-in ones.

use std::path::Path;

use secure_comms_keys::text::one_line;
use secure_comms_protocol::tag::{self, InboundTag, OutboundTag, Tag};

use super::daemon_config::DaemonConfig;
use super::error::ConfigError;
use super::flags::Options;
use super::init_data::InitData;
use super::user_data::{self, Ruled, Rules, same_tunnel};

/// Longest tag in an error, in bytes.
const TAG_SHOWN: usize = 200;

/// The tunnels of both directions.
#[derive(Debug)]
pub(super) struct Tunnels {
    pub(super) inbounds: Vec<InboundTag>,
    pub(super) outbounds: Vec<OutboundTag>,
}

/// What the tunnels are taken from.
pub(super) struct Sources<'a> {
    pub(super) options: &'a Options,
    /// Empty if the keys are not from the KBS: nothing binds init-data to such a pod.
    pub(super) init_data: &'a InitData,
    pub(super) daemon: &'a DaemonConfig,
}

/// The tags of one direction.
struct Lists<'a, T> {
    flag: &'static str,
    of_flag: &'a str,
    of_init_data: &'a [T],
    key: &'static str,
    of_user_data: Option<&'a str>,
}

/// Collects the tunnels of all sources. Tags of flags and init-data must all be good; of user data those count that keep the
/// rules.
///
/// # Errors
/// All faults of the tags of flags and init-data.
pub(super) fn collect(sources: &Sources<'_>, warnings: &mut Vec<String>) -> Result<Tunnels, ConfigError> {
    let Sources { options, init_data, daemon } = sources;
    let kata_agent = kata_agent_outbound(&options.kata_agent_socket)?;
    let kbs =
        InboundTag::parse("BOTH_PHASES:KBS:8080").map_err(|error| ConfigError::Tags(error.to_string()))?;
    let rules = Rules {
        mode: options.user_data,
        hosts: &options.user_data_hosts,
        pod_namespace: options.pod_namespace.as_deref(),
    };
    let inbounds = merge(
        &Lists {
            flag: "-secure-comms-inbounds",
            of_flag: &options.inbounds,
            of_init_data: &init_data.inbounds,
            key: "sc-inbounds",
            of_user_data: daemon.inbounds.as_deref(),
        },
        rules,
        warnings,
    );
    let outbounds = merge(
        &Lists {
            flag: "-secure-comms-outbounds",
            of_flag: &options.outbounds,
            of_init_data: &init_data.outbounds,
            key: "sc-outbounds",
            of_user_data: daemon.outbounds.as_deref(),
        },
        rules,
        warnings,
    );
    match (inbounds, outbounds) {
        (Ok(inbounds), Ok(outbounds)) => Ok(Tunnels {
            inbounds: tag::with_built_in(inbounds, kbs),
            outbounds: tag::with_built_in(outbounds, kata_agent),
        }),
        (inbounds, outbounds) => {
            let faults = inbounds.err().into_iter().chain(outbounds.err()).flatten();
            Err(ConfigError::Tags(faults.collect::<Vec<_>>().join("; ")))
        }
    }
}

fn merge<T: Ruled + Clone>(
    lists: &Lists<'_, T>,
    rules: Rules<'_>,
    warnings: &mut Vec<String>,
) -> Result<Vec<T>, Vec<String>> {
    let Lists { flag, of_flag, of_init_data, key, of_user_data } = lists;
    let mut tags: Vec<T> = tag::parse_list(of_flag).map_err(|errors| vec![format!("{flag}: {errors}")])?;
    let twice = |tag: &T| {
        let other = tags.iter().find(|other| same_tunnel(*other, tag))?;
        let [tag, other] = [tag, other].map(|tag| one_line(&tag.to_string(), TAG_SHOWN));
        Some(format!(
            "init-data's {key}: tag '{tag}': a name once in a phase; '{other}' of {flag} has it too"
        ))
    };
    let faults: Vec<String> = of_init_data.iter().filter_map(twice).collect();
    if !faults.is_empty() {
        return Err(faults);
    }
    let admitted = of_user_data.map_or_else(Vec::new, |list| {
        user_data::admit(key, list, rules, &[(flag, &tags), ("init-data", of_init_data)], warnings)
    });
    tags.extend(of_init_data.iter().cloned());
    tags.extend(admitted);
    Ok(tags)
}

fn kata_agent_outbound(socket: &Path) -> Result<OutboundTag, ConfigError> {
    let error = |fault: String| ConfigError::KataAgentSocket(fault);
    let path = socket
        .to_str()
        .filter(|path| path.starts_with('/'))
        .ok_or_else(|| error(format!("'{}': expected an absolute path in UTF-8", socket.display())))?;
    OutboundTag::parse(&format!("KUBERNETES_PHASE:KATAAGENT:{path}"))
        .map_err(|fault| error(fault.to_string()))
}
