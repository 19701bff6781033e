//! What an operator reads when no address of a pod could be connected to, and what to do about it.

use secure_comms_protocol::InitDataDigest;

use super::connect::Failure;
use super::plan::Plan;
use crate::transport::ssh::ConnectError;

/// The text for a VM that is lost to its pod.
pub const LOST: &str = "the VM answers with a host key that is not this pod's and refuses attestation: it is lost to \
    this pod; if the VM has its keys from user data, give --no-trustee; else a stranger posed as the KBS, or the address \
    belongs to another VM: make a new VM, and use HTTPS to the KBS to prevent it";

/// The causes of the failures in one line, and the remedy if there is one.
pub(super) fn explain(plan: &Plan, failures: &[Failure]) -> String {
    if failures.is_empty() {
        return "the pod's host names resolve to no address".to_owned();
    }
    failures.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ") + &remedy(plan, failures)
}

/// What to say if an agent in the Attestation phase names other init-data than the expected. It asks the KBS for its keys
/// under the path of its own. The agent is not proven, so this is a hint.
pub(super) fn init_data_mismatch(expected: Option<&InitDataDigest>, agents: Option<&str>) -> Option<String> {
    let agents: Option<Result<InitDataDigest, _>> = agents.map(str::parse);
    let fetches = "it asks the KBS for its keys under another path than they are published";
    match (expected, agents) {
        (None, None) => None,
        (Some(expected), Some(Ok(agents))) if *expected == agents => None,
        (Some(expected), Some(Ok(agents))) => Some(format!(
            "init-data: the agent has {agents} and {expected} is expected, so {fetches}: check that --init-data is the \
             init-data of this very VM"
        )),
        (Some(expected), None) => Some(format!(
            "init-data: {expected} is expected and the agent knows of none, so {fetches}: check that the VM is started \
             with its init-data"
        )),
        (None, Some(Ok(agents))) => Some(format!(
            "init-data: the agent has {agents} and none is expected, so {fetches}: give the VM's init-data with --init-data"
        )),
        (_, Some(Err(_))) => {
            Some("init-data: the agent's digest is not one: check that the VM is this pod's".to_owned())
        }
    }
}

fn remedy(plan: &Plan, failures: &[Failure]) -> String {
    let attests = plan.attestation.attests();
    let kubernetes = || failures.iter().filter_map(|failure| failure.kubernetes.as_ref());
    if kubernetes().any(|error| matches!(error, ConnectError::Refused { .. })) {
        let node = plan.node_key.public().map(|key| key.to_string()).unwrap_or_default();
        let check = if attests {
            "its keys were published with another worker-node key: restore worker-node.key in --store, or give this key to \
             the other adaptor with --worker-node-keys"
        } else {
            "check that sc-wn-pub in its user data is this node's"
        };
        return format!(
            "; the agent has this pod's key and rejects this worker node's ({node}): {check}, and start a new VM"
        );
    }
    let all = || failures.iter().flat_map(|failure| failure.attestation.iter().chain(&failure.kubernetes));
    if all().all(|error| matches!(error, ConnectError::NotSsh(_))) {
        return "; check the address and its port: the agent's is 2222 by default".into();
    }
    if all().all(|error| matches!(error, ConnectError::Lookup(_))) {
        return "; check the name, and this node's DNS".into();
    }
    if !attests && kubernetes().any(|error| matches!(error, ConnectError::WrongHostKey { .. })) {
        return "; check that the VM got this pod's user data, and that the address is the VM's".into();
    }
    String::new()
}
