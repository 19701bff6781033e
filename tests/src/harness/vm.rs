//! A pod VM in network namespaces: agent, kata agent and CDH in the VM's namespace, `api-server-rest` in podns.
//! The worker node stays in the namespace of this process.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::id;

use anyhow::{Context, Result};
use secure_comms_tunnel::netns::Namespace;
use tempfile::TempDir;

use crate::harness::process::{Child, ensure_built};
use crate::harness::scene::PATIENCE;
use crate::harness::test_namespace::{LinkAddr, TestNamespace};

/// Fixed ports: in namespaces of our own they are free.
const KBS_PORT: u16 = 8080;
const GUEST_PORT: u16 = 8006;
const NODE_SERVICE_PORT: u16 = 9000;
const VM_SERVICE_PORT: u16 = 9001;
const SSH_PORT: u16 = 2222;

/// A VM with all its programs running.
#[derive(Debug)]
pub struct Vm {
    /// The agent.
    pub agent: Child,
    /// Address of the agent, for the worker node.
    pub ssh: SocketAddr,
    /// Address of `NODESERVICE`, for clients in podns.
    pub node_inbound: SocketAddr,
    /// The pod's network namespace, podns.
    pub pod: Namespace,
    /// The agent's inbounds, besides KBS.
    pub inbounds: String,
    /// The agent's outbounds, besides KATAAGENT.
    pub outbounds: String,
    /// The kata agent's socket.
    pub kata_socket: PathBuf,
    // Fields are dropped in this order: processes before their namespaces.
    _services: Vec<Child>,
    _pod: TestNamespace,
    _host: TestNamespace,
    _directory: TempDir,
}

impl Vm {
    /// Starts the program of each unit of a pod VM image, in the namespace that it has there.
    ///
    /// # Errors
    /// If this process is not root, or a program does not start.
    pub async fn boot() -> Result<Self> {
        let binaries = ensure_built().await?;
        let directory = tempfile::Builder::new().prefix("secure-comms-vm-").tempdir()?;
        let path = |name: &str| directory.path().join(name);
        let (host, pod) = (TestNamespace::new("vm")?, TestNamespace::new("podns")?);
        // One /30 for each process that uses one at the same time.
        let block = u8::try_from(id() % 64).unwrap_or_default() * 4;
        let address = |last| IpAddr::V4(Ipv4Addr::new(10, 213, 78, block + last));
        host.link_to_host(LinkAddr(address(2), 30), LinkAddr(address(1), 30))?;

        let mut kata = host.command(&binaries.simulator);
        kata.args(["kata-agent", "--socket"])
            .arg(path("kata.sock"))
            .args(["--tcp", &format!("127.0.0.1:{VM_SERVICE_PORT}")]);
        let mut cdh = host.command(&binaries.simulator);
        cdh.args(["cdh", "--listen"])
            .arg(path("cdh.sock"))
            .args(["--kbs", &format!("http://127.0.0.1:{KBS_PORT}")]);
        let mut rest = pod.command(&binaries.simulator);
        rest.args(["api-server-rest", "--listen", &format!("127.0.0.1:{GUEST_PORT}"), "--cdh"])
            .arg(path("cdh.sock"));
        std::fs::write(path("apf.json"), "{}").context("writing the VM's daemon config")?;
        let inbounds = format!("KUBERNETES_PHASE:NODESERVICE:{}:{NODE_SERVICE_PORT}", pod.name());
        let outbounds = format!("KUBERNETES_PHASE:VMSERVICE:{VM_SERVICE_PORT}");
        let mut agent = host.command(&binaries.agent);
        agent
            .args(["-secure-comms", "-pod-namespace", pod.name()])
            .arg("-kata-agent-socket")
            .arg(path("kata.sock"))
            .arg("-config")
            .arg(path("apf.json"))
            .arg("-secure-comms-state-dir")
            .arg(path("state"))
            .arg("-secure-comms-state-dir-on-disk")
            .arg("-secure-comms-inbounds")
            .arg(&inbounds)
            .arg("-secure-comms-outbounds")
            .arg(&outbounds);

        let agent = Child::spawn("agent", agent)?;
        agent.wait_for_text("inbound NODESERVICE listens on", PATIENCE).await?;
        let services =
            vec![Child::spawn("kata agent", kata)?, Child::spawn("cdh", cdh)?, Child::spawn("rest", rest)?];
        for service in &services {
            service.wait_for_text("listening on", PATIENCE).await?;
        }
        Ok(Self {
            agent,
            ssh: SocketAddr::new(address(2), SSH_PORT),
            node_inbound: SocketAddr::from((Ipv4Addr::LOCALHOST, NODE_SERVICE_PORT)),
            pod: Namespace::new(pod.name()),
            inbounds,
            outbounds,
            kata_socket: path("kata.sock"),
            _services: services,
            _pod: pod,
            _host: host,
            _directory: directory,
        })
    }
}
