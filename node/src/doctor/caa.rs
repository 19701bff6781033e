//! What the way in of cloud-api-adaptor (CAA) rests on: our rules, and five facts that a release of CAA could change.
//!
//! The facts: the layout of its pods directory with the keys of `apf.json`; the server name that it asks for (SNI) is that
//! of the pod's certificate; it speaks TLS; it makes one connection for a pod, silent at first; it runs in the node's
//! network namespace.

mod sandboxes;

use std::path::Path;

use super::counters::Refused;
use super::processes::Processes;
use super::report::Finding;
use crate::caa::rules::{self, NftError, RulesSettings, RulesState};
use crate::caa::strict::{self, StrictError};

pub(super) use self::sandboxes::check as directory;

/// The program of CAA.
const CAA: &str = "cloud-api-adaptor";

/// Whether our rules are in place in this network namespace.
pub(super) async fn rules(settings: RulesSettings) -> Vec<Finding> {
    rules_of(rules::inspect(settings).await)
}

fn rules_of(state: Result<RulesState, NftError>) -> Vec<Finding> {
    const USABLE: &str = "caa-nftables";
    const CHECK: &str = "caa-rules";
    const TITLE: &str = "our nftables rules redirect CAA's dials";
    const FIX: &str = "the service puts them back within a second: see that it runs, and what else changes the rules \
                       (nft flush ruleset, a reload of nftables.service)";
    let usable = "nftables can be used";
    let fault = |found: String| Finding::fault(CHECK, TITLE, found, FIX);
    let rules = match state {
        Err(NftError::Denied(why)) => {
            return vec![Finding::not_checked(USABLE, usable, format!("{why}: run doctor as root"))];
        }
        Err(error) => {
            let text = error.to_string();
            let (found, fix) = text.rsplit_once(": ").unwrap_or((&text, "install nftables"));
            return vec![Finding::fault(USABLE, usable, found, fix)];
        }
        Ok(RulesState::Missing) => fault(format!("the table inet {} is not there", rules::TABLE)),
        Ok(RulesState::Different { what }) => {
            fault(format!("the table inet {} is not as we made it: {what}", rules::TABLE))
        }
        Ok(RulesState::InPlace { fenced: 0 }) => Finding::ok(CHECK, TITLE),
        Ok(RulesState::InPlace { fenced }) => Finding::warning(
            CHECK,
            TITLE,
            format!("{fenced} packets of dials that were not redirected were rejected by our fence"),
            "look for what accepts or marks them before: nft list ruleset; CAA dials again, and no pod is lost by it",
        ),
    };
    vec![Finding::ok(USABLE, usable), rules]
}

/// Whether CAA runs where our rules see its dials: in our network namespace, which must be the node's.
pub(super) fn network(processes: &Processes) -> Finding {
    const CHECK: &str = "caa-network";
    const TITLE: &str = "CAA is in the network namespace of our rules (hostNetwork)";
    let all = processes.named(CAA);
    let Some(first) = all.first() else {
        return Finding::not_checked(
            CHECK,
            TITLE,
            format!("no process {CAA} is seen: it does not run, or doctor is in a container without hostPID"),
        );
    };
    let ours = processes.network_of(std::process::id());
    match (processes.network_of(*first), ours) {
        (Ok(theirs), Ok(ours)) if theirs == ours => Finding::ok(CHECK, format!("{TITLE}: process {first}")),
        (Ok(_), Ok(_)) => Finding::fault(
            CHECK,
            TITLE,
            format!("process {first} ({CAA}) is in another network namespace: its dials are not redirected"),
            "run CAA and the service with hostNetwork: true, and doctor in the node's network namespace",
        ),
        (Err(error), _) | (_, Err(error)) => Finding::not_checked(
            CHECK,
            TITLE,
            format!("the namespace of process {first}: {error}: run doctor as root"),
        ),
    }
}

/// What the service has seen of CAA.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Pods whose runtime is connected through the service now; `None`: unknown.
    pub connected: Option<usize>,
}

/// A fact that shows in the dials that the service has refused.
struct Fact {
    check: &'static str,
    title: &'static str,
    /// The reasons of refusals that speak against it.
    against: &'static [&'static str],
    fix: &'static str,
}

const FACTS: [Fact; 3] = [
    Fact {
        check: "caa-name",
        title: "CAA asks for the name in the pod's certificate (SNI)",
        against: &["no_server_name", "unknown_pod"],
        fix: "see which process dials (the service's log has its address); check pods-directory; with CA certificates of \
              your own in CAA the strict variant is needed: caa-certs",
    },
    Fact {
        check: "caa-tls",
        title: "CAA speaks TLS, with the client certificate of apf.json",
        against: &[
            "not_tls",
            "tls_version",
            "bad_hello",
            "no_client_certificate",
            "other_client_certificate",
            "bad_identity",
            "handshake",
        ],
        fix: "see that CAA runs without -disable-tls and TLS_SKIP_VERIFY, and what else on this node dials port 15150",
    },
    Fact {
        check: "caa-silent",
        title: "CAA makes one connection for a pod, silent at first",
        against: &["superseded", "closed_early", "hello_timeout"],
        fix: "see which process dials: the service's log has its address",
    },
];

/// The facts that show in the service's counters.
pub(super) fn observed(refused: Result<&Refused, &str>, seen: &Seen) -> Vec<Finding> {
    FACTS.iter().map(|fact| fact.observed(refused, seen)).collect()
}

impl Fact {
    fn observed(&self, refused: Result<&Refused, &str>, seen: &Seen) -> Finding {
        let refused = match refused {
            Ok(refused) => refused,
            Err(why) => return Finding::not_checked(self.check, self.title, why),
        };
        let counts = self.against.iter().filter_map(|reason| Some((reason, *refused.get(*reason)?)));
        let against: Vec<_> = counts.filter(|(_, count)| *count > 0).collect();
        if !against.is_empty() {
            let counts: Vec<_> = against.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
            let found = format!("dials refused since the service's start: {}", counts.join(", "));
            return Finding::warning(self.check, self.title, found, self.fix);
        }
        match seen.connected {
            Some(count) if count > 0 => {
                Finding::ok(self.check, format!("{}: seen with {count} pods", self.title))
            }
            _ => Finding::not_checked(self.check, self.title, "no dial of CAA's is there to see it by"),
        }
    }
}

/// Whether the directory of the strict variant has what CAA and the service need.
pub(super) fn certificates(directory: &Path) -> Finding {
    const CHECK: &str = "caa-certificates";
    let title = format!("the certificates of the strict variant are in {}", directory.display());
    match strict::load(directory) {
        Ok(_) => Finding::ok(CHECK, title),
        Err(StrictError::File(error)) if error.is_denied() => {
            Finding::not_checked(CHECK, title, format!("{error}: run doctor as root"))
        }
        Err(error) => {
            let fix = format!(
                "put those of another node there, or make new ones for all: secure-comms-adaptor caa-certs {}",
                directory.display()
            );
            Finding::fault(CHECK, title, error.to_string(), fix)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::doctor::Outcome;

    #[test]
    fn missing_and_changed_rules_are_faults() {
        for (state, word) in [
            (RulesState::Missing, "is not there"),
            (RulesState::Different { what: "no redirect".to_owned() }, "no redirect"),
        ] {
            let findings = rules_of(Ok(state));
            assert!(matches!(&findings[1].outcome, Outcome::Fault { found, .. } if found.contains(word)));
        }
        let findings = rules_of(Ok(RulesState::InPlace { fenced: 0 }));
        assert!(findings.iter().all(|finding| finding.outcome == Outcome::Ok), "{findings:?}");
        let fenced = rules_of(Ok(RulesState::InPlace { fenced: 7 }));
        assert!(matches!(&fenced[1].outcome, Outcome::Warning { found, .. } if found.contains("7 packets")));
    }

    #[test]
    fn nft_that_is_missing_is_a_fault_and_denied_not_checked() {
        let missing = rules_of(Err(NftError::Run(std::io::ErrorKind::NotFound.into())));
        assert!(
            matches!(&missing[0].outcome, Outcome::Fault { fix, .. } if fix.contains("install nftables"))
        );
        let denied = rules_of(Err(NftError::Denied("Operation not permitted".to_owned())));
        assert!(matches!(denied[0].outcome, Outcome::NotChecked { .. }));
    }

    /// A /proc with CAA and ourselves in these network namespaces.
    fn processes(theirs: Option<&str>, ours: &str) -> (tempfile::TempDir, Processes) {
        let dir = tempfile::tempdir().unwrap();
        let mut all = vec![(std::process::id(), ours, "x")];
        all.extend(theirs.map(|theirs| (7, theirs, "cloud-api-adapt")));
        for (pid, network, comm) in all {
            let process = dir.path().join(pid.to_string());
            fs::create_dir_all(process.join("ns")).unwrap();
            fs::write(process.join("comm"), format!("{comm}\n")).unwrap();
            fs::write(process.join("cmdline"), "/usr/bin/cloud-api-adaptor\0aws\0").unwrap();
            std::os::unix::fs::symlink(network, process.join("ns/net")).unwrap();
        }
        let processes = Processes::of(dir.path());
        (dir, processes)
    }

    #[test]
    fn caa_in_another_network_namespace_is_a_fault() {
        let (_dir, same) = processes(Some("net:[1]"), "net:[1]");
        assert_eq!(network(&same).outcome, Outcome::Ok);
        let (_dir, other) = processes(Some("net:[2]"), "net:[1]");
        assert!(matches!(network(&other).outcome, Outcome::Fault { .. }));
        let (_dir, none) = processes(None, "net:[1]");
        assert!(matches!(network(&none).outcome, Outcome::NotChecked { .. }));
    }

    #[test]
    fn refused_dials_speak_against_the_facts() {
        let none = Refused::new();
        let connected = Seen { connected: Some(3) };
        for finding in observed(Ok(&none), &connected) {
            assert!(
                finding.outcome == Outcome::Ok && finding.title.ends_with("seen with 3 pods"),
                "{finding:?}"
            );
        }
        for finding in observed(Ok(&none), &Seen::default()) {
            assert!(matches!(finding.outcome, Outcome::NotChecked { .. }));
        }
        for (at, reason) in ["unknown_pod", "not_tls", "superseded"].into_iter().enumerate() {
            let refused = Refused::from([(reason.to_owned(), 2)]);
            let findings = observed(Ok(&refused), &connected);
            let warned = |finding: &Finding| matches!(&finding.outcome, Outcome::Warning { .. });
            assert_eq!(findings.iter().position(warned), Some(at), "{reason}");
        }
        assert!(matches!(observed(Err("off"), &connected)[0].outcome, Outcome::NotChecked { .. }));
    }
}
