//! A pod: what the service says of it, and whether its VM can be reached and who answers there.

use std::net::SocketAddr;
use std::time::Duration;

use secure_comms_adaptor::address::Address;
use secure_comms_adaptor::{Greeting, GreetingError, greeting};
use secure_comms_protocol::{LoginState, PhaseName};
use tokio::net::lookup_host;
use tokio::time::timeout;

use super::report::Finding;
use crate::api::types::{Event, EventKind, Phase, Pod};

/// Time limit of the look-up of a name.
const LOOKUP: Duration = Duration::from_secs(5);
/// Complaints of the VM that are shown.
const COMPLAINTS: usize = 3;
/// Addresses that are tried.
const ADDRESSES: usize = 8;

/// Looks at a pod. `events` are the last ones, the newest last.
pub(super) async fn check(pod: &Pod, events: &[Event]) -> Vec<Finding> {
    let mut findings = vec![phase(pod)];
    if pod.addresses.is_empty() {
        let reason = "the service knows no address of its VM yet";
        findings.push(Finding::not_checked("pod-tcp", "its VM can be reached", reason));
    }
    for address in pod.addresses.iter().take(ADDRESSES) {
        findings.extend(reach(address, pod.phase).await);
    }
    findings.push(complaints(events));
    findings
}

fn phase(pod: &Pod) -> Finding {
    const CHECK: &str = "pod-phase";
    let title = format!("it is up: the service says {:?}", pod.phase);
    let reason = |otherwise: &str| pod.reason.clone().unwrap_or_else(|| otherwise.to_owned());
    match pod.phase {
        Phase::Up => Finding::ok(CHECK, title),
        Phase::Failed => Finding::fault(
            CHECK,
            title,
            reason("its start failed"),
            "put that right; then start it again, or stop it",
        ),
        Phase::Down => Finding::fault(
            CHECK,
            title,
            reason("its connection ended"),
            "see below; the service reconnects by itself",
        ),
        Phase::Connecting => Finding::warning(
            CHECK,
            title,
            reason("no answer of its VM yet"),
            "see below; the service goes on trying",
        ),
        Phase::Attesting => {
            let fix = "look at the KBS's log and its policies; the VM goes on trying";
            Finding::warning(CHECK, title, reason("the VM has no keys yet"), fix)
        }
        Phase::Ending => {
            let fix = "look at the KBS: the service deletes the pod's keys there as soon as it can";
            Finding::warning(CHECK, title, reason("it is being ended"), fix)
        }
        Phase::NotPrepared | Phase::Preparing | Phase::Prepared | Phase::Upgrading | Phase::Stopped => {
            let fix = "wait; secure-comms-adaptor pod show has its next step";
            Finding::warning(CHECK, title, reason("it cannot be used yet"), fix)
        }
    }
}

async fn reach(address: &str, phase: Phase) -> Vec<Finding> {
    const TITLE: &str = "its VM can be reached";
    let fault = |found: String, fix: &str| vec![Finding::fault("pod-tcp", TITLE, found, fix)];
    let Ok(parsed) = address.parse::<Address>() else {
        return fault(format!("'{address}' is not an address"), "start it again with the VM's address");
    };
    let all = timeout(LOOKUP, lookup_host(parsed.to_string())).await;
    let first = match all {
        Ok(Ok(mut all)) => all.next(),
        Ok(Err(error)) => return fault(format!("{parsed}: {error}"), "check the node's DNS"),
        Err(_) => None,
    };
    let Some(socket) = first else { return fault(format!("{parsed}: no address"), "check the node's DNS") };
    greeted(socket, greeting(socket).await, phase)
}

fn greeted(socket: SocketAddr, greeting: Result<Greeting, GreetingError>, phase: Phase) -> Vec<Finding> {
    const SSH: &str = "an agent answers there";
    let reached = || Finding::ok("pod-tcp", format!("its VM can be reached at {socket}"));
    let fault = |found: String, fix: &str| Finding::fault("pod-agent", SSH, found, fix);
    let greeting = match greeting {
        Ok(greeting) => greeting,
        Err(error) if error.is_unreachable() => {
            let fix = format!(
                "see that the VM runs, and that security groups, network policies and routes let this node reach port {} \
                 of it",
                socket.port()
            );
            return vec![Finding::fault(
                "pod-tcp",
                "its VM can be reached",
                format!("{socket}: {error}"),
                fix,
            )];
        }
        Err(error) => {
            let fix =
                "see that the VM was started from an image with the agent, and that the address is the VM's";
            return vec![reached(), fault(error.to_string(), fix)];
        }
    };
    let (theirs, login) = (greeting.hint.phase, greeting.hint.login);
    let finding = match (theirs, phase) {
        (None, _) => fault(
            greeting.banner.map_or_else(|| "an SSH server without a banner".to_owned(), |text| format!("its banner: {text}")),
            "something else than the agent has the port: see that the address is the VM's",
        ),
        (Some(PhaseName::Attestation), Phase::Up) => fault(
            "the agent is in the Attestation phase, and the service holds the pod for up: the VM has been restarted, or \
             another one has its address"
                .to_owned(),
            "wait a minute: the service notices a lost connection by itself; then look at the VM at the cloud",
        ),
        (Some(PhaseName::Kubernetes), Phase::Connecting | Phase::Attesting) if login == Some(LoginState::Latched) => {
            Finding::warning(
                "pod-agent",
                SSH,
                "another worker node, or an earlier store of this one, has logged in to this VM",
                "see that one node only drives the VM, and that the store was not lost; else restart the VM",
            )
        }
        (Some(phase), _) => Finding::ok("pod-agent", format!("{SSH}, in the {phase} phase")),
    };
    vec![reached(), finding]
}

fn complaints(events: &[Event]) -> Finding {
    const CHECK: &str = "pod-events";
    const TITLE: &str = "nothing was wrong with it lately";
    let mut wrong: Vec<&Event> = events.iter().filter(|event| event.kind == EventKind::Warning).collect();
    if wrong.is_empty() {
        return Finding::ok(CHECK, TITLE);
    }
    let count = wrong.len();
    wrong.reverse();
    let texts: Vec<_> =
        wrong.iter().take(COMPLAINTS).map(|event| format!("{}: {}", event.reason, event.message)).collect();
    let found = format!("{count} warnings, the last ones: {}", texts.join("; "));
    Finding::warning(CHECK, TITLE, found, "secure-comms-adaptor pod show has all of them")
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use secure_comms_protocol::{Banner, BannerHint};

    use super::*;
    use crate::doctor::Outcome;

    const VM: &str = "10.0.0.7:2222";

    fn said(banner: Option<Banner>, phase: Phase) -> Outcome {
        let text = banner.map(|banner| banner.text().trim().to_owned());
        let greeting =
            Greeting { hint: text.as_deref().map(BannerHint::parse).unwrap_or_default(), banner: text };
        greeted(VM.parse().unwrap(), Ok(greeting), phase).pop().unwrap().outcome
    }

    #[test]
    fn the_banner_must_fit_the_phase() {
        let latched = Banner::Kubernetes(LoginState::Latched);
        assert_eq!(said(Some(latched), Phase::Up), Outcome::Ok);
        assert_eq!(said(Some(Banner::Attestation), Phase::Attesting), Outcome::Ok);
        assert!(matches!(said(Some(Banner::Attestation), Phase::Up), Outcome::Fault { .. }));
        assert!(matches!(said(Some(latched), Phase::Connecting), Outcome::Warning { .. }));
        assert!(matches!(said(None, Phase::Up), Outcome::Fault { .. }));
    }

    #[tokio::test]
    async fn a_vm_that_cannot_be_reached_is_a_fault() {
        let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = closed.local_addr().unwrap().to_string();
        drop(closed);
        let findings = reach(&address, Phase::Connecting).await;
        let [Finding { check: "pod-tcp", outcome: Outcome::Fault { found, .. }, .. }] = &*findings else {
            panic!("{findings:?}")
        };
        assert!(found.contains("refused"), "{found}");
    }

    #[test]
    fn warnings_are_shown_the_newest_first() {
        let event = |kind, message: &str| Event {
            time: SystemTime::UNIX_EPOCH.into(),
            pod: "p".to_owned(),
            namespace: None,
            name: None,
            kind,
            reason: "VmLog".to_owned(),
            message: message.to_owned(),
        };
        let events = [
            event(EventKind::Warning, "old"),
            event(EventKind::Normal, "fine"),
            event(EventKind::Warning, "new"),
        ];
        let Outcome::Warning { found, .. } = complaints(&events).outcome else { panic!() };
        assert_eq!(found, "2 warnings, the last ones: VmLog: new; VmLog: old");
        assert_eq!(complaints(&events[1..2]).outcome, Outcome::Ok);
    }
}
