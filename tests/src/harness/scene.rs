//! One pod with everything around it, without network namespaces: the stand-ins run here, agent and adaptor are the
//! real binaries.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio::process::Command;

use crate::harness::process::{Binaries, Child, ensure_built};
use crate::simulators::guest::{Backend, Cdh, CdhOptions, Rest};
use crate::simulators::kata::KataAgent;
use crate::simulators::kata::framed::Framed;
use crate::simulators::kbs::{Kbs, KbsOptions};

/// No step of a test takes longer, however busy the machine is.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// What a scene is made with.
#[derive(Clone, Debug, Default)]
pub struct SceneOptions {
    /// The KBS.
    pub kbs: KbsOptions,
    /// The pod's keys come by user data; there is no KBS in the VM's life.
    pub user_data: bool,
}

/// A pod and what is around it.
#[derive(Debug)]
pub struct Scene {
    directory: TempDir,
    binaries: &'static Binaries,
    options: SceneOptions,
    /// How long the adaptor's start may take, in seconds.
    pub deadline: u64,
    /// The adaptor's inbound tags.
    pub inbounds: String,
    /// The socket on which the agent expects the kata agent; that of `kata`, if nobody says otherwise.
    pub kata_socket: PathBuf,
    /// The pod's network namespace, as the agent is told; empty: there is none.
    pub pod_namespace: String,
    /// The pod's id.
    pub pod: String,
    /// Trustee's key broker.
    pub kbs: Kbs,
    /// What fetches resources in the VM, with its counters.
    pub cdh: Arc<Cdh>,
    /// `api-server-rest`.
    pub guest: Rest,
    /// The kata agent.
    pub kata: KataAgent,
    /// A server in the VM that the worker node reaches as `VMSERVICE`.
    pub vm_service: KataAgent,
    /// A server at the worker node that the VM reaches as `NODESERVICE`.
    pub node_service: KataAgent,
    /// Where the agent serves SSH.
    pub ssh: SocketAddr,
    /// Where the agent's KBS inbound listens.
    pub kbs_inbound: SocketAddr,
    /// Where the agent's `NODESERVICE` inbound listens.
    pub node_inbound: SocketAddr,
}

/// Ports below the range from which the kernel hands out others: nobody gets them by chance.
const PORTS: u16 = 12_000;
const FIRST_PORT: u16 = 20_000;

/// A port that is free now, and that this process has given to nobody else: it may be bound much later, and again.
///
/// # Errors
/// None is free.
pub fn free_port() -> Result<SocketAddr> {
    static START: OnceLock<u16> = OnceLock::new();
    static GIVEN: AtomicU16 = AtomicU16::new(0);
    // Elsewhere in each process, for others may run beside us.
    let random = u16::from_le_bytes(random()?);
    let start = START.get_or_init(|| random % PORTS);
    for _ in 0..PORTS {
        let given = GIVEN.fetch_add(1, Ordering::Relaxed) % PORTS;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, FIRST_PORT + (start + given) % PORTS));
        if TcpListener::bind(address).is_ok() {
            return Ok(address);
        }
    }
    bail!("no port is free")
}

fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    ring::rand::SecureRandom::fill(&ring::rand::SystemRandom::new(), &mut bytes)
        .map_err(|_| anyhow::anyhow!("the system has no randomness"))?;
    Ok(bytes)
}

/// A sandbox id as the runtime makes them: 64 hex digits.
///
/// # Errors
/// The system has no randomness.
pub fn pod_id() -> Result<String> {
    Ok(random::<32>()?.iter().map(|byte| format!("{byte:02x}")).collect())
}

impl Scene {
    /// Starts the stand-ins; agent and adaptor are started one by one.
    ///
    /// # Errors
    /// A stand-in can't start, or the binaries can't be built.
    pub async fn new(options: SceneOptions) -> Result<Self> {
        let binaries = ensure_built().await?;
        let directory = tempfile::Builder::new().prefix("secure-comms-").tempdir()?;
        let kbs = Kbs::start(options.kbs.clone()).await?;
        let kbs_inbound = free_port()?;
        let scheme = if kbs.ca_pem().is_some() { "https" } else { "http" };
        let mut cdh = CdhOptions::new(format!("{scheme}://{kbs_inbound}"));
        cdh.ca_pem = kbs.ca_pem().map(ToOwned::to_owned);
        let cdh = Arc::new(Cdh::new(cdh)?);
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        if !options.user_data {
            // As the cloud writes it for a pod that gets its keys elsewhere.
            std::fs::write(directory.path().join("apf.json"), "{}")?;
        }
        Ok(Self {
            guest: Rest::start(any, Backend::Local(cdh.clone())).await?,
            kata: KataAgent::unix(directory.path().join("kata.sock"))?,
            vm_service: KataAgent::tcp(any).await?,
            node_service: KataAgent::tcp(any).await?,
            ssh: free_port()?,
            node_inbound: free_port()?,
            deadline: 110,
            inbounds: "KUBERNETES_PHASE:VMSERVICE:0".to_owned(),
            kata_socket: directory.path().join("kata.sock"),
            pod_namespace: String::new(),
            pod: pod_id()?,
            directory,
            binaries,
            options,
            kbs,
            cdh,
            kbs_inbound,
        })
    }

    /// A file of the scene.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The binaries.
    pub fn binaries(&self) -> &Binaries {
        self.binaries
    }

    /// The agent's command line.
    ///
    /// # Errors
    /// A server of the scene has no address.
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
            .arg("-secure-comms-guest-api")
            .arg(self.guest.addr().to_string())
            .arg("-secure-comms-inbounds")
            .arg(format!(
                "BOTH_PHASES:KBS:{},KUBERNETES_PHASE:NODESERVICE:{}",
                self.kbs_inbound.port(),
                self.node_inbound.port()
            ))
            .arg("-secure-comms-outbounds")
            .arg(format!("KUBERNETES_PHASE:VMSERVICE:{service}"));
        Ok(command)
    }

    /// Starts the agent and waits until it listens.
    ///
    /// # Errors
    /// It does not.
    pub async fn agent(&self) -> Result<Child> {
        let agent = Child::spawn("agent", self.agent_command()?)?;
        agent.wait_for_text("inbound NODESERVICE listens on", PATIENCE).await?;
        Ok(agent)
    }

    /// The adaptor's command line, for an agent at `addresses`.
    ///
    /// # Errors
    /// A file or a server of the scene is not there.
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
            .arg("--store")
            .arg(self.path("store"))
            .arg("--outbounds")
            .arg(format!("KUBERNETES_PHASE:NODESERVICE:{service}"));
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
    /// It can't be started.
    pub fn adaptor(&self) -> Result<Child> {
        Child::spawn("adaptor", self.adaptor_command(&[self.ssh])?)
    }

    /// Starts the adaptor and waits until the pod's keys are at the KBS.
    ///
    /// # Errors
    /// They do not get there.
    pub async fn adaptor_with_keys_published(&self) -> Result<Child> {
        let adaptor = self.adaptor()?;
        adaptor.wait_for_text("inbound KATAAGENT listens on", PATIENCE).await?;
        Ok(adaptor)
    }

    /// Writes apf.json as the adaptor makes it for the pod.
    ///
    /// # Errors
    /// `user-data` fails.
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

/// Waits until the adaptor has the pod in the Kubernetes phase.
///
/// # Errors
/// It does not get there.
pub async fn up(adaptor: &Child) -> Result<()> {
    adaptor.wait_for_text("kubernetes phase up", PATIENCE).await.map(drop)
}

/// Where an inbound of the adaptor listens, from what it printed.
///
/// # Errors
/// It printed nothing of the kind.
pub async fn endpoint(process: &Child, tunnel: &str) -> Result<SocketAddr> {
    let words = format!("inbound {tunnel} listens on ");
    let line = process.wait_for_text(&words, PATIENCE).await?;
    let address = line.split(&words).nth(1).and_then(|rest| rest.split_whitespace().next());
    address.context("no address")?.parse().with_context(|| format!("an address in: {line}"))
}

/// Connects to an inbound of any other tunnel than the kata agent's.
///
/// # Errors
/// Nobody listens.
pub async fn client(address: SocketAddr) -> Result<TcpStream> {
    TcpStream::connect(address).await.with_context(|| format!("connecting to {address}"))
}

/// Connects to an inbound that leads to the kata agent: what passes there is in ttrpc frames.
///
/// # Errors
/// Nobody listens.
pub async fn kata_client(address: SocketAddr) -> Result<Framed<TcpStream>> {
    client(address).await.map(Framed::new)
}
