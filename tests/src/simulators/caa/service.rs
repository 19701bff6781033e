//! The calls of the remote hypervisor protocol.

use std::sync::Arc;

use async_trait::async_trait;
use secure_comms_kata_api::api::hypervisor::{
    CreateVMRequest, CreateVMResponse, StartVMRequest, StartVMResponse, StopVMRequest, StopVMResponse,
    VersionRequest, VersionResponse,
};
use secure_comms_kata_api::api::hypervisor_ttrpc;
use secure_comms_kata_api::ttrpc::r#async::TtrpcContext;
use secure_comms_kata_api::ttrpc::{self, Code, get_status};

use super::Shared;

/// Annotation of `CreateVM`: the pod's name.
pub const POD_NAME: &str = "io.kubernetes.cri.sandbox-name";
/// Annotation of `CreateVM`: the pod's namespace.
pub const POD_NAMESPACE: &str = "io.kubernetes.cri.sandbox-namespace";
/// The service of a CAA.
pub(super) struct Hypervisor(pub(super) Arc<Shared>);

#[async_trait]
impl hypervisor_ttrpc::Hypervisor for Hypervisor {
    async fn create_vm(
        &self,
        _context: &TtrpcContext,
        request: CreateVMRequest,
    ) -> ttrpc::Result<CreateVMResponse> {
        let annotation = |name: &str| request.annotations.get(name).map(String::as_str).unwrap_or_default();
        let (namespace, pod) = (annotation(POD_NAMESPACE), annotation(POD_NAME));
        let socket = self.0.create(&request.id, namespace, pod).map_err(|error| failure(&error))?;
        let agent_socket_path = socket.to_string_lossy().into_owned();
        Ok(CreateVMResponse { agentSocketPath: agent_socket_path, ..Default::default() })
    }

    async fn start_vm(
        &self,
        _context: &TtrpcContext,
        request: StartVMRequest,
    ) -> ttrpc::Result<StartVMResponse> {
        let shared = Arc::clone(&self.0);
        // A task of its own: it goes on if the caller has gone.
        let started = tokio::spawn(async move { shared.start(&request.id).await }).await;
        let started = started.map_err(anyhow::Error::from).flatten();
        started.map_err(|error| failure(&error))?;
        Ok(StartVMResponse::new())
    }

    async fn stop_vm(
        &self,
        _context: &TtrpcContext,
        request: StopVMRequest,
    ) -> ttrpc::Result<StopVMResponse> {
        self.0.stop(&request.id).await.map_err(|error| failure(&error))?;
        Ok(StopVMResponse::new())
    }

    async fn version(
        &self,
        _context: &TtrpcContext,
        _request: VersionRequest,
    ) -> ttrpc::Result<VersionResponse> {
        Ok(VersionResponse { version: "0.0.0".to_owned(), ..Default::default() })
    }
}

fn failure(error: &anyhow::Error) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(get_status(Code::UNKNOWN, format!("{error:#}")))
}
