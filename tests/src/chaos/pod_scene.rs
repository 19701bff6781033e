//! One pod over a TCP proxy or an impaired link. Its simulators run here; agent and adaptor are processes.

use std::ffi::OsString;
use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use secure_comms_protocol::limits::SSH_PORT;
use secure_comms_protocol::{PodId, resource};
use tempfile::TempDir;
use tokio::process::Command;
use tokio::sync::Mutex;

use super::disk::Disk;
use super::hostile_cloud::HostileCloud;
use super::program::Program;
use super::script::{Fault, Hit, Script, Side};
use crate::harness::process::Binaries;
use crate::harness::scene::{free_port, pod_id};
use crate::simulators::guest::{Backend, Cdh, CdhOptions, Rest};
use crate::simulators::impaired_link::{ImpairedLink, Impairment};
use crate::simulators::kata::KataAgent;
use crate::simulators::kbs::{Kbs, KbsOptions};
use crate::simulators::tcp_proxy::TcpProxy;

/// Last part of the address that the VM may move to.
pub(super) const MOVED: u8 = 3;
/// Prefix of this process's directories.
#[must_use]
pub(super) fn prefix() -> String {
    format!("secure-comms-chaos-{}-", std::process::id())
}

/// Retries for a port that was just closed.
const PORT_TRIES: usize = 500;
const PORT_PAUSE: Duration = Duration::from_millis(10);

/// The pod and everything around it.
#[derive(Debug)]
pub(super) struct PodScene {
    /// Fields are dropped in this order: processes first, then what they use.
    ///
    /// The agent, in the VM.
    pub agent: Program,
    /// The adaptor, at the worker node.
    pub adaptor: Program,
    /// Path between worker node and VM.
    pub route: Route,
    /// Key broker.
    pub kbs: Kbs,
    /// Id of the pod.
    pub pod: String,
    /// Inbound of the kata agent's clients.
    pub kata_inbound: SocketAddr,
    /// Inbound of `VMSERVICE`.
    pub vm_inbound: SocketAddr,
    /// Inbound of `NODESERVICE`, in the VM.
    pub node_inbound: SocketAddr,
    /// Inbound of `EARLY`, in the VM: a tunnel of the Attestation phase.
    pub early_inbound: SocketAddr,
    /// Servers behind the tunnels of the Kubernetes phase, which must not be reached before it, and behind `EARLY`,
    /// which must not be reached in it.
    pub kata: Server,
    /// Server of `VMSERVICE`, in the VM.
    pub vm_service: Server,
    /// Server of `NODESERVICE`, at the worker node.
    pub node_service: Server,
    /// Server of `EARLY`, at the worker node.
    pub early: Server,
    /// Server of the attacker, in the VM: hostile user data leads there.
    pub bait: KataAgent,
    /// Keys of the attacker.
    pub cloud: HostileCloud,
    /// `api-server-rest`.
    pub rest: Mutex<Option<Rest>>,
    rest_address: SocketAddr,
    cdh: Arc<Cdh>,
    /// Disk of the adaptor.
    pub store: Disk,
    /// Disk of the agent.
    pub state: Disk,
    clocks: Arc<Clocks>,
    directory: TempDir,
}

/// Path between worker node and VM.
#[derive(Debug)]
pub(super) enum Route {
    /// A TCP proxy on loopback, and the address of the agent.
    Proxy(TcpProxy, SocketAddr),
    /// An impaired link, with its end `b` in the VM, and its current impairment.
    ImpairedLink(Box<Mutex<ImpairedLink>>, std::sync::Mutex<Impairment>),
}

/// Seconds that the monotonic clocks of agent and adaptor are ahead from their next start on.
#[derive(Debug, Default)]
struct Clocks {
    agent: AtomicU32,
    adaptor: AtomicU32,
}

/// A simulator on a unix socket that can be absent for a while.
#[derive(Debug)]
pub(super) struct Server {
    path: PathBuf,
    running: Mutex<Option<KataAgent>>,
    /// Connections of earlier runs of the simulator.
    before: AtomicU64,
}

impl Server {
    fn start(path: PathBuf) -> Result<Self> {
        let running = Mutex::new(Some(KataAgent::unix(&path)?));
        Ok(Self { path, running, before: AtomicU64::new(0) })
    }

    /// Stops it.
    pub(super) async fn end(&self) {
        if let Some(server) = self.running.lock().await.take() {
            self.before.fetch_add(server.connections(), Ordering::Relaxed);
        }
    }

    /// Starts it again.
    ///
    /// # Errors
    /// If the socket can't be bound.
    pub(super) async fn begin(&self) -> Result<()> {
        *self.running.lock().await = Some(KataAgent::unix(&self.path)?);
        Ok(())
    }

    /// Number of connections so far.
    pub(super) async fn connections(&self) -> u64 {
        let now = self.running.lock().await.as_ref().map_or(0, KataAgent::connections);
        self.before.load(Ordering::Relaxed) + now
    }
}

impl PodScene {
    /// Starts everything, with these programs. If the faults hit the Attestation phase, the KBS refuses the keys at first.
    ///
    /// # Errors
    /// If a simulator or a process can't be started.
    pub(super) async fn new(script: &Script, binaries: &Binaries) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix(&prefix()).tempdir()?;
        let path = |name: &str| directory.path().join(name);
        let (route, mut options) = Route::new(script).await?;
        options.https = script.https;
        let kbs = Kbs::start(options).await?;
        let pod = pod_id()?;
        if let Hit::Attestation(_) = script.hit {
            kbs.deny(&keys_path(&pod)?);
        }
        let kbs_inbound = free_port()?;
        let cdh = Arc::new(cdh(&kbs, kbs_inbound)?);
        let rest = Rest::start(free_port()?, Backend::Local(Arc::clone(&cdh))).await?;
        let rest_address = rest.addr();
        let ports = [free_port()?, free_port()?, free_port()?, free_port()?];
        let [kata_inbound, vm_inbound, node_inbound, early_inbound] = ports;
        let (store, state) = (Disk::mount(path("store"))?, Disk::mount(path("state"))?);
        let cloud = HostileCloud::new(directory.path()).await?;
        let bait = KataAgent::tcp(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).await?;
        let bait_address = bait.addr().context("the attacker's server listens on TCP")?;
        let user_data = cloud.user_data(script.user_data, directory.path(), bait_address);
        std::fs::write(path("apf.json"), user_data).context("writing the VM's daemon config")?;
        write_private(&path("kbs-admin.pem"), kbs.admin_key_pem())?;
        if let Some(ca) = kbs.ca_pem() {
            std::fs::write(path("kbs-ca.pem"), ca).context("writing the CA of the KBS")?;
        }

        let clocks = Arc::<Clocks>::default();
        let common = Common { binaries, directory: directory.path().to_owned(), clocks: Arc::clone(&clocks) };
        let agent = {
            let here = format!("/proc/{}/ns/net", std::process::id());
            let port = |address: SocketAddr| format!("{here}:{}", address.port());
            let inbounds = format!(
                "BOTH_PHASES:KBS:{},KUBERNETES_PHASE:NODESERVICE:{},ATTESTATION_PHASE:EARLY:{}",
                port(kbs_inbound),
                port(node_inbound),
                port(early_inbound)
            );
            let mut args: Vec<OsString> = ["-secure-comms", "-secure-comms-listen"].map(Into::into).into();
            args.push(route.listen().into());
            args.extend(["-pod-namespace", &here, "-secure-comms-inbounds", &inbounds].map(Into::into));
            args.extend(["-secure-comms-guest-api".into(), rest_address.to_string().into()]);
            args.extend(["-config".into(), path("apf.json").into()]);
            args.extend(["-kata-agent-socket".into(), path("kata.sock").into()]);
            args.extend(["-secure-comms-state-dir".into(), path("state").into()]);
            args.push("-secure-comms-state-dir-on-disk".into());
            let service = format!("KUBERNETES_PHASE:VMSERVICE:{}", path("vm.sock").display());
            args.extend(["-secure-comms-outbounds".into(), service.into()]);
            common.program(Side::Agent, route.namespace(Side::Agent).await, args)?
        };
        let adaptor = {
            let here = format!("/proc/{}/ns/net", std::process::id());
            let port = |address: SocketAddr| format!("{here}:{}", address.port());
            let inbounds = format!(
                "KUBERNETES_PHASE:KATAAGENT:{},KUBERNETES_PHASE:VMSERVICE:{}",
                port(kata_inbound),
                port(vm_inbound)
            );
            let outbounds = format!(
                "KUBERNETES_PHASE:NODESERVICE:{},ATTESTATION_PHASE:EARLY:{}",
                path("node.sock").display(),
                path("early.sock").display()
            );
            let mut args: Vec<OsString> = ["connect", "--pod-id", &pod].map(Into::into).into();
            for address in route.addresses(script).await {
                args.extend(["--address".into(), address.to_string().into()]);
            }
            args.extend(["--inbounds".into(), inbounds.into(), "--outbounds".into(), outbounds.into()]);
            let agent = (
                format!(
                    "BOTH_PHASES:KBS:{here}:0,KUBERNETES_PHASE:NODESERVICE:{here}:0,ATTESTATION_PHASE:EARLY:{here}:0"
                ),
                format!("KUBERNETES_PHASE:VMSERVICE:{}", path("vm.sock").display()),
            );
            args.extend(["--pp-inbounds".into(), agent.0.into(), "--pp-outbounds".into(), agent.1.into()]);
            args.extend(["--kata-agent-socket".into(), path("kata.sock").into()]);
            args.extend(["--run-dir".into(), path("run").into()]);
            args.extend(["--store".into(), path("store").into(), "--deadline".into(), "600".into()]);
            args.extend([
                "--kbs".into(),
                kbs.addr().to_string().into(),
                "--kbs-url".into(),
                kbs.url().into(),
            ]);
            args.extend(["--kbs-admin-key".into(), path("kbs-admin.pem").into()]);
            if kbs.ca_pem().is_some() {
                args.extend(["--kbs-ca".into(), path("kbs-ca.pem").into()]);
            }
            common.program(Side::Adaptor, route.namespace(Side::Adaptor).await, args)?
        };
        Ok(Self {
            agent,
            adaptor,
            route,
            kbs,
            pod,
            kata_inbound,
            vm_inbound,
            node_inbound,
            early_inbound,
            kata: Server::start(path("kata.sock"))?,
            vm_service: Server::start(path("vm.sock"))?,
            node_service: Server::start(path("node.sock"))?,
            early: Server::start(path("early.sock"))?,
            bait,
            cloud,
            rest: Mutex::new(Some(rest)),
            rest_address,
            cdh,
            store,
            state,
            clocks,
            directory,
        })
    }

    /// Directory of its files.
    #[must_use]
    pub(super) fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The process under test at one side.
    #[must_use]
    pub(super) fn program(&self, side: Side) -> &Program {
        match side {
            Side::Agent => &self.agent,
            Side::Adaptor => &self.adaptor,
        }
    }

    /// Sets how far ahead a process's monotonic clock is from its next start on, in seconds.
    pub(super) fn set_clock(&self, side: Side, seconds: u32) {
        self.clocks.of(side).store(seconds, Ordering::Relaxed);
    }

    /// Makes the KBS release the keys to the VM.
    ///
    /// # Errors
    /// If the pod has no valid id.
    pub(super) fn release_keys(&self) -> Result<()> {
        self.kbs.allow(&keys_path(&self.pod)?);
        Ok(())
    }

    /// Whether the pod's keys are at the KBS.
    ///
    /// # Errors
    /// If the pod has no valid id.
    pub(super) fn has_published_keys(&self) -> Result<bool> {
        // A KBS that can't delete holds an empty body instead.
        Ok(self.kbs.resource(&keys_path(&self.pod)?).is_some_and(|body| !body.is_empty()))
    }

    /// Starts `api-server-rest` again.
    ///
    /// # Errors
    /// If its port stays taken.
    pub(super) async fn begin_rest(&self) -> Result<()> {
        for _ in 0..PORT_TRIES {
            if let Ok(rest) = Rest::start(self.rest_address, Backend::Local(Arc::clone(&self.cdh))).await {
                *self.rest.lock().await = Some(rest);
                return Ok(());
            }
            tokio::time::sleep(PORT_PAUSE).await;
        }
        anyhow::bail!("{}: taken", self.rest_address)
    }
}

impl Clocks {
    fn of(&self, side: Side) -> &AtomicU32 {
        match side {
            Side::Agent => &self.agent,
            Side::Adaptor => &self.adaptor,
        }
    }
}

/// What the command lines of both processes have in common.
struct Common<'a> {
    binaries: &'a Binaries,
    directory: PathBuf,
    clocks: Arc<Clocks>,
}

impl Common<'_> {
    fn program(&self, side: Side, netns: Option<String>, args: Vec<OsString>) -> Result<Program> {
        let (name, binary) = match side {
            Side::Agent => ("agent", self.binaries.agent.clone()),
            Side::Adaptor => ("adaptor", self.binaries.adaptor.clone()),
        };
        let (clocks, directory) = (Arc::clone(&self.clocks), self.directory.clone());
        let make = move || {
            let ahead = clocks.of(side).load(Ordering::Relaxed);
            // Each of these programs replaces itself by the next: the pid is that of the last. Core dumps are allowed, to be found.
            let mut words: Vec<OsString> = Vec::new();
            if let Some(netns) = &netns {
                words.extend(["ip", "netns", "exec", netns].map(Into::into));
            }
            words.extend(["prlimit", "--core=unlimited"].map(Into::into));
            if ahead > 0 {
                words.extend(["unshare", "--time"].map(Into::into));
                words.extend([format!("--monotonic={ahead}"), format!("--boottime={ahead}")].map(Into::into));
            }
            words.push(binary.clone().into());
            let mut words = words.into_iter();
            let mut command = Command::new(words.next().context("there is a program")?);
            command.args(words).args(&args).current_dir(&directory);
            Ok(command)
        };
        Program::start(name, Box::new(make))
    }
}

impl Route {
    async fn new(script: &Script) -> Result<(Self, KbsOptions)> {
        let mut kbs = KbsOptions { port: free_port()?.port(), ..KbsOptions::default() };
        if script.path == super::script::Path::Proxy {
            let agent = free_port()?;
            return Ok((Self::Proxy(TcpProxy::to(agent).await?, agent), kbs));
        }
        let link = ImpairedLink::new(script.seed, Impairment::default()).await?;
        kbs.namespace = Some(link.a.namespace());
        Ok((Self::ImpairedLink(Box::new(Mutex::new(link)), std::sync::Mutex::default()), kbs))
    }

    /// Address that the agent listens on.
    fn listen(&self) -> String {
        match self {
            Self::Proxy(_, agent) => agent.to_string(),
            Self::ImpairedLink(..) => format!("[::]:{SSH_PORT}"),
        }
    }

    /// Addresses at which the adaptor looks for the agent.
    async fn addresses(&self, script: &Script) -> Vec<SocketAddr> {
        match self {
            Self::Proxy(proxy, _) => vec![proxy.address()],
            Self::ImpairedLink(link, _) => {
                let first = link.lock().await.b.address;
                let moved = script.has(|fault| *fault == Fault::Move);
                let other = moved.then(|| SocketAddr::from(([10, 99, 0, MOVED], SSH_PORT)));
                std::iter::once(SocketAddr::new(first, SSH_PORT)).chain(other).collect()
            }
        }
    }

    async fn namespace(&self, side: Side) -> Option<String> {
        let Self::ImpairedLink(link, _) = self else { return None };
        let link = link.lock().await;
        let end = if side == Side::Agent { &link.b } else { &link.a };
        Some(end.netns.name().to_owned())
    }
}

/// The resource of a pod for which no init-data is expected.
fn keys_path(pod: &str) -> Result<String> {
    let pod: PodId = pod.parse().with_context(|| format!("'{pod}'"))?;
    Ok(resource::pod_keys(&pod, None))
}

fn cdh(kbs: &Kbs, inbound: SocketAddr) -> Result<Cdh> {
    let scheme = if kbs.ca_pem().is_some() { "https" } else { "http" };
    let mut options = CdhOptions::new(format!("{scheme}://{inbound}"));
    options.ca_pem = kbs.ca_pem().map(ToOwned::to_owned);
    Cdh::new(options)
}

fn write_private(path: &Path, text: &str) -> Result<()> {
    let mut options = std::fs::OpenOptions::new();
    let mut file = options.write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes()).with_context(|| format!("writing {}", path.display()))
}
