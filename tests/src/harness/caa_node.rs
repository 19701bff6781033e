//! A worker node with CAA in a network namespace of its own: the KBS, a stand-in CAA, and `secure-comms-adaptor serve`; its
//! VMs are those of a [`TestCloud`].

mod asks;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use secure_comms_tunnel::netns::Namespace;
use tempfile::TempDir;
use tokio::net::UnixDatagram;
use tokio::process::Command;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::harness::cloud::{TestCloud, nft};
use crate::harness::pod_networks::PodNetworks;
use crate::harness::process::{Child, ensure_built};
use crate::harness::scene::PATIENCE;
use crate::harness::shim::Shim;
use crate::harness::test_namespace::TestNamespace;
use crate::simulators::caa::{Caa, CaaOptions, Certificates, Line, OwnCertificates};
use crate::simulators::kbs::{Kbs, KbsOptions};

/// Pause of a loop that waits for what has no event.
const POLL: Duration = Duration::from_millis(20);
/// Where `serve` is monitored, by default.
const METRICS: &str = "127.0.0.1:15152";

/// Options of a node.
#[derive(Clone, Debug)]
pub struct NodeOptions {
    /// How long CAA dials a VM.
    pub proxy_timeout: Duration,
    /// How long `serve` keeps a pod whose connection has ended, in seconds.
    pub grace: u32,
    /// CAA and `serve` have certificates of `caa-certs`.
    pub strict: bool,
    /// Port of the KBS; 0: any.
    pub kbs_port: u16,
    /// More lines of the settings' file of `serve`.
    pub settings: String,
}

impl Default for NodeOptions {
    fn default() -> Self {
        let proxy_timeout = Duration::from_secs(300);
        Self { proxy_timeout, grace: 2, strict: false, kbs_port: 0, settings: String::new() }
    }
}

/// The node. `serve` is started by the test.
#[derive(Debug)]
pub struct CaaNode {
    /// The CAA.
    pub caa: Caa,
    /// The cloud.
    pub cloud: Arc<TestCloud>,
    /// The KBS.
    pub kbs: Kbs,
    /// The node's network namespace.
    pub namespace: Arc<TestNamespace>,
    options: NodeOptions,
    directory: TempDir,
}

impl CaaNode {
    /// A node without pods.
    ///
    /// # Errors
    /// If a step fails; names it.
    pub async fn new(mut options: NodeOptions) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("sc-").tempdir()?;
        let namespace = Arc::new(TestNamespace::new("node")?);
        let cloud = Arc::new(TestCloud::new(&namespace).await?);
        let inside = Some(Namespace::new(namespace.name()));
        let kbs = KbsOptions { namespace: inside.clone(), port: options.kbs_port, ..KbsOptions::default() };
        let kbs = Kbs::start(kbs).await?;
        let mut caa = CaaOptions {
            node: inside,
            proxy_timeout: options.proxy_timeout,
            ..CaaOptions::new(directory.path().join("peerpod"))
        };
        let caa = if options.strict {
            let certificates = directory.path().join("certificates");
            caa.certificates = Certificates::Own(make_certificates(&certificates).await?);
            options.settings += &format!("certificates = {certificates:?}\n");
            Caa::start(caa, Arc::new(PodNetworks::new(cloud.clone(), namespace.clone()))).await?
        } else {
            Caa::start(caa, cloud.clone()).await?
        };
        Ok(Self { caa, cloud, kbs, namespace, options, directory })
    }

    /// A file or directory of the node.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The shim of a new pod of this name.
    ///
    /// # Errors
    /// If the system has no randomness.
    pub fn shim(&self, name: &str) -> Result<Shim> {
        Shim::new(self.caa.socket(), name)
    }

    /// `StartVM` in a task, and the state of CAA's connection to the VM.
    ///
    /// # Errors
    /// If it does not dial.
    pub async fn start(&self, shim: &Shim) -> Result<Starting> {
        let start = shim.clone();
        let mut started = JoinSet::new();
        started.spawn(async move { start.start_vm().await });
        let dials = async {
            loop {
                if let Ok(line) = self.caa.line(&shim.id) {
                    return anyhow::Ok(line);
                }
                if let Some(ended) = started.try_join_next() {
                    ended??;
                    bail!("StartVM ended without a dial");
                }
                tokio::time::sleep(POLL).await;
            }
        };
        let line = timeout(PATIENCE, dials).await.context("CAA does not dial")??;
        Ok(Starting { started, line })
    }

    /// As [`CaaNode::start`], of a VM that does not boot; returns once the handshake is held.
    ///
    /// # Errors
    /// If it is not held.
    pub async fn start_held(&self, shim: &Shim) -> Result<Starting> {
        self.cloud.boots(false);
        let mut starting = self.start(shim).await?;
        self.cloud.boots(true);
        starting.is("held", |line| matches!(line, Line::Held(_))).await?;
        Ok(starting)
    }

    /// Command line of `serve`.
    ///
    /// # Errors
    /// If its files can't be written, or the binaries can't be built.
    pub async fn serve_command(&self) -> Result<Command> {
        let admin_key = self.path("kbs-admin.pem");
        if !admin_key.exists() {
            use std::io::Write;
            use std::os::unix::fs::OpenOptionsExt;
            let mut options = std::fs::OpenOptions::new();
            let mut file = options.write(true).create_new(true).mode(0o600).open(&admin_key)?;
            file.write_all(self.kbs.admin_key_pem().as_bytes())?;
        }
        let file = self.path("adaptor.toml");
        let lines = format!(
            "store = {:?}\nrun-dir = {:?}\npods-directory = {:?}\nkbs = \"{}\"\nkbs-url = \"{}\"\n\
             kbs-admin-key = {admin_key:?}\nmetrics-listen = \"{METRICS}\"\ngrace = \"{}s\"\n{}",
            self.path("store"),
            self.path("run"),
            self.caa.directory(""),
            self.kbs.addr(),
            self.kbs.url(),
            self.options.grace,
            self.options.settings,
        );
        std::fs::write(&file, lines)?;
        let mut command = self.namespace.command(&ensure_built().await?.adaptor);
        command.arg("serve").arg("--config").arg(file);
        Ok(command)
    }

    /// Starts `serve` and waits until it says that it is ready.
    ///
    /// # Errors
    /// If it does not, with its log.
    pub async fn serve(&self) -> Result<Child> {
        let path = self.path("notify");
        // Of an earlier one, which may not exist.
        let _ = std::fs::remove_file(&path);
        let notify = UnixDatagram::bind(&path)?;
        let mut command = self.serve_command().await?;
        command.env("NOTIFY_SOCKET", &path);
        let serve = Child::spawn("serve", command)?;
        let ready = async {
            let mut message = [0; 4096];
            loop {
                let size = notify.recv(&mut message).await?;
                let text = String::from_utf8_lossy(message.get(..size).unwrap_or_default()).into_owned();
                if text.lines().any(|line| line == "READY=1") {
                    return anyhow::Ok(());
                }
            }
        };
        let ready = timeout(PATIENCE, ready).await;
        ready.with_context(|| format!("serve does not get ready\n{}", serve.log()))??;
        Ok(serve)
    }

    /// Waits until the KBS has no key of the pod, the store nothing, and the API does not list it.
    ///
    /// # Errors
    /// If something stays.
    pub async fn forgets(&self, id: &str) -> Result<()> {
        self.leaves_nothing(id).await?;
        let path = format!("/v1/pods/{id}");
        let unlisted = async {
            while self.api("GET", &path).await?.0 != 404 {
                tokio::time::sleep(POLL).await;
            }
            anyhow::Ok(())
        };
        timeout(PATIENCE, unlisted).await.with_context(|| format!("the API goes on listing {id}"))?
    }

    /// Waits until the KBS has no key of the pod, and the store nothing.
    ///
    /// # Errors
    /// If something stays.
    pub async fn leaves_nothing(&self, id: &str) -> Result<()> {
        let gone = async {
            while self.kbs.resource(&format!("default/pp-{id}/keys")).is_some() || self.stored(id) {
                tokio::time::sleep(POLL).await;
            }
        };
        match timeout(PATIENCE, gone).await {
            Ok(()) => Ok(()),
            Err(_) => bail!("{id}: in the store: {}; requests: {:?}", self.stored(id), self.kbs.requests()),
        }
    }

    /// Whether the store has the keys of a pod.
    #[must_use]
    pub fn stored(&self, id: &str) -> bool {
        self.path("store").join("pods").join(id).exists()
    }

    /// Runs nftables on the node.
    ///
    /// # Errors
    /// If it refuses the rules.
    pub async fn nft(&self, rules: &str) -> Result<()> {
        nft(&self.namespace, rules).await
    }
}

/// Certificates as the operator makes them for CAA.
async fn make_certificates(directory: &Path) -> Result<OwnCertificates> {
    let mut command = Command::new(&ensure_built().await?.adaptor);
    let output = command.arg("caa-certs").arg(directory).output().await?;
    ensure!(output.status.success(), "caa-certs: {}", String::from_utf8_lossy(&output.stderr));
    let read = |name: &str| {
        std::fs::read_to_string(directory.join(name)).with_context(|| format!("caa-certs made no {name}"))
    };
    Ok(OwnCertificates { ca: read("ca.crt")?, certificate: read("client.crt")?, key: read("client.key")? })
}

/// A `StartVM` under way.
#[derive(Debug)]
pub struct Starting {
    started: JoinSet<Result<()>>,
    /// CAA's connection to the VM.
    pub line: watch::Receiver<Line>,
}

impl Starting {
    /// Waits for a state of the connection.
    ///
    /// # Errors
    /// If it does not get there; names the state as `what`.
    pub async fn is(&mut self, what: &str, wanted: impl FnMut(&Line) -> bool) -> Result<()> {
        let reached = timeout(PATIENCE, self.line.wait_for(wanted)).await.is_ok_and(|state| state.is_ok());
        ensure!(reached, "CAA's connection does not get {what}: {:?}", self.line.borrow().clone());
        Ok(())
    }

    /// Waits for `StartVM`.
    ///
    /// # Errors
    /// If it fails or hangs.
    pub async fn started(mut self) -> Result<()> {
        let started = timeout(PATIENCE, self.started.join_next()).await.context("StartVM hangs")?;
        started.context("StartVM ended twice")??
    }
}
