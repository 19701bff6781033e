//! The two ends of a pod's network: a pod VM and its worker node as namespaces, joined by a veth pair.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use secure_comms_tunnel::netns::{self, Namespace};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;

use crate::harness::process::{Child, ensure_built};
use crate::harness::scene::PATIENCE;
use crate::harness::test_namespace::TestNamespace;

/// VXLAN id of every tunnel here; the namespaces keep them apart.
pub const ID: u32 = 555_001;
/// VXLAN port: not the default one.
pub const PORT: u16 = 4790;
/// Hardware address of the pod.
pub const POD_HARDWARE: &str = "0a:58:0a:f4:01:07";

/// The addresses of a site.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Address of the VM on the veth pair, with its prefix length.
    pub vm: &'static str,
    /// Address of the worker node on the veth pair.
    pub node: &'static str,
    /// Address of the pod.
    pub pod: &'static str,
    /// Gateway of the pod, at the worker node's end of the tunnel.
    pub gateway: &'static str,
}

/// IPv4 throughout.
pub const V4: Plan =
    Plan { vm: "10.9.0.1/24", node: "10.9.0.2/24", pod: "10.244.1.7/24", gateway: "10.244.1.1/24" };
/// IPv6 throughout.
pub const V6: Plan = Plan { vm: "fd09::1/64", node: "fd09::2/64", pod: "fd24::7/64", gateway: "fd24::1/64" };
/// An IPv4 pod over IPv6.
pub const V4_OVER_V6: Plan = Plan { pod: V4.pod, gateway: V4.gateway, ..V6 };
/// An IPv6 pod over IPv4.
pub const V6_OVER_V4: Plan = Plan { pod: V6.pod, gateway: V6.gateway, ..V4 };

impl Plan {
    /// An address without its prefix length.
    #[must_use]
    pub fn bare(address: &str) -> &str {
        address.split('/').next().unwrap_or(address)
    }

    /// The `pod-network` object of the worker node. The default route comes before the route that it depends on.
    #[must_use]
    pub fn pod_network(&self) -> Value {
        let gateway = Self::bare(self.gateway);
        let (network, all) =
            if gateway.contains(':') { ("fd24::/64", "::/0") } else { ("10.244.1.0/24", "0.0.0.0/0") };
        json!({
            "podip": self.pod, "pod-hw-addr": POD_HARDWARE, "interface": "eth0", "worker-node-ip": self.node,
            "tunnel-type": "vxlan", "vxlan-id": ID, "vxlan-port": PORT, "mtu": 1500, "index": 1,
            "dedicated": false, "external-net-via-pod-vm": false,
            "routes": [
                {"dst": all, "gw": gateway, "dev": "eth0"},
                {"dst": network, "gw": "", "dev": "eth0", "protocol": 2, "scope": 253},
            ],
            "neighbors": [],
        })
    }
}

/// The namespaces, and a directory for the agent.
#[derive(Debug)]
pub struct PodSite {
    /// The VM, with the device `ens3`.
    pub vm: TestNamespace,
    /// The worker node, with the device `cable`.
    pub node: TestNamespace,
    /// The pod's namespace.
    pub pod: TestNamespace,
    directory: TempDir,
}

impl PodSite {
    /// Namespaces with a veth pair, whose ends are up and have no addresses.
    ///
    /// # Errors
    /// If they can't be made.
    pub fn bare() -> Result<Self> {
        let (vm, node, pod) =
            (TestNamespace::new("vm")?, TestNamespace::new("node")?, TestNamespace::new("pod")?);
        vm.veth("ens3", &node, "cable")?;
        Ok(Self { vm, node, pod, directory: tempfile::tempdir()? })
    }

    /// A VM with an address and a default route, a worker node with its end of the tunnel.
    ///
    /// # Errors
    /// If a step fails.
    pub fn new(plan: &Plan) -> Result<Self> {
        let site = Self::bare()?;
        site.vm.address("ens3", plan.vm)?;
        site.vm.ip(["route", "add", "default", "via", Plan::bare(plan.node), "dev", "ens3"])?;
        site.node.address("cable", plan.node)?;
        site.node_end(plan)?;
        Ok(site)
    }

    /// Makes the worker node's end of the tunnel.
    ///
    /// # Errors
    /// If a step fails.
    pub fn node_end(&self, plan: &Plan) -> Result<()> {
        let (id, port) = (ID.to_string(), PORT.to_string());
        let (remote, local) = (Plan::bare(plan.vm), Plan::bare(plan.node));
        let ends = ["remote", remote, "local", local, "dev", "cable"];
        let vxlan = ["link", "add", "tunnel", "type", "vxlan", "id", &id, "dstport", &port];
        self.node.ip(vxlan.into_iter().chain(ends))?;
        self.node.address("tunnel", plan.gateway)?;
        self.node.ip(["link", "set", "tunnel", "up"])
    }

    /// Path of a file in the agent's directory.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The agent's command line in the VM, with `pod_network` in its apf.json.
    ///
    /// # Errors
    /// If the file can't be written, or the agent can't be built.
    pub async fn agent_command(&self, pod_network: &Value) -> Result<Command> {
        let config = json!({"pod-name": "p", "pod-network": pod_network});
        std::fs::write(self.path("apf.json"), config.to_string())?;
        let mut command = self.vm.command(&ensure_built().await?.agent);
        command.env("JOURNAL_STREAM", "1:1").arg("-secure-comms").arg("-config").arg(self.path("apf.json"));
        command.arg("-pod-namespace").arg(self.pod.path());
        command.arg("-secure-comms-state-dir").arg(self.path("state")).arg("-secure-comms-state-dir-on-disk");
        Ok(command)
    }

    /// Starts the agent.
    ///
    /// # Errors
    /// If it can't be started.
    pub async fn agent(&self, pod_network: &Value) -> Result<Child> {
        Child::spawn("agent", self.agent_command(pod_network).await?)
    }

    /// Starts the agent and waits until the tunnel is up.
    ///
    /// # Errors
    /// If the tunnel does not come up.
    pub async fn up(&self, pod_network: &Value) -> Result<Child> {
        let agent = self.agent(pod_network).await?;
        is_up(&agent).await?;
        Ok(agent)
    }

    /// Everything that a pod network may change in the VM and in the pod's namespace.
    ///
    /// # Errors
    /// If `ip` fails.
    pub fn state(&self) -> Result<[Value; 2]> {
        Ok([self.vm.state()?, self.pod.state()?])
    }
}

/// Waits until the agent reports that the tunnel is up.
///
/// # Errors
/// If it does not.
pub async fn is_up(agent: &Child) -> Result<String> {
    agent.wait_for_text("pod network: 'eth0'", PATIENCE).await
}

impl TestNamespace {
    /// Links, addresses, routes and permanent neighbours, without what the kernel changes unasked.
    ///
    /// # Errors
    /// If `ip` fails.
    pub fn state(&self) -> Result<Value> {
        let mut links = keep(&self.show(["link"])?, &["ifname", "address", "mtu", "ifalias", "linkinfo"]);
        for link in &mut links {
            // An index in the VM, which `ip` resolves in the pod's namespace.
            if let Some(data) = link.pointer_mut("/linkinfo/info_data").and_then(Value::as_object_mut) {
                data.remove("link");
            }
        }
        links.sort_by_key(|link| link["ifname"].to_string());
        let mut addresses = Vec::new();
        for link in self.show(["address"])?.as_array().into_iter().flatten() {
            let fields = ["local", "prefixlen", "broadcast", "scope", "noprefixroute"];
            addresses.extend(
                keep(&link["addr_info"], &fields).into_iter().map(|info| json!([link["ifname"], info])),
            );
        }
        // The kernel adds link-local ones at any time.
        addresses.retain(|address| !address.to_string().contains("fe80:"));
        addresses.sort_by_key(Value::to_string);
        let neighbours = self.show(["neigh", "show", "nud", "permanent"])?;
        Ok(
            json!({"links": links, "addresses": addresses, "routes": self.routes()?, "neighbours": neighbours}),
        )
    }

    /// The routes of both families, sorted, without those to link-local addresses.
    ///
    /// # Errors
    /// If `ip` fails.
    pub fn routes(&self) -> Result<Vec<Value>> {
        let fields = ["dst", "gateway", "dev", "protocol", "scope", "metric", "prefsrc"];
        let mut routes = keep(&self.show(["-4", "route"])?, &fields);
        routes.extend(keep(&self.show(["-6", "route"])?, &fields));
        routes.retain(|route| route["dst"] != "fe80::/64");
        routes.sort_by_key(Value::to_string);
        Ok(routes)
    }

    /// Sends echo requests until one is answered.
    ///
    /// # Errors
    /// If none is.
    pub async fn ping(&self, address: &str) -> Result<()> {
        let output = self.command("ping").args(["-n", "-c", "1", "-w", "60"]).arg(address).output().await?;
        let said = String::from_utf8_lossy(&output.stdout);
        ensure!(
            output.status.success(),
            "{}: ping {address}: {said}{}",
            self.name(),
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(())
    }

    /// Sends a MiB each way over one TCP connection from here to `address` in `other`.
    ///
    /// # Errors
    /// If it does not arrive unchanged.
    pub async fn exchange(&self, other: &Self, address: &str) -> Result<()> {
        let address: IpAddr = address.parse()?;
        let (here, there) = (Namespace::new(self.name()), Namespace::new(other.name()));
        let listener = netns::listen(Some(&there), SocketAddr::new(address, 0)).await?;
        let to = listener.local_addr()?;
        let data: Vec<u8> = (0_u32..1 << 18).flat_map(u32::to_le_bytes).collect();
        let server = async {
            let (mut socket, _) = listener.accept().await?;
            let mut got = Vec::new();
            socket.read_to_end(&mut got).await?;
            socket.write_all(&got).await?;
            Ok::<_, anyhow::Error>(())
        };
        let client = async {
            let mut socket = netns::connect(Some(&here), to).await?;
            socket.write_all(&data).await?;
            socket.shutdown().await?;
            let mut back = Vec::new();
            socket.read_to_end(&mut back).await?;
            ensure!(back == data, "{} bytes came back of {}", back.len(), data.len());
            Ok(())
        };
        let both = async { tokio::try_join!(server, client) };
        tokio::time::timeout(PATIENCE, both)
            .await
            .with_context(|| format!("exchanging data with {to}"))??;
        Ok(())
    }
}

/// Keeps only these fields of each object.
fn keep(list: &Value, fields: &[&str]) -> Vec<Value> {
    let objects = list.as_array().into_iter().flatten().filter_map(Value::as_object);
    let kept = objects.map(|object| {
        object
            .iter()
            .filter(|(key, _)| fields.contains(&key.as_str()))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect()
    });
    kept.map(Value::Object).collect()
}
