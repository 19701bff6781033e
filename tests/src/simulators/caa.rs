//! Simulates cloud-api-adaptor (CAA) v0.22 as the node's service meets it: the remote hypervisor protocol towards the runtime,
//! the pods directory, and one TLS connection to the forwarder of each pod VM. Its behaviour was seen with the real one:
//!
//! - `CreateVM` makes the TLS keys of the pod and writes `<pods>/<id>/apf.json` in place, mode 0644.
//! - `StartVM` creates the instance, listens on `<pods>/<id>/agent.ttrpc`, dials `<VM>:15150` until the proxy timeout, and
//!   answers once a TLS handshake is done. One attempt may wait inside the handshake until the proxy timeout.
//! - What the runtime sends to `agent.ttrpc` goes through that one connection, which is never dialled again.
//! - `StopVM` closes the connection, deletes the instance and unlinks `agent.ttrpc`. Directory and `apf.json` stay.
//! - `StopVM` during a handshake deletes the instance at once; the connection stays open until the proxy timeout.
//! - A `StartVM` whose caller has gone goes on dialling.
//!
//! It differs from the real one in this: bytes are relayed as they are, so it makes no edits of `CreateContainer`, and it serves
//! the first client of `agent.ttrpc` only.

pub mod apf;
pub mod forwarder;
pub mod name;
mod proxy;
pub mod service;
mod tls;

use std::collections::HashMap;
use std::io::ErrorKind;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use async_trait::async_trait;
use secure_comms_kata_api::api::hypervisor_ttrpc::create_hypervisor;
use secure_comms_kata_api::ttrpc::r#async::{Server, transport::Listener};
use secure_comms_tunnel::netns::Namespace;
use serde_json::Value;
use tokio::net::UnixListener;
use tokio::sync::watch;

pub use self::proxy::Line;
use self::proxy::Proxy;
use self::tls::Client;
pub use self::tls::{Certificates, OwnCertificates};

/// The port of the forwarder in a VM.
pub const FORWARDER_PORT: u16 = 15150;

/// Options of a CAA.
#[derive(Clone, Debug)]
pub struct CaaOptions {
    /// The directory in the place of `/run/peerpod`.
    pub directory: PathBuf,
    /// The node's network namespace; none: that of this process.
    pub node: Option<Namespace>,
    /// The port that it dials.
    pub forwarder_port: u16,
    /// How long it dials.
    pub proxy_timeout: Duration,
    /// The longest pause between two dials.
    pub backoff: Duration,
    /// Its TLS certificates.
    pub certificates: Certificates,
}

impl CaaOptions {
    /// The defaults, with this directory in the place of `/run/peerpod`.
    #[must_use]
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Self {
            directory: directory.into(),
            node: None,
            forwarder_port: FORWARDER_PORT,
            proxy_timeout: Duration::from_secs(300),
            backoff: Duration::from_secs(5),
            certificates: Certificates::PerPod,
        }
    }
}

/// A VM to create.
#[derive(Clone, Debug)]
pub struct Instance {
    /// The sandbox id.
    pub id: String,
    /// `apf.json` as it is in the VM, from user data.
    pub apf_json: Value,
}

/// The cloud in which VMs are created.
#[async_trait]
pub trait Cloud: Send + Sync + 'static {
    /// Creates a VM; returns its address once the cloud has one, before the VM has booted.
    async fn create(&self, instance: Instance) -> Result<IpAddr>;

    /// Deletes the VM of a sandbox; does nothing if there is none.
    async fn delete(&self, id: &str) -> Result<()>;
}

/// A running CAA. Dropping it is a `kill -9`: its connections end, its files stay.
pub struct Caa {
    shared: Arc<Shared>,
    socket: PathBuf,
    /// In a lock because it may be used by one thread at a time only.
    server: Mutex<Server>,
}

/// What the service and the tests share.
struct Shared {
    options: CaaOptions,
    cloud: Arc<dyn Cloud>,
    client: Client,
    sandboxes: Mutex<HashMap<String, Sandbox>>,
    /// Sandboxes so far.
    pods: AtomicU32,
    /// Of stopped sandboxes: they dial until their time is over.
    left: Mutex<Vec<Proxy>>,
}

/// A sandbox that this CAA knows.
struct Sandbox {
    server_name: String,
    apf_json: Value,
    directory: PathBuf,
    proxy: Option<Proxy>,
}

impl Caa {
    /// Starts a CAA that knows no sandbox. The socket of an earlier one is replaced.
    ///
    /// # Errors
    /// If its directory, its keys or its socket can't be made.
    pub async fn start(options: CaaOptions, cloud: Arc<dyn Cloud>) -> Result<Self> {
        let socket = options.directory.join("hypervisor.sock");
        std::fs::create_dir_all(options.directory.join("pods")).context("CAA: making the pods directory")?;
        match std::fs::remove_file(&socket) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(error).context("CAA: removing the socket of an earlier one");
            }
            _ => {}
        }
        let listener =
            UnixListener::bind(&socket).with_context(|| format!("CAA: binding {}", socket.display()))?;
        let client = Client::new(&options.certificates)?;
        let shared = Arc::new(Shared {
            options,
            cloud,
            client,
            sandboxes: Mutex::default(),
            pods: AtomicU32::new(1),
            left: Mutex::default(),
        });
        let service = create_hypervisor(Arc::new(service::Hypervisor(Arc::clone(&shared))));
        let mut server = Server::new().add_listener(Listener::from(listener)).register_service(service);
        server.start().await.context("CAA: starting its server")?;
        Ok(Self { shared, socket, server: Mutex::new(server) })
    }

    /// The socket of the remote hypervisor protocol.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The directory of a sandbox, whether or not it exists.
    #[must_use]
    pub fn directory(&self, id: &str) -> PathBuf {
        self.shared.directory(id)
    }

    /// The connection to the VM of a sandbox, from `StartVM` on.
    ///
    /// # Errors
    /// If the sandbox is unknown, or not started.
    pub fn line(&self, id: &str) -> Result<watch::Receiver<Line>> {
        let sandboxes = self.shared.sandboxes();
        let proxy = sandboxes.get(id).and_then(|sandbox| sandbox.proxy.as_ref());
        Ok(proxy.with_context(|| format!("CAA: no VM of {id} was started"))?.line())
    }

    /// The name that it asks the VM of a sandbox for.
    ///
    /// # Errors
    /// If the sandbox is unknown.
    pub fn server_name(&self, id: &str) -> Result<String> {
        let sandboxes = self.shared.sandboxes();
        Ok(sandboxes.get(id).with_context(|| format!("CAA: {id} is unknown"))?.server_name.clone())
    }

    /// Ends as by `kill -9`, and returns once its connections have ended. All files stay.
    ///
    /// # Errors
    /// If its server can't be stopped.
    pub async fn kill(self) -> Result<()> {
        let sandboxes = std::mem::take(&mut *self.shared.sandboxes());
        let left = std::mem::take(&mut *self.shared.left());
        let proxies = sandboxes.into_values().filter_map(|sandbox| sandbox.proxy);
        for proxy in proxies.chain(left) {
            proxy.kill().await;
        }
        let mut server = self.server.into_inner().unwrap_or_else(PoisonError::into_inner);
        server.shutdown().await.context("CAA: stopping its server")
    }
}

impl std::fmt::Debug for Caa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Caa").field("socket", &self.socket).finish_non_exhaustive()
    }
}

impl Shared {
    fn sandboxes(&self) -> MutexGuard<'_, HashMap<String, Sandbox>> {
        self.sandboxes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn left(&self) -> MutexGuard<'_, Vec<Proxy>> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn directory(&self, id: &str) -> PathBuf {
        self.options.directory.join("pods").join(id)
    }

    fn agent_socket(&self, id: &str) -> PathBuf {
        self.directory(id).join("agent.ttrpc")
    }

    /// `CreateVM`: makes the sandbox and its files; returns the agent's socket.
    fn create(&self, id: &str, namespace: &str, pod: &str) -> Result<PathBuf> {
        let pod = name::pod(pod);
        let keys = self.client.pod_keys(&name::server(&pod, id))?;
        let apf_json = apf::json(namespace, &pod, self.pods.fetch_add(1, Ordering::Relaxed), &keys);
        let directory = self.directory(id);
        let mut sandboxes = self.sandboxes();
        if sandboxes.contains_key(id) {
            bail!("sandbox {id} already exists");
        }
        std::fs::create_dir_all(&directory).context("CAA: making the directory of the sandbox")?;
        apf::write(&directory.join("apf.json"), &apf_json)?;
        let server_name = keys.server_name().to_owned();
        sandboxes.insert(id.to_owned(), Sandbox { server_name, apf_json, directory, proxy: None });
        Ok(self.agent_socket(id))
    }

    /// `StartVM`: creates the instance and returns once its forwarder has finished a TLS handshake.
    async fn start(&self, id: &str) -> Result<()> {
        let apf_json = {
            let sandboxes = self.sandboxes();
            let sandbox = sandboxes.get(id).with_context(|| format!("sandbox {id} does not exist"))?;
            sandbox.apf_json.clone()
        };
        let address = self.cloud.create(Instance { id: id.to_owned(), apf_json }).await?;
        let line = self.dial(id, address).await?;
        let Some(failure) = ended_before_up(line).await else { return Ok(()) };
        self.cloud.delete(id).await?;
        bail!("error dialing {address}: {failure}")
    }

    async fn dial(&self, id: &str, address: IpAddr) -> Result<watch::Receiver<Line>> {
        let socket = self.agent_socket(id);
        let listener = proxy::listen(self.options.node.as_ref(), &socket).await?;
        let mut sandboxes = self.sandboxes();
        let sandbox = sandboxes.get_mut(id).with_context(|| format!("sandbox {id} was stopped"))?;
        let tls = self.client.connector(&sandbox.server_name)?;
        let proxy = Proxy::start(&self.options, listener, address, tls);
        let line = proxy.line();
        sandbox.proxy = Some(proxy);
        Ok(line)
    }

    /// `StopVM`.
    async fn stop(&self, id: &str) -> Result<()> {
        let sandbox = self.sandboxes().remove(id).with_context(|| format!("sandbox {id} does not exist"))?;
        if let Some(mut proxy) = sandbox.proxy {
            if proxy.stop().await {
                let socket = sandbox.directory.join("agent.ttrpc");
                std::fs::remove_file(socket).context("unlinking agent.ttrpc")?;
            } else {
                // It goes on listening, and its socket stays.
                self.left().push(proxy);
            }
        }
        self.cloud.delete(id).await
    }
}

/// Waits for the handshake; returns why there is none.
async fn ended_before_up(mut line: watch::Receiver<Line>) -> Option<String> {
    match line.wait_for(|line| matches!(line, Line::Up | Line::Ended(_))).await.as_deref() {
        Ok(Line::Ended(reason)) => Some(reason.clone()),
        Ok(_) => None,
        Err(_) => Some("the proxy is gone".to_owned()),
    }
}
