//! The runtime's shim of a pod whose VM is made by a remote hypervisor: its calls, in their order and with their limits.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::net::UnixStream;
use tokio::time::timeout;

use crate::harness::drawn::pod_id;
use crate::harness::pod_runtime::PodRuntime;
use crate::simulators::caa::service::{POD_NAME, POD_NAMESPACE};
use crate::simulators::kata_api::api::hypervisor::{CreateVMRequest, StartVMRequest, StopVMRequest};
use crate::simulators::kata_api::api::hypervisor_ttrpc::HypervisorClient;
use crate::simulators::kata_api::ttrpc::r#async::Client;
use crate::simulators::kata_api::ttrpc::context::Context;

/// Limit of each call to the remote hypervisor.
const CALL_WITHIN: Duration = Duration::from_secs(600);
/// Bytes of a file that is copied before the first container is made.
const FILE: usize = 1024 * 1024;

/// The shim of a pod.
#[derive(Clone, Debug)]
pub struct Shim {
    hypervisor: PathBuf,
    /// The sandbox id.
    pub id: String,
    /// The pod's namespace in Kubernetes.
    pub namespace: String,
    /// The pod's name in Kubernetes.
    pub name: String,
}

impl Shim {
    /// The shim of a new pod of this name, for the remote hypervisor at this socket.
    ///
    /// # Errors
    /// If the system has no randomness.
    pub fn new(hypervisor: &Path, name: &str) -> Result<Self> {
        Ok(Self {
            hypervisor: hypervisor.to_owned(),
            id: pod_id()?,
            namespace: "default".to_owned(),
            name: name.to_owned(),
        })
    }

    /// `CreateVM`; returns the agent's socket, which does not exist yet.
    ///
    /// # Errors
    /// If the call fails or hangs.
    pub async fn create_vm(&self) -> Result<PathBuf> {
        let annotations = [(POD_NAME, &self.name), (POD_NAMESPACE, &self.namespace)];
        let request = CreateVMRequest {
            id: self.id.clone(),
            annotations: annotations.map(|(key, value)| (key.to_owned(), value.clone())).into(),
            networkNamespacePath: "/run/netns/cni-test".to_owned(),
            ..Default::default()
        };
        let client = self.client().await?;
        let created = timeout(CALL_WITHIN, client.create_vm(Context::default(), &request)).await;
        Ok(created.context("CreateVM hangs")?.context("CreateVM")?.agentSocketPath.into())
    }

    /// `StartVM`.
    ///
    /// # Errors
    /// If the call fails or hangs.
    ///
    /// # Cancellation
    /// Dropping the future closes the connection of the call, as a shim that dies does.
    pub async fn start_vm(&self) -> Result<()> {
        let request = StartVMRequest { id: self.id.clone(), ..Default::default() };
        let client = self.client().await?;
        let started = timeout(CALL_WITHIN, client.start_vm(Context::default(), &request)).await;
        started.context("StartVM hangs")?.context("StartVM").map(drop)
    }

    /// `StopVM`.
    ///
    /// # Errors
    /// If the call fails or hangs.
    pub async fn stop_vm(&self) -> Result<()> {
        let request = StopVMRequest { id: self.id.clone(), ..Default::default() };
        let client = self.client().await?;
        let stopped = timeout(CALL_WITHIN, client.stop_vm(Context::default(), &request)).await;
        stopped.context("StopVM hangs")?.context("StopVM").map(drop)
    }

    /// `CreateVM`, `StartVM`, and the calls up to a running container, which stay open.
    ///
    /// # Errors
    /// If a call fails or hangs. The VM is not stopped then: see [`Shim::stop_vm`].
    pub async fn run(&self) -> Result<PodRuntime> {
        let agent = self.create_vm().await?;
        self.start_vm().await?;
        self.connect(&agent).await
    }

    /// The calls after `StartVM`.
    ///
    /// # Errors
    /// If a call fails or hangs.
    pub async fn connect(&self, agent: &Path) -> Result<PodRuntime> {
        let runtime = PodRuntime::start(agent).await?;
        runtime.copy_file(FILE).await?;
        runtime.stats().await?;
        Ok(runtime)
    }

    /// The calls at a pod's end.
    ///
    /// # Errors
    /// If a call fails or hangs, or the pod was dead.
    pub async fn end(&self, runtime: PodRuntime) -> Result<()> {
        runtime.finish().await?;
        self.stop_vm().await
    }

    /// A connection of its own, as each call has.
    async fn client(&self) -> Result<HypervisorClient> {
        let stream = UnixStream::connect(&self.hypervisor).await;
        let stream = stream.with_context(|| format!("connecting to {}", self.hypervisor.display()))?;
        Ok(HypervisorClient::new(Client::new(stream.into())))
    }
}
