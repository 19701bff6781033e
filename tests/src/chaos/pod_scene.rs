//! A pod with all around it, over a proxy or a line: its stand-ins run here, agent and adaptor are processes.

use std::ffi::OsString;
use std::io::Write as _;
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use secure_comms_protocol::limits::SSH_PORT;
use tempfile::TempDir;
use tokio::process::Command;
use tokio::sync::Mutex;

use super::disk::Disk;
use super::program::Program;
use super::script::{Fault, Hit, Script, Side};
use crate::harness::process::{Binaries, ensure_built};
use crate::harness::scene::{free_port, pod_id};
use crate::simulators::guest::{Backend, Cdh, CdhOptions, Rest};
use crate::simulators::impaired_link::{Impairment, ImpairedLink};
use crate::simulators::kata::KataAgent;
use crate::simulators::kbs::{Kbs, KbsOptions};
use crate::simulators::tcp_proxy::TcpProxy;

/// The last part of the address that the VM may move to.
pub const MOVED: u8 = 3;
/// What the names of this process's directories begin with.
#[must_use]
pub fn prefix() -> String {
    format!("secure-comms-chaos-{}-", std::process::id())
}

/// A port that was just closed may take a moment.
const PORT_TRIES: usize = 500;
const PORT_PAUSE: Duration = Duration::from_millis(10);

/// The pod and what is around it.
#[derive(Debug)]
pub struct PodScene {
    /// In the order in which they are dropped: processes first, what they use after them.
    pub agent: Program,
    /// At the worker node.
    pub adaptor: Program,
    /// What lies between.
    pub route: Route,
    /// Trustee's key broker.
    pub kbs: Kbs,
    /// The pod's id.
    pub pod: String,
    /// Where the kata agent's clients connect.
    pub kata_inbound: SocketAddr,
    /// Where clients of `VMSERVICE` connect.
    pub vm_inbound: SocketAddr,
    /// Where clients of `NODESERVICE` in the VM connect.
    pub node_inbound: SocketAddr,
    /// Where clients of `EARLY` in the VM connect: a tunnel of the Attestation phase.
    pub early_inbound: SocketAddr,
    /// The servers of the Kubernetes phase's tunnels that must not be reached before it, and of the one that must not
    /// be reached in it.
    pub kata: Server,
    /// In the VM.
    pub vm_service: Server,
    /// At the worker node.
    pub node_service: Server,
    /// At the worker node.
    pub early: Server,
    /// `api-server-rest`.
    pub rest: Mutex<Option<Rest>>,
    rest_address: SocketAddr,
    cdh: Arc<Cdh>,
    /// The adaptor's disk.
    pub store: Disk,
    /// The agent's disk.
    pub state: Disk,
    clocks: Arc<Clocks>,
    directory: TempDir,
}

/// What lies between worker node and VM.
#[derive(Debug)]
pub enum Route {
    /// And where the agent is.
    Proxy(TcpProxy, SocketAddr),
    /// With its end `b` in the VM; what is set now.
    ImpairedLink(Box<Mutex<ImpairedLink>>, std::sync::Mutex<Impairment>),
}

/// Seconds that the monotonic clocks of the processes are ahead, once started anew.
#[derive(Debug, Default)]
struct Clocks {
    agent: AtomicU32,
    adaptor: AtomicU32,
}

/// A stand-in on a unix socket that can be gone for a while.
#[derive(Debug)]
pub struct Server {
    path: PathBuf,
    running: Mutex<Option<KataAgent>>,
    /// Connections of those that have been.
    before: AtomicU64,
}

impl Server {
    fn start(path: PathBuf) -> Result<Self> {
        let running = Mutex::new(Some(KataAgent::unix(&path)?));
        Ok(Self { path, running, before: AtomicU64::new(0) })
    }

    /// Ends it.
    pub async fn end(&self) {
        if let Some(server) = self.running.lock().await.take() {
            self.before.fetch_add(server.connections(), Ordering::Relaxed);
        }
    }

    /// Starts it again.
    ///
    /// # Errors
    /// The socket can't be bound.
    pub async fn begin(&self) -> Result<()> {
        *self.running.lock().await = Some(KataAgent::unix(&self.path)?);
        Ok(())
    }

    /// How often it was reached.
    pub async fn connections(&self) -> u64 {
        let now = self.running.lock().await.as_ref().map_or(0, KataAgent::connections);
        self.before.load(Ordering::Relaxed) + now
    }
}

impl PodScene {
    /// Starts everything; with faults that come in the Attestation phase, the KBS refuses the VM its keys.
    ///
    /// # Errors
    /// A stand-in or a process can't be started.
    pub async fn new(script: &Script) -> Result<Self> {
        let binaries = ensure_built().await?;
        let directory = tempfile::Builder::new().prefix(&prefix()).tempdir()?;
        let path = |name: &str| directory.path().join(name);
        let (route, mut options) = Route::new(script).await?;
        options.https = script.https;
        let kbs = Kbs::start(options).await?;
        let pod = pod_id()?;
        if let Hit::Attestation(_) = script.hit {
            kbs.deny(&format!("default/pp-{pod}/privateKey"));
        }
        let kbs_inbound = free_port()?;
        let cdh = Arc::new(cdh(&kbs, kbs_inbound)?);
        let rest = Rest::start(free_port()?, Backend::Local(Arc::clone(&cdh))).await?;
        let rest_address = rest.addr();
        let ports = [free_port()?, free_port()?, free_port()?, free_port()?];
        let [kata_inbound, vm_inbound, node_inbound, early_inbound] = ports;
        let (store, state) = (Disk::mount(path("store"))?, Disk::mount(path("state"))?);
        std::fs::write(path("apf.json"), "{}").context("writing the VM's daemon config")?;
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
            rest: Mutex::new(Some(rest)),
            rest_address,
            cdh,
            store,
            state,
            clocks,
            directory,
        })
    }

    /// Where its files are.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// One of the two processes under test.
    #[must_use]
    pub fn program(&self, side: Side) -> &Program {
        match side {
            Side::Agent => &self.agent,
            Side::Adaptor => &self.adaptor,
        }
    }

    /// Sets how far ahead the monotonic clock of a process is once it is started anew.
    pub fn set_clock(&self, side: Side, seconds: u32) {
        self.clocks.of(side).store(seconds, Ordering::Relaxed);
    }

    /// The KBS lets the VM have its keys.
    pub fn release_keys(&self) {
        self.kbs.allow(&format!("default/pp-{}/privateKey", self.pod));
    }

    /// Starts `api-server-rest` again.
    ///
    /// # Errors
    /// Its port stays taken.
    pub async fn begin_rest(&self) -> Result<()> {
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
struct Common {
    binaries: &'static Binaries,
    directory: PathBuf,
    clocks: Arc<Clocks>,
}

impl Common {
    fn program(&self, side: Side, netns: Option<String>, args: Vec<OsString>) -> Result<Program> {
        let (name, binary) = match side {
            Side::Agent => ("agent", self.binaries.agent.clone()),
            Side::Adaptor => ("adaptor", self.binaries.adaptor.clone()),
        };
        let (clocks, directory) = (Arc::clone(&self.clocks), self.directory.clone());
        let make = move || {
            let ahead = clocks.of(side).load(Ordering::Relaxed);
            // Each of these becomes the next, so that the pid is that of the last. Core dumps, if any, are to be seen.
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
        let line = ImpairedLink::new(script.seed, Impairment::default()).await?;
        kbs.namespace = Some(line.a.namespace());
        Ok((Self::ImpairedLink(Box::new(Mutex::new(line)), std::sync::Mutex::default()), kbs))
    }

    /// Where the agent listens.
    fn listen(&self) -> String {
        match self {
            Self::Proxy(_, agent) => agent.to_string(),
            Self::ImpairedLink(..) => format!("[::]:{SSH_PORT}"),
        }
    }

    /// Where the adaptor looks for it.
    async fn addresses(&self, script: &Script) -> Vec<SocketAddr> {
        match self {
            Self::Proxy(proxy, _) => vec![proxy.address()],
            Self::ImpairedLink(line, _) => {
                let first = line.lock().await.b.address;
                let moved = script.has(|fault| *fault == Fault::Move);
                let other = moved.then(|| SocketAddr::from(([10, 99, 0, MOVED], SSH_PORT)));
                std::iter::once(SocketAddr::new(first, SSH_PORT)).chain(other).collect()
            }
        }
    }

    async fn namespace(&self, side: Side) -> Option<String> {
        let Self::ImpairedLink(line, _) = self else { return None };
        let line = line.lock().await;
        let end = if side == Side::Agent { &line.b } else { &line.a };
        Some(end.netns.name().to_owned())
    }
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
