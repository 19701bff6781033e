//! Network namespaces for tests whose two ends need separate networks. Needs root and iproute2.

use std::ffi::OsStr;
use std::io::ErrorKind;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// A named network namespace with `lo` up; deleted when dropped, with the links in it.
#[derive(Debug)]
pub struct TestNamespace {
    name: String,
}

/// One end of a link: an address with its prefix length, such as 10.0.0.1/24.
#[derive(Clone, Copy, Debug)]
pub struct LinkAddr(pub IpAddr, pub u8);

/// Number in a name; processes of this machine share the names, so the pid is in them too.
static NEXT: AtomicU32 = AtomicU32::new(0);

impl TestNamespace {
    /// Makes a namespace with a unique name that contains `label`.
    ///
    /// # Errors
    /// If this is not possible here; says what is needed.
    pub fn new(label: &str) -> Result<Self> {
        let name = format!("sc-{label}-{}", unique());
        ip(["netns", "add", &name])?;
        // From here on the namespace is deleted when dropped.
        let netns = Self { name };
        netns.ip(["link", "set", "lo", "up"])?;
        Ok(netns)
    }

    /// The name, as in `ip netns exec <name>`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The path, `/run/netns/<name>`.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.name)
    }

    /// Links this namespace with another by a veth pair, both ends up and with addresses.
    ///
    /// # Errors
    /// If a step fails; names it.
    pub fn link(&self, addr: LinkAddr, other: &Self, other_addr: LinkAddr) -> Result<()> {
        let (here, there) = link_names();
        self.veth(&here, other, &there)?;
        self.address(&here, &addr.to_string())?;
        other.address(&there, &other_addr.to_string())
    }

    /// Links this namespace with another by a veth pair of these names, both ends up.
    ///
    /// # Errors
    /// If a step fails; names it.
    pub fn veth(&self, end: &str, other: &Self, other_end: &str) -> Result<()> {
        // In one step in the other namespaces: the names may exist in ours.
        self.ip(["link", "add", end, "type", "veth", "peer", "name", other_end, "netns", other.name()])?;
        self.ip(["link", "set", end, "up"])?;
        other.ip(["link", "set", other_end, "up"])
    }

    /// Gives an interface an address, with its prefix length; it can be used at once.
    ///
    /// # Errors
    /// If the kernel refuses it.
    pub fn address(&self, interface: &str, address: &str) -> Result<()> {
        self.ip(add_address(interface, address))
    }

    /// As [`TestNamespace::link`], with the namespace that this process is in.
    ///
    /// # Errors
    /// If a step fails; names it.
    pub fn link_to_host(&self, addr: LinkAddr, host_addr: LinkAddr) -> Result<()> {
        let (here, there) = link_names();
        ip(["link", "add", &here, "netns", &self.name, "type", "veth", "peer", &there])?;
        self.address(&here, &addr.to_string())?;
        self.ip(["link", "set", &here, "up"])?;
        ip(add_address(&there, &host_addr.to_string()))?;
        ip(["link", "set", &there, "up"])
    }

    /// A command that runs `program` inside; `ip` becomes the program, so that its pid is the program's.
    #[must_use]
    pub fn command(&self, program: impl AsRef<OsStr>) -> tokio::process::Command {
        let mut command = tokio::process::Command::new("ip");
        command.args(["netns", "exec", &self.name]).arg(program);
        command
    }

    /// Runs `ip` on this namespace.
    ///
    /// # Errors
    /// If it fails, with its output.
    pub fn ip<'a>(&'a self, args: impl IntoIterator<Item = &'a str>) -> Result<()> {
        let inside = ["-n", self.name.as_str()];
        ip(inside.into_iter().chain(args))
    }

    /// What `ip` shows of this namespace, as JSON.
    ///
    /// # Errors
    /// If it fails.
    pub fn show<'a>(&'a self, args: impl IntoIterator<Item = &'a str>) -> Result<Value> {
        let inside = ["-n", self.name.as_str(), "-j", "-d"];
        let text = output(inside.into_iter().chain(args))?;
        // Some versions print nothing for an empty list.
        if text.trim().is_empty() {
            return Ok(Value::Array(Vec::new()));
        }
        serde_json::from_str(&text).with_context(|| format!("what ip printed: {text}"))
    }
}

impl Drop for TestNamespace {
    fn drop(&mut self) {
        // A failure can't be handled here; the name shows which process left the namespace.
        let _ = ip(["netns", "del", &self.name]);
    }
}

impl std::fmt::Display for LinkAddr {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.0, self.1)
    }
}

/// The `ip` arguments that give an interface an address.
fn add_address<'a>(interface: &'a str, address: &'a str) -> impl Iterator<Item = &'a str> {
    // Without duplicate address detection it can be used at once.
    let nodad = address.contains(':').then_some("nodad");
    ["address", "add", address, "dev", interface].into_iter().chain(nodad)
}

/// Two interface names, unique on this machine, of at most 15 characters.
fn link_names() -> (String, String) {
    let unique = unique();
    (format!("{unique}a"), format!("{unique}b"))
}

fn unique() -> String {
    format!("{:x}x{:x}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

fn ip<'a>(args: impl IntoIterator<Item = &'a str>) -> Result<()> {
    output(args).map(drop)
}

fn output<'a>(args: impl IntoIterator<Item = &'a str>) -> Result<String> {
    let args: Vec<_> = args.into_iter().collect();
    let said = args.join(" ");
    let out = match Command::new("ip").args(&args).output() {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            bail!("ip {said}: no such program: network namespaces need root and iproute2")
        }
        out => out.with_context(|| format!("ip {said}"))?,
    };
    if out.status.success() {
        return Ok(String::from_utf8_lossy(&out.stdout).into_owned());
    }
    let error = String::from_utf8_lossy(&out.stderr);
    bail!("ip {said}: {}: network namespaces need root and iproute2", error.trim())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::harness::process::Child;
    use crate::simulators::kata::KataAgent;

    const SOON: Duration = Duration::from_secs(10);

    #[tokio::test]
    async fn a_process_in_a_namespace_is_reached_over_the_link_only() {
        let inside = TestNamespace::new("test").unwrap();
        let (addr, host) = (LinkAddr([10, 213, 77, 2].into(), 30), LinkAddr([10, 213, 77, 1].into(), 30));
        inside.link_to_host(addr, host).unwrap();
        let server = KataAgent::tcp("10.213.77.1:0".parse().unwrap()).await.unwrap();
        let port = server.addr().unwrap().port();
        let mut command = inside.command("bash");
        command.args(["-c", "exec 3<>/dev/tcp/10.213.77.1/$0 && echo connected", &port.to_string()]);
        Child::spawn("bash", command).unwrap().wait_for_text("connected", SOON).await.unwrap();

        let mut command = inside.command("bash");
        command.args(["-c", "exec 3<>/dev/tcp/127.0.0.1/$0 || echo refused", &port.to_string()]);
        Child::spawn("bash", command).unwrap().wait_for(|line| line == "refused", SOON).await.unwrap();
    }

    #[tokio::test]
    async fn two_namespaces_are_linked_and_gone_when_dropped() {
        let (one, two) = (TestNamespace::new("one").unwrap(), TestNamespace::new("two").unwrap());
        one.link(LinkAddr([10, 0, 0, 1].into(), 24), &two, LinkAddr([10, 0, 0, 2].into(), 24)).unwrap();
        // A closed port refuses at once over the link; an address without a link would not.
        let mut command = one.command("bash");
        command.args(["-c", "exec 3<>/dev/tcp/10.0.0.2/9"]);
        let child = Child::spawn("bash", command).unwrap();
        child.wait_for_text("Connection refused", SOON).await.unwrap();
        let path = one.path();
        assert!(path.exists());
        drop((child, one, two));
        assert!(!path.exists());
    }
}
