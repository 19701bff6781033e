//! What the agent's process sees of the VM, in the image with systemd.

use anyhow::{Context, Result, ensure};

use super::{AGENT, Pod};

/// The unix sockets that the agent may connect to: systemd's for its state and its log, the kata agent's, that of
/// podvm-volumes, name resolution, and the inspector's, which is a tunnel of the test VM.
const SOCKETS: [&str; 7] = [
    "/run/systemd/notify",
    "/run/systemd/journal/dev-log",
    "/run/kata-agent/agent.sock",
    "/run/podvm-volumes/volumes.sock",
    "/run/systemd/resolve/io.systemd.Resolve",
    "/run/systemd/resolve/io.systemd.Resolve.Monitor",
    "/run/inspector/inspector.sock",
];
/// Sockets of a booted VM that give root to whom they serve: none may be missing from the list that is tried.
const POWERFUL: [&str; 3] = ["/run/systemd/private", "/run/dbus/system_bus_socket", "/run/udev/control"];
/// Where the agent may write: nothing reads programs or configuration from there.
const WRITABLE: [&str; 4] =
    ["/run/kata-containers", "/run/cloud-volumes", "/run/secure-comms", "/var/lib/kubelet"];
/// File systems of the kernel, with protections of their own, and the agent's own /tmp.
const KERNEL: [&str; 5] = ["/dev", "/proc", "/sys", "/tmp", "/var/tmp"];

/// Checks that the agent reaches no other socket, and writes nowhere else.
///
/// # Errors
/// If it does.
pub async fn sees_only_its_own(pod: &Pod) -> Result<()> {
    let agent = pod.inspection.process(AGENT).await?;
    let sockets = pod.inspection.unix_sockets(&agent).await?;
    println!("unix sockets of the VM, as the agent finds them:");
    for socket in &sockets {
        println!("  {}: {}", socket.name, socket.error.as_deref().unwrap_or("can be reached"));
    }
    for name in POWERFUL {
        ensure!(sockets.iter().any(|socket| socket.name == name), "{name} was not tried");
    }
    let reached: Vec<_> = sockets.iter().filter(|socket| socket.error.is_none()).collect();
    let other: Vec<_> = reached.iter().filter(|socket| !SOCKETS.contains(&socket.name.as_str())).collect();
    ensure!(other.is_empty(), "the agent can connect to {other:?}");
    // Else the attempts prove nothing.
    ensure!(reached.iter().any(|socket| socket.name == "/run/systemd/notify"), "no socket was reached");

    let mounts = pod.inspection.read(&format!("/proc/{}/mountinfo", agent.pid)).await?;
    let below = |point: &str, top: &str| {
        point.strip_prefix(top).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    for mount in mounts.lines() {
        // proc_pid_mountinfo(5): the fifth field is the mount point, the sixth the options of the mount.
        let mut fields = mount.split(' ').skip(4);
        let (point, options) = (fields.next().context("a mount point")?, fields.next().context("options")?);
        let writable = options.split(',').any(|option| option == "rw");
        let allowed = WRITABLE.iter().chain(&KERNEL).any(|top| below(point, top));
        ensure!(allowed || !writable, "the agent can write to {point}: {mount}");
    }
    Ok(())
}
