//! One pod with everything around it, without network namespaces. The simulators run here; agent and adaptor are the
//! real binaries.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::net::{TcpStream, UnixStream};
use tokio::process::Command;
use tokio::time::timeout;

pub use crate::harness::drawn::{free_port, pod_id};
use crate::harness::kept_directory::{Directory, Names};
use crate::harness::process::{Binaries, Child, ensure_built};
use crate::simulators::guest::{Backend, Cdh, CdhOptions, Rest};
use crate::simulators::kata::KataAgent;
use crate::simulators::kata::client::bulk_both_ways;
use crate::simulators::kata::framed::Framed;
use crate::simulators::kbs::{Kbs, KbsOptions};

/// Timeout of one step of a test, also on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// Options of a scene.
#[derive(Clone, Debug, Default)]
pub struct SceneOptions {
    /// Options of the KBS.
    pub kbs: KbsOptions,
    /// The pod's keys come by user data, and the KBS is not used.
    pub user_data: bool,
}

/// A pod and everything around it.
#[derive(Debug)]
pub struct Scene {
    directory: Directory,
    binaries: &'static Binaries,
    options: SceneOptions,
    /// Deadline of the adaptor's start, in seconds.
    pub deadline: u64,
    /// Inbound tags of the adaptor, besides KATAAGENT.
    pub inbounds: String,
    /// The adaptor's tag for KATAAGENT: TCP, for the clients of most tests. None: its default, a unix socket.
    pub kata_inbound: Option<String>,
    /// The adaptor's `--run-dir`.
    pub run_dir: PathBuf,
    /// Inbound tags that the adaptor expects of the agent.
    pub agent_inbounds: String,
    /// Outbound tags that the adaptor expects of the agent.
    pub agent_outbounds: String,
    /// The VM's init-data, which the adaptor expects.
    pub init_data: Option<PathBuf>,
    /// Socket on which the agent expects the kata agent; by default that of `kata`.
    pub kata_socket: PathBuf,
    /// Value of the agent's `-secure-comms-user-data`.
    pub user_data_mode: &'static str,
    /// Outbound tags of the agent beyond those of the scene, each with a comma before it.
    pub more_outbounds: String,
    /// More flags of the agent.
    pub agent_flags: Vec<String>,
    /// Value of the agent's `-pod-namespace`; empty: the pod has no network namespace.
    pub pod_namespace: String,
    /// Id of the pod.
    pub pod: String,
    /// Key broker.
    pub kbs: Kbs,
    /// The CDH, which fetches resources in the VM, with its counters.
    pub cdh: Arc<Cdh>,
    /// `api-server-rest`.
    pub guest: Rest,
    /// The kata agent.
    pub kata: KataAgent,
    /// Server in the VM that the worker node reaches as `VMSERVICE`.
    pub vm_service: KataAgent,
    /// Server at the worker node that the VM reaches as `NODESERVICE`.
    pub node_service: KataAgent,
    /// Address of the agent's SSH server.
    pub ssh: SocketAddr,
    /// Address of the agent's KBS inbound.
    pub kbs_inbound: SocketAddr,
    /// Address of the agent's `NODESERVICE` inbound.
    pub node_inbound: SocketAddr,
}

impl Scene {
    /// Starts the simulators; agent and adaptor are started one by one.
    ///
    /// # Errors
    /// If a simulator can't start, or the binaries can't be built.
    pub async fn new(options: SceneOptions) -> Result<Self> {
        Self::build(options, Directory::temporary()?).await
    }

    /// As [`Scene::new`], in a directory that stays: a later scene with it has the same pod, ports and files.
    ///
    /// # Errors
    /// As there, and if the directory is in use or not ours alone.
    pub async fn kept(options: SceneOptions, directory: &Path) -> Result<Self> {
        Self::build(options, Directory::kept(directory)?).await
    }

    async fn build(options: SceneOptions, directory: Directory) -> Result<Self> {
        let binaries = ensure_built().await?;
        let Names { pod, ssh, kbs_inbound, node_inbound, vm_service } = Names::of(&directory)?;
        let kbs = Kbs::start(options.kbs.clone()).await?;
        let scheme = if kbs.ca_pem().is_some() { "https" } else { "http" };
        let mut cdh = CdhOptions::new(format!("{scheme}://{kbs_inbound}"));
        cdh.ca_pem = kbs.ca_pem().map(ToOwned::to_owned);
        let cdh = Arc::new(Cdh::new(cdh)?);
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        if !options.user_data {
            // As the cloud writes it for a pod whose keys come from the KBS.
            std::fs::write(directory.path().join("apf.json"), "{}")?;
        }
        let vm_service = KataAgent::tcp(vm_service).await?;
        let service = vm_service.addr().context("the VM's service listens on TCP")?;
        Ok(Self {
            guest: Rest::start(any, Backend::Local(cdh.clone())).await?,
            kata: KataAgent::unix(directory.path().join("kata.sock"))?,
            vm_service,
            node_service: KataAgent::tcp(any).await?,
            ssh,
            node_inbound,
            deadline: 110,
            inbounds: "KUBERNETES_PHASE:VMSERVICE:0".to_owned(),
            kata_inbound: Some("KUBERNETES_PHASE:KATAAGENT:0".to_owned()),
            // No deeper: with the pod's id, the path of a socket may have 107 bytes.
            run_dir: directory.path().to_owned(),
            agent_inbounds: format!("KUBERNETES_PHASE:NODESERVICE:{}", node_inbound.port()),
            agent_outbounds: format!("KUBERNETES_PHASE:VMSERVICE:{service}"),
            init_data: None,
            kata_socket: directory.path().join("kata.sock"),
            user_data_mode: if options.user_data { "all" } else { "none" },
            more_outbounds: String::new(),
            agent_flags: Vec::new(),
            pod_namespace: String::new(),
            pod,
            directory,
            binaries,
            options,
            kbs,
            cdh,
            kbs_inbound,
        })
    }

    /// Path of the pod's keys at the KBS.
    pub fn keys(&self) -> String {
        format!("default/pp-{}/keys", self.pod)
    }

    /// The pod's private key, as the adaptor stores it; none before it made one.
    pub fn pod_key(&self) -> Option<String> {
        std::fs::read_to_string(self.path("store").join("pods").join(&self.pod).join("key")).ok()
    }

    /// Path of a file of the scene.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The binaries under test.
    pub fn binaries(&self) -> &Binaries {
        self.binaries
    }

    /// Command line of the agent.
    ///
    /// # Errors
    /// If a server of the scene has no address.
    pub fn agent_command(&self) -> Result<Command> {
        let service = self.vm_service.addr().context("the VM's service listens on TCP")?;
        let mut command = Command::new(&self.binaries.agent);
        command
            .args(["-secure-comms", "-pod-namespace", &self.pod_namespace])
            .arg("-kata-agent-socket")
            .arg(&self.kata_socket)
            .arg("-config")
            .arg(self.path("apf.json"))
            .arg("-secure-comms-listen")
            .arg(self.ssh.to_string())
            .arg("-secure-comms-state-dir")
            .arg(self.path("agent-state"))
            .arg("-secure-comms-state-dir-on-disk")
            .arg("-secure-comms-mount-prefixes")
            .arg(self.path(""))
            // Not the machine's own.
            .arg("-secure-comms-volumes-socket")
            .arg(self.path("volumes.sock"))
            .arg("-secure-comms-guest-api")
            .arg(self.guest.addr().to_string())
            .arg("-secure-comms-inbounds")
            .arg(format!(
                "BOTH_PHASES:KBS:{},KUBERNETES_PHASE:NODESERVICE:{}",
                self.kbs_inbound.port(),
                self.node_inbound.port()
            ))
            .arg("-secure-comms-outbounds")
            .arg(format!("KUBERNETES_PHASE:VMSERVICE:{service}{}", self.more_outbounds))
            .args(["-secure-comms-user-data", self.user_data_mode])
            // Not the machine's own.
            .args(["-secure-comms-init-data", "", "-secure-comms-init-data-digest", ""])
            .args(&self.agent_flags);
        Ok(command)
    }

    /// Starts the agent and waits until it listens.
    ///
    /// # Errors
    /// If it does not.
    pub async fn agent(&self) -> Result<Child> {
        Self::listening_agent(self.agent_command()?).await
    }

    /// As [`Scene::agent`], at the log level that reports why unauthenticated connections end.
    ///
    /// # Errors
    /// If it does not.
    pub async fn debugged_agent(&self) -> Result<Child> {
        let mut command = self.agent_command()?;
        command.env("SECURE_COMMS_LOG", "debug");
        Self::listening_agent(command).await
    }

    async fn listening_agent(command: Command) -> Result<Child> {
        let agent = Child::spawn("agent", command)?;
        agent.wait_for_text("inbound NODESERVICE listens on", PATIENCE).await?;
        Ok(agent)
    }

    /// Command line of the adaptor, for an agent at `addresses`.
    ///
    /// # Errors
    /// If a file or a server of the scene does not exist.
    pub fn adaptor_command(&self, addresses: &[SocketAddr]) -> Result<Command> {
        let service = self.node_service.addr().context("the worker node's service listens on TCP")?;
        let mut command = Command::new(&self.binaries.adaptor);
        command.arg("connect").args(["--pod-id", &self.pod]);
        for address in addresses {
            command.arg("--address").arg(address.to_string());
        }
        command
            .args(["--deadline", &self.deadline.to_string()])
            .args(["--inbounds", &self.inbounds])
            .args(["--pp-inbounds", &self.agent_inbounds, "--pp-outbounds", &self.agent_outbounds])
            .arg("--kata-agent-socket")
            .arg(&self.kata_socket)
            .arg("--run-dir")
            .arg(&self.run_dir)
            .arg("--store")
            .arg(self.path("store"))
            .arg("--outbounds")
            .arg(format!("KUBERNETES_PHASE:NODESERVICE:{service}"));
        if let Some(tag) = &self.kata_inbound {
            command.args(["--inbounds", tag]);
        }
        if let Some(file) = &self.init_data {
            command.arg("--init-data").arg(file);
        }
        if self.options.user_data {
            command.arg("--no-trustee");
            return Ok(command);
        }
        let admin_key = self.path("kbs-admin.pem");
        write_secret(&admin_key, self.kbs.admin_key_pem())?;
        command
            .arg("--kbs")
            .arg(self.kbs.addr().to_string())
            .arg("--kbs-url")
            .arg(self.kbs.url())
            .arg("--kbs-admin-key")
            .arg(admin_key);
        if let Some(ca) = self.kbs.ca_pem() {
            std::fs::write(self.path("kbs-ca.pem"), ca)?;
            command.arg("--kbs-ca").arg(self.path("kbs-ca.pem"));
        }
        Ok(command)
    }

    /// Starts the adaptor for the agent of the scene.
    ///
    /// # Errors
    /// If it can't be started.
    pub fn adaptor(&self) -> Result<Child> {
        Child::spawn("adaptor", self.adaptor_command(&[self.ssh])?)
    }

    /// Starts the adaptor and waits until the pod's keys are at the KBS.
    ///
    /// # Errors
    /// If they do not get there.
    pub async fn adaptor_with_keys_published(&self) -> Result<Child> {
        let adaptor = self.adaptor()?;
        adaptor.wait_for_text("inbound KATAAGENT listens on", PATIENCE).await?;
        Ok(adaptor)
    }

    /// Writes apf.json as the adaptor makes it for the pod (`user-data`).
    ///
    /// # Errors
    /// If `user-data` fails.
    pub async fn write_user_data(&self) -> Result<()> {
        let mut command = Command::new(&self.binaries.adaptor);
        command.args(["user-data", "--pod-id", &self.pod]).arg("--store").arg(self.path("store"));
        let output = command.arg("--output").arg(self.path("apf.json")).output().await?;
        if !output.status.success() {
            bail!("user-data: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(())
    }
}

fn write_secret(path: &Path, text: &str) -> Result<()> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = std::fs::OpenOptions::new();
    let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(path)?;
    Ok(file.write_all(text.as_bytes())?)
}

/// A scene with default options.
///
/// # Errors
/// As [`Scene::new`].
pub async fn scene() -> Result<Scene> {
    Scene::new(SceneOptions::default()).await
}

/// Waits until a process prints `text`, or returns at once if it has.
///
/// # Errors
/// If it does not, with its log.
pub async fn says(process: &Child, text: &str) -> Result<()> {
    process.wait_for_text(text, PATIENCE).await.map(drop)
}

/// As [`says`], after the first `mark` lines.
///
/// # Errors
/// If it does not, with its log.
pub async fn says_after(process: &Child, mark: usize, text: &str) -> Result<()> {
    process.wait_from(mark, |line| line.contains(text), PATIENCE).await.map(drop)
}

/// Checks that the pod is up, and that the tunnels of the default options carry a MiB both ways.
///
/// # Errors
/// If it is not up, with the adaptor's log, or if bytes are lost.
pub async fn works(scene: &Scene, adaptor: &Child) -> Result<()> {
    const BYTES: u64 = 1024 * 1024;
    up(adaptor).await?;
    let kata = endpoint(adaptor, "KATAAGENT").await?;
    let bulk = async { bulk_both_ways(kata_client(kata).await?, BYTES, 11).await };
    let hangs = |what: &str| format!("{what} hangs\n{}", adaptor.log());
    timeout(PATIENCE, bulk).await.with_context(|| hangs("the kata agent"))??;
    for address in [endpoint(adaptor, "VMSERVICE").await?, scene.node_inbound] {
        let bulk = async { bulk_both_ways(client(address).await?, BYTES, 11).await };
        timeout(PATIENCE, bulk).await.with_context(|| hangs("a tunnel"))??;
    }
    Ok(())
}

/// Waits until the adaptor reports the pod's Kubernetes phase.
///
/// # Errors
/// If it does not, with its log.
pub async fn up(adaptor: &Child) -> Result<()> {
    adaptor.wait_for_text("kubernetes phase up", PATIENCE).await.map(drop)
}

/// Address of an inbound of the adaptor, from what it printed.
///
/// # Errors
/// If it did not print the address.
pub async fn endpoint(process: &Child, tunnel: &str) -> Result<SocketAddr> {
    let words = format!("inbound {tunnel} listens on ");
    let line = process.wait_for_text(&words, PATIENCE).await?;
    let address = line.split(&words).nth(1).and_then(|rest| rest.split_whitespace().next());
    address.context("no address")?.parse().with_context(|| format!("an address in: {line}"))
}

/// Path of a unix inbound of the adaptor, from what it printed.
///
/// # Errors
/// If it did not print a path.
pub async fn socket(process: &Child, tunnel: &str) -> Result<PathBuf> {
    let words = format!("inbound {tunnel} listens on ");
    let line = process.wait_for_text(&words, PATIENCE).await?;
    let path = line.split(&words).nth(1).and_then(|rest| rest.split_whitespace().next());
    path.filter(|path| path.starts_with('/')).map(Into::into).with_context(|| format!("a path in: {line}"))
}

/// Connects to a unix inbound that leads to the kata agent.
///
/// # Errors
/// If the connection is refused.
pub async fn kata_socket_client(path: &Path) -> Result<Framed<UnixStream>> {
    let connected = UnixStream::connect(path).await;
    connected.map(Framed::new).with_context(|| format!("connecting to {}", path.display()))
}

/// Connects to an inbound of any tunnel but the kata agent's.
///
/// # Errors
/// If the connection is refused.
pub async fn client(address: SocketAddr) -> Result<TcpStream> {
    TcpStream::connect(address).await.with_context(|| format!("connecting to {address}"))
}

/// Connects to an inbound that leads to the kata agent, where data passes in ttrpc frames.
///
/// # Errors
/// If the connection is refused.
pub async fn kata_client(address: SocketAddr) -> Result<Framed<TcpStream>> {
    client(address).await.map(Framed::new)
}
