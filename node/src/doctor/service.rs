//! The service's process: is it there, may we ask it, and has it what it needs.

use std::io;
use std::path::Path;
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::time::timeout;

use super::Service;
use super::processes::Processes;
use super::report::Finding;

/// Time limit for a connection to the API's socket.
const CONNECT: Duration = Duration::from_secs(2);
/// What we are called.
const PROGRAM: &str = "secure-comms-adaptor";
/// Files that the service may need: some 20 for each of 250 pods.
const FILES: u64 = 8192;

/// Connects to the API's socket, and finds the process that listens there.
pub(super) async fn reachable(socket: &Path) -> (Finding, Service) {
    const CHECK: &str = "service-reachable";
    let title = format!("the service answers at {}", socket.display());
    let error = match timeout(CONNECT, UnixStream::connect(socket)).await {
        Ok(Ok(stream)) => {
            // A process of another namespace has the number 0.
            let pid = stream.peer_cred().ok().and_then(|peer| peer.pid());
            let pid = pid.and_then(|pid| u32::try_from(pid).ok()).filter(|pid| *pid > 0);
            let process = pid.map_or_else(String::new, |pid| format!(", process {pid}"));
            return (Finding::ok(CHECK, format!("{title}{process}")), Service { answers: true, pid });
        }
        Ok(Err(error)) => error,
        Err(_) => {
            let found = format!("it takes no connection within {} s", CONNECT.as_secs());
            let fix = "look at its log: journalctl -u secure-comms-adaptor";
            return (Finding::fault(CHECK, title, found, fix), Service::default());
        }
    };
    let finding = match error.kind() {
        io::ErrorKind::NotFound => {
            let fix = "start it: systemctl start secure-comms-adaptor; or give its socket with --socket";
            Finding::fault(CHECK, title, "no such socket: the service does not run", fix)
        }
        io::ErrorKind::ConnectionRefused => {
            let fix = "start it: systemctl start secure-comms-adaptor";
            Finding::fault(CHECK, title, "nothing listens there any more: the service has ended", fix)
        }
        io::ErrorKind::PermissionDenied => Finding::not_checked(
            CHECK,
            title,
            "the socket is another user's: run doctor as root, or as the service's user",
        ),
        _ => Finding::fault(CHECK, title, error.to_string(), "check the path with --socket"),
    };
    (finding, Service::default())
}

/// Whether the service may open as many files as its pods need.
pub(super) fn files(processes: &Processes, pid: u32) -> Finding {
    const CHECK: &str = "service-files";
    let title = "it may open enough files";
    match processes.files_of(pid) {
        (None, _) => Finding::not_checked(
            CHECK,
            title,
            format!("/proc/{pid}/limits cannot be read: run doctor as root"),
        ),
        (Some(limit), open) => enough(limit, open),
    }
}

fn enough(limit: u64, open: Option<usize>) -> Finding {
    const CHECK: &str = "service-files";
    const FIX: &str = "raise it: LimitNOFILE=65536 in the unit, or in the container's runtime";
    let open = open.map_or(0, |open| open as u64);
    let title = format!("it may open enough files: {open} of {limit} are open");
    if open.saturating_mul(10) >= limit.saturating_mul(9) {
        return Finding::fault(CHECK, title, "soon no pod can connect", FIX);
    }
    if limit < FILES {
        return Finding::warning(CHECK, title, format!("250 pods need some {FILES}"), FIX);
    }
    Finding::ok(CHECK, title)
}

/// Who listens at the port to which cloud-api-adaptor's dials are redirected.
pub(super) fn port(processes: &Processes, port: u16, service: Service) -> Finding {
    const CHECK: &str = "caa-port";
    let title = format!("port {port} is the service's");
    let listeners = match processes.listeners(port) {
        Ok(listeners) => listeners,
        Err(error) => return Finding::not_checked(CHECK, title, error.to_string()),
    };
    let Some(first) = listeners.first() else {
        return match service.answers {
            false => Finding::not_checked(CHECK, title, "the service does not run; the port is free"),
            true => Finding::fault(
                CHECK,
                title,
                "nothing listens there: dials of cloud-api-adaptor are refused, and it dials again",
                "look at the service's log; check that it serves cloud-api-adaptor (caa = \"on\") at this port",
            ),
        };
    };
    let Some(owner) = processes.owner_of(*first) else {
        return Finding::not_checked(
            CHECK,
            title,
            "something listens there; run doctor as root on the node, not in a container, to see which process",
        );
    };
    let name = processes.comm(owner).unwrap_or_else(|| "?".to_owned());
    let is_ours = service.pid.map_or_else(|| processes.named(PROGRAM).contains(&owner), |pid| pid == owner);
    if !is_ours {
        let fix = format!("end process {owner}, or give the service another port: listen-port");
        return Finding::fault(CHECK, title, format!("process {owner} ({name}) listens there"), fix);
    }
    if !listeners.iter().any(|listener| listener.is_ipv6) {
        let found = "it listens for IPv4 only: a VM with an IPv6 address cannot be dialled";
        return Finding::warning(
            CHECK,
            title,
            found,
            "let the node's kernel have IPv6, or use VMs with IPv4 addresses",
        );
    }
    Finding::ok(CHECK, title)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;
    use crate::doctor::Outcome;

    #[tokio::test]
    async fn a_service_that_does_not_run_is_a_fault() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let (finding, service) = reachable(&socket).await;
        assert!(matches!(&finding.outcome, Outcome::Fault { found, .. } if found.contains("no such socket")));
        assert_eq!(service, Service::default());
        let server = tokio::net::UnixListener::bind(&socket).unwrap();
        let (finding, service) = reachable(&socket).await;
        let us = Service { answers: true, pid: Some(std::process::id()) };
        assert_eq!((finding.outcome, service), (Outcome::Ok, us));
        drop(server);
        // A process that another test is about to start has the listener for a moment.
        let gone = tokio::time::timeout(std::time::Duration::from_secs(30), async {
            loop {
                let (finding, _) = reachable(&socket).await;
                if let Outcome::Fault { found, .. } = finding.outcome {
                    return found;
                }
            }
        });
        let found = gone.await.unwrap();
        assert!(found.contains("has ended"), "{found}");
    }

    #[test]
    fn few_files_are_a_warning_and_none_left_a_fault() {
        assert_eq!(enough(65_536, Some(100)).outcome, Outcome::Ok);
        assert!(matches!(enough(1024, Some(100)).outcome, Outcome::Warning { .. }));
        assert!(matches!(enough(65_536, Some(65_000)).outcome, Outcome::Fault { .. }));
        let us = files(&Processes::of("/proc"), std::process::id());
        assert!(us.title.contains("are open"), "{us:?}");
    }

    #[test]
    fn a_port_of_another_process_is_a_fault() {
        let processes = Processes::of("/proc");
        let of = |pid| Service { answers: true, pid: Some(pid) };
        let (us, other) = (of(std::process::id()), of(1));
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = server.local_addr().unwrap().port();
        assert!(matches!(port(&processes, at, other).outcome, Outcome::Fault { .. }));
        // IPv4 only.
        assert!(matches!(port(&processes, at, us).outcome, Outcome::Warning { .. }));
        drop(server);
        assert!(matches!(port(&processes, at, us).outcome, Outcome::Fault { .. }));
        assert!(matches!(port(&processes, at, Service::default()).outcome, Outcome::NotChecked { .. }));
    }
}
