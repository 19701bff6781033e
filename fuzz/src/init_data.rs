//! Properties of the reader of `secure-comms.toml` for any text: the one who starts a VM writes it.

use agent_protocol_forwarder::config::init_data::{self, InitData};
use agent_protocol_forwarder::config::{Config, Inputs, KeySource, flags};
use secure_comms_protocol::PhaseName;
use secure_comms_protocol::tag::{PhaseSet, Tag};

/// Bytes of an error beyond what it repeats of the text.
const WORDS_MAX: usize = 4096;

pub(crate) fn exercise(text: &[u8]) {
    match init_data::parse(text) {
        Ok(read) => {
            only_adds_to_the_kubernetes_phase(&read);
            counts_as_measured(&read);
            let again = init_data::parse(&[text, b"\n# the end\n"].concat());
            assert!(again.is_ok_and(|again| same(&again, &read)), "a comment counts");
        }
        Err(faults) => {
            let shown = faults.to_string();
            assert!(!shown.is_empty() && !shown.chars().any(char::is_control), "not for a log: {shown:?}");
            assert!(shown.len() <= 8 * text.len() + WORDS_MAX, "{} bytes of {}", shown.len(), text.len());
        }
    }
}

fn only_adds_to_the_kubernetes_phase(read: &InitData) {
    let tags = || {
        let inbounds = read.inbounds.iter().map(|tag| (tag.name(), tag.phases()));
        inbounds.chain(read.outbounds.iter().map(|tag| (tag.name(), tag.phases())))
    };
    for (name, phases) in tags() {
        assert_eq!(phases, PhaseSet::Kubernetes);
        assert!(!["kataagent", "kbs"].contains(&name.as_str().to_ascii_lowercase().as_str()), "{name}");
    }
}

/// In the agent's configuration nothing is lost, and the Attestation phase is as without it.
fn counts_as_measured(read: &InitData) {
    let options = flags::parse(["-secure-comms".into()].into_iter()).expect("it is good");
    let inputs = Inputs { init_data: Some(read.clone()), ..Inputs::default() };
    let plain = Config::resolve(options.clone(), Inputs::default()).expect("it is good");
    // Too many tunnels are refused.
    let Ok(config) = Config::resolve(options, inputs) else { return };
    assert_eq!(config.inbounds.len(), plain.inbounds.len() + read.inbounds.len());
    assert_eq!(config.outbounds.len(), plain.outbounds.len() + read.outbounds.len());
    assert_eq!(attestation(&config), attestation(&plain));
    assert_eq!(config.pod_id, read.pod_id);
    let KeySource::Kbs { worker_node } = config.source else { panic!("init-data brings no keys") };
    assert_eq!(worker_node, read.worker_node);
}

fn attestation(config: &Config) -> Vec<String> {
    let is_early = |phases: PhaseSet| phases.includes(PhaseName::Attestation);
    let inbounds = config.inbounds.iter().filter(|tag| is_early(tag.phases)).map(ToString::to_string);
    let outbounds = config.outbounds.iter().filter(|tag| is_early(tag.phases)).map(ToString::to_string);
    inbounds.chain(outbounds).collect()
}

fn same(one: &InitData, other: &InitData) -> bool {
    one.inbounds == other.inbounds
        && one.outbounds == other.outbounds
        && one.worker_node == other.worker_node
        && one.pod_id == other.pod_id
}
