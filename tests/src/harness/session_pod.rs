//! A pod whose programs meet the rest at unix sockets only, so that they may be in any network namespaces; with the kata
//! agent's real protocol, and echo servers behind the other tunnels.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use tokio::net::UnixStream;
use tokio::process::Command;

use crate::harness::pod_runtime::PodRuntime;
use crate::harness::process::Child;
use crate::harness::routed_path::RoutedPath;
use crate::harness::scene::{PATIENCE, Scene, SceneOptions, up};
use crate::harness::test_namespace::TestNamespace;
use crate::simulators::kata::KataAgent;
use crate::simulators::kata::framed::Framed;
use crate::simulators::kata_api::server::{KataServer, OWN_DIRECTORY};
use crate::simulators::line::Line;

/// The store that the pod's keys are in.
const STORE: &str = "store";
/// Sockets of the adaptor's inbounds.
const RUNTIME: &str = "runtime";
const TO_VM: &str = "to-vm";

/// A client of a tunnel that leads to an echo server.
pub type Client = Framed<UnixStream>;

/// A tunnel besides the kata agent's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tunnel {
    /// From the worker node to the VM.
    ToVm,
    /// From the VM to the worker node.
    ToNode,
}

/// Both of them.
pub const TUNNELS: [Tunnel; 2] = [Tunnel::ToVm, Tunnel::ToNode];

/// A pod. Its programs are started one by one.
#[derive(Debug)]
pub struct SessionPod {
    /// Keys and files. Its own servers are not used.
    pub scene: Scene,
    /// The kata agent; it has one connection for as long as the pod lives.
    pub kata: KataServer,
    /// Server of [`Tunnel::ToVm`].
    pub vm_service: KataAgent,
    /// Server of [`Tunnel::ToNode`].
    pub node_service: KataAgent,
    /// More flags of the agent.
    pub agent_flags: Vec<String>,
    /// More flags of the adaptor.
    pub adaptor_flags: Vec<String>,
    path: Option<RoutedPath>,
}

/// A pod in the Kubernetes phase. The programs are dropped before their namespaces.
#[derive(Debug)]
pub struct RunningPod {
    /// The agent.
    pub agent: Child,
    /// The adaptor.
    pub adaptor: Child,
    /// The line between them, on loopback.
    pub line: Option<Line>,
    /// Everything else.
    pub pod: SessionPod,
}

impl SessionPod {
    /// A pod on loopback.
    ///
    /// # Errors
    /// If a server can't start, or the binaries can't be built.
    pub async fn new() -> Result<Self> {
        let scene = Scene::new(SceneOptions { user_data: true, ..SceneOptions::default() }).await?;
        scene.write_user_data().await?;
        std::fs::create_dir(scene.path(OWN_DIRECTORY))?;
        Ok(Self {
            kata: KataServer::start(scene.path(OWN_DIRECTORY).join("agent.sock")).await?,
            vm_service: KataAgent::unix(scene.path("vm-service"))?,
            node_service: KataAgent::unix(scene.path("node-service"))?,
            agent_flags: Vec::new(),
            adaptor_flags: Vec::new(),
            scene,
            path: None,
        })
    }

    /// A pod whose worker node and VM are the ends of this path.
    ///
    /// # Errors
    /// As [`SessionPod::new`].
    pub async fn on(path: RoutedPath) -> Result<Self> {
        Ok(Self { path: Some(path), ..Self::new().await? })
    }

    /// The path between worker node and VM.
    ///
    /// # Errors
    /// If the pod is on loopback.
    pub fn path(&self) -> Result<&RoutedPath> {
        self.path.as_ref().context("the pod is on loopback")
    }

    /// Address of the agent.
    ///
    /// # Errors
    /// As [`RoutedPath::agent`].
    pub fn ssh(&self) -> Result<SocketAddr> {
        let Some(path) = &self.path else { return Ok(self.scene.ssh) };
        let [here, _] = path.agent()?;
        Ok(here)
    }

    /// Starts the agent.
    ///
    /// # Errors
    /// If it does not listen.
    pub async fn agent(&self) -> Result<Child> {
        let namespace = self.path.as_ref().map(|path| &path.vm);
        let mut command = program(namespace, &self.scene.binaries().agent);
        let listen = match namespace {
            None => self.scene.ssh,
            Some(_) => SocketAddr::from(([0, 0, 0, 0], self.ssh()?.port())),
        };
        command
            .args(["-secure-comms", "-secure-comms-user-data", "all", "-pod-namespace", ""])
            .args(["-secure-comms-listen", &listen.to_string()])
            .arg("-kata-agent-socket")
            .arg(self.kata.path())
            .arg("-config")
            .arg(self.scene.path("apf.json"))
            .arg("-secure-comms-state-dir")
            .arg(self.scene.path("agent-state"))
            .arg("-secure-comms-state-dir-on-disk")
            .arg("-secure-comms-inbounds")
            .arg(format!("BOTH_PHASES:KBS:{},{}", self.scene.kbs_inbound.port(), self.node_inbound()))
            .arg("-secure-comms-outbounds")
            .arg(self.vm_outbound())
            // Not the machine's own.
            .args(["-secure-comms-init-data", "", "-secure-comms-init-data-digest", ""])
            .args(&self.agent_flags)
            .env("SECURE_COMMS_LOG", "debug");
        let agent = Child::spawn("agent", command)?;
        agent.wait_for_text("inbound NODESERVICE listens on", PATIENCE).await?;
        Ok(agent)
    }

    /// Starts an adaptor for an agent at these addresses, with the pod's own store.
    ///
    /// # Errors
    /// If it can't be started.
    pub fn adaptor(&self, addresses: &[SocketAddr]) -> Result<Child> {
        self.adaptor_with(STORE, addresses)
    }

    /// As [`SessionPod::adaptor`], with a store of this name. One with another name has inbounds of its own, which nothing
    /// uses.
    ///
    /// # Errors
    /// If it can't be started.
    pub fn adaptor_with(&self, store: &str, addresses: &[SocketAddr]) -> Result<Child> {
        let own = if store == STORE { String::new() } else { format!("-{store}") };
        let inbound = |name: &str| self.scene.path(&format!("{name}{own}"));
        let namespace = self.path.as_ref().map(|path| &path.node);
        let mut command = program(namespace, &self.scene.binaries().adaptor);
        command.args(["connect", "--no-trustee", "--pod-id", &self.scene.pod]);
        for address in addresses {
            command.arg("--address").arg(address.to_string());
        }
        command
            .arg("--store")
            .arg(self.scene.path(store))
            .args(["--pp-inbounds", &self.node_inbound(), "--pp-outbounds", &self.vm_outbound()])
            .arg("--kata-agent-socket")
            .arg(self.kata.path())
            .arg("--run-dir")
            .arg(inbound("run"))
            .arg("--inbounds")
            .arg(format!(
                "KUBERNETES_PHASE:KATAAGENT:{},KUBERNETES_PHASE:VMSERVICE:{}",
                inbound(RUNTIME).display(),
                inbound(TO_VM).display()
            ))
            .arg("--outbounds")
            .arg(format!("KUBERNETES_PHASE:NODESERVICE:{}", self.scene.path("node-service").display()))
            .args(&self.adaptor_flags)
            .env("SECURE_COMMS_LOG", "debug");
        Child::spawn("adaptor", command)
    }

    /// Starts agent and adaptor; on loopback with a [`Line`] between them.
    ///
    /// # Errors
    /// If the Kubernetes phase does not come up.
    pub async fn run(self) -> Result<RunningPod> {
        let agent = self.agent().await?;
        let line = if self.path.is_none() { Some(Line::to(self.ssh()?).await?) } else { None };
        let address = line.as_ref().map_or(self.ssh()?, Line::address);
        let adaptor = self.adaptor(&[address])?;
        up(&adaptor).await?;
        Ok(RunningPod { agent, adaptor, line, pod: self })
    }

    /// Connects the runtime; once for each pod, as the kata agent can't be reached a second time.
    ///
    /// # Errors
    /// If a call fails.
    pub async fn runtime(&self) -> Result<PodRuntime> {
        PodRuntime::start(&self.scene.path(RUNTIME)).await
    }

    /// Connects a client to an end of a tunnel.
    ///
    /// # Errors
    /// If it is refused.
    pub async fn client(&self, tunnel: Tunnel) -> Result<Client> {
        Self::connect(&self.inbound(tunnel)).await
    }

    /// As [`SessionPod::client`], by the path of the inbound.
    ///
    /// # Errors
    /// As there.
    pub async fn connect(inbound: &Path) -> Result<Client> {
        let connected = UnixStream::connect(inbound).await;
        connected.map(Framed::new).with_context(|| format!("connecting to {}", inbound.display()))
    }

    /// The echo server of a tunnel.
    #[must_use]
    pub fn server(&self, tunnel: Tunnel) -> &KataAgent {
        match tunnel {
            Tunnel::ToVm => &self.vm_service,
            Tunnel::ToNode => &self.node_service,
        }
    }

    /// Socket at which clients of a tunnel connect.
    #[must_use]
    pub fn inbound(&self, tunnel: Tunnel) -> PathBuf {
        self.scene.path(match tunnel {
            Tunnel::ToVm => TO_VM,
            Tunnel::ToNode => "to-node",
        })
    }

    fn node_inbound(&self) -> String {
        format!("KUBERNETES_PHASE:NODESERVICE:{}", self.inbound(Tunnel::ToNode).display())
    }

    fn vm_outbound(&self) -> String {
        format!("KUBERNETES_PHASE:VMSERVICE:{}", self.scene.path("vm-service").display())
    }
}

impl RunningPod {
    /// A pod on loopback.
    ///
    /// # Errors
    /// As [`SessionPod::new`] and [`SessionPod::run`].
    pub async fn on_a_line() -> Result<Self> {
        SessionPod::new().await?.run().await
    }

    /// A pod on a new [`RoutedPath`].
    ///
    /// # Errors
    /// As [`SessionPod::new`], [`RoutedPath::new`] and [`SessionPod::run`].
    pub async fn on_a_path() -> Result<Self> {
        SessionPod::on(RoutedPath::new().await?).await?.run().await
    }

    /// The line.
    ///
    /// # Errors
    /// If the pod is on a [`RoutedPath`].
    pub fn line(&self) -> Result<&Line> {
        self.line.as_ref().context("the pod is on a path")
    }

    /// Both logs, for an error.
    #[must_use]
    pub fn logs(&self) -> String {
        format!("{}{}", self.agent.log(), self.adaptor.log())
    }
}

fn program(namespace: Option<&Arc<TestNamespace>>, program: &Path) -> Command {
    namespace.map_or_else(|| Command::new(program), |namespace| namespace.command(program))
}
