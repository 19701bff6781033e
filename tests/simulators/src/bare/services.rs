//! The services of the image, as child processes of this PID 1.

use std::convert::Infallible;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use nix::sched::{CloneFlags, setns};
use nix::sys::wait::{WaitStatus, wait};
use podvm_init::console::uptime;

use super::say;

/// Network namespace of the pod's containers.
const POD_NAMESPACE: &str = "/run/netns/podns";
/// Directories that the services need.
pub(super) const DIRECTORIES: [&str; 4] =
    ["/run/kata-agent", "/run/kata-containers", "/run/confidential-containers", "/run/inspector"];

/// Pause before an ended service is restarted.
const PAUSE: Duration = Duration::from_millis(300);
const AGENT: &str = "/usr/local/bin/agent-protocol-forwarder";
/// Path of this program.
const SIMULATOR: &str = "/init";

struct Service {
    program: &'static str,
    /// Name of the process; for a simulator, its role.
    name: &'static str,
    args: &'static [&'static str],
    in_pod: bool,
}

/// With the arguments of the units in the image of the test VM.
const SERVICES: [Service; 5] = [
    Service {
        program: SIMULATOR,
        name: "kata-agent",
        args: &["--socket", "/run/kata-agent/agent.sock"],
        in_pod: false,
    },
    Service {
        program: SIMULATOR,
        name: "cdh",
        args: &["--listen", "/run/confidential-containers/cdh.sock", "--kbs", "http://127.0.0.1:8080"],
        in_pod: false,
    },
    Service {
        program: SIMULATOR,
        name: "api-server-rest",
        args: &["--listen", "127.0.0.1:8006", "--cdh", "/run/confidential-containers/cdh.sock"],
        in_pod: true,
    },
    Service {
        program: SIMULATOR,
        name: "inspector",
        args: &["--socket", "/run/inspector/inspector.sock"],
        in_pod: false,
    },
    Service {
        program: AGENT,
        name: "agent-protocol-forwarder",
        args: &[
            "-kata-agent-namespace",
            POD_NAMESPACE,
            "-secure-comms",
            // One of its tests has its keys from the host, and no confidential VM.
            "-secure-comms-user-data",
            "all",
            "-kata-agent-socket",
            "/run/kata-agent/agent.sock",
            "-secure-comms-inbounds",
            "KUBERNETES_PHASE:NODESERVICE:podns:9000",
            "-secure-comms-outbounds",
            "KUBERNETES_PHASE:INSPECTOR:/run/inspector/inspector.sock",
        ],
        in_pod: false,
    },
];

/// What netns@podns.service does in the image.
pub(super) fn make_namespace() -> Result<()> {
    let mut command = Command::new(AGENT);
    command.args(["-create-pod-namespace-only", "-pod-namespace", POD_NAMESPACE]);
    let status = command.status().with_context(|| format!("starting {AGENT}"))?;
    ensure!(status.success(), "making {POD_NAMESPACE}: {status}");
    Ok(())
}

/// Starts all services, restarts each that ends, and reaps all other children.
pub(super) fn supervise(notify: &Path) -> Result<Infallible> {
    let mut running = Vec::new();
    for service in &SERVICES {
        running.push((service.start(notify)?, service));
    }
    loop {
        let status = wait().context("waiting for a process to end")?;
        let Some(entry) =
            running.iter_mut().find(|(pid, _)| Some(*pid) == status.pid().map(|pid| pid.as_raw()))
        else {
            continue;
        };
        say(format_args!("{} ended at {}: {}", entry.1.name, uptime(), end(status)));
        std::thread::sleep(PAUSE);
        entry.0 = entry.1.start(notify)?;
    }
}

fn end(status: WaitStatus) -> String {
    match status {
        WaitStatus::Exited(_, code) => format!("exit code {code}"),
        WaitStatus::Signaled(_, signal, _) => format!("{signal}"),
        other => format!("{other:?}"),
    }
}

impl Service {
    fn start(&'static self, notify: &Path) -> Result<i32> {
        let mut command = Command::new(self.program);
        command.arg0(self.name).args(self.args);
        if self.program == AGENT {
            command.env("NOTIFY_SOCKET", notify);
        }
        // A child inherits the network namespace of the thread that forks it.
        let start = move || -> Result<i32> {
            if self.in_pod {
                let namespace = std::fs::File::open(POD_NAMESPACE)?;
                setns(namespace, CloneFlags::CLONE_NEWNET).context("entering podns")?;
            }
            // Reaped by `supervise`.
            Ok(i32::try_from(command.spawn()?.id())?)
        };
        let started = std::thread::spawn(start).join().map_err(|_| anyhow!("the thread ended"))?;
        started.with_context(|| format!("starting {}", self.name))
    }
}
