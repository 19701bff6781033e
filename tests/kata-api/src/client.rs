//! The runtime's side of a connection to a kata agent.

use std::time::Duration;
use ttrpc::r#async::{Client, transport::Socket};
use ttrpc::context::{Context, with_duration};

use crate::api::agent::{
    CheckRequest, CreateContainerRequest, CreateSandboxRequest, HealthCheckResponse, ReadStreamRequest,
    StatsContainerRequest, WriteStreamRequest,
};
use crate::api::agent_ttrpc::{AgentServiceClient, HealthClient};

/// A connection; its clones share it, and calls may be concurrent. Calls have no deadline but where one is named; the tests
/// set their own, as the kata agent's runtime does.
#[derive(Clone)]
pub struct Runtime {
    agent: AgentServiceClient,
    health: HealthClient,
}

impl Runtime {
    /// Uses ttrpc over this socket from now on; within a tokio runtime.
    #[must_use]
    pub fn new(stream: impl Into<Socket>) -> Self {
        let client = Client::new(stream.into());
        Self { agent: AgentServiceClient::new(client.clone()), health: HealthClient::new(client) }
    }

    /// `grpc.AgentService/CreateSandbox`.
    ///
    /// # Errors
    /// If it is refused, or the connection ends.
    pub async fn create_sandbox(&self, request: &CreateSandboxRequest) -> ttrpc::Result<()> {
        self.agent.create_sandbox(Context::default(), request).await.map(drop)
    }

    /// `grpc.AgentService/CreateContainer`.
    ///
    /// # Errors
    /// If it is refused, or the connection ends.
    pub async fn create_container(&self, request: &CreateContainerRequest) -> ttrpc::Result<()> {
        self.agent.create_container(Context::default(), request).await.map(drop)
    }

    /// `grpc.AgentService/CreateContainer`, whose caller gives up after this time.
    ///
    /// # Errors
    /// If it is refused or late, or the connection ends.
    pub async fn create_container_within(
        &self,
        request: &CreateContainerRequest,
        time: Duration,
    ) -> ttrpc::Result<()> {
        self.agent.create_container(with_duration(time), request).await.map(drop)
    }

    /// The kata agent's other methods.
    #[must_use]
    pub fn agent(&self) -> &AgentServiceClient {
        &self.agent
    }

    /// `grpc.AgentService/StatsContainer`.
    ///
    /// # Errors
    /// If it is refused, or the connection ends.
    pub async fn stats_container(&self, container_id: &str) -> ttrpc::Result<()> {
        let request = StatsContainerRequest { container_id: container_id.to_owned(), ..Default::default() };
        self.agent.stats_container(Context::default(), &request).await.map(drop)
    }

    /// `grpc.AgentService/WriteStdin`; returns how many bytes were taken.
    ///
    /// # Errors
    /// If it is refused, or the connection ends.
    pub async fn write_stdin(&self, container_id: &str, data: Vec<u8>) -> ttrpc::Result<u32> {
        let container_id = container_id.to_owned();
        let request = WriteStreamRequest { container_id, data, ..Default::default() };
        Ok(self.agent.write_stdin(Context::default(), &request).await?.len)
    }

    /// `grpc.AgentService/ReadStdout`, of `len` bytes.
    ///
    /// # Errors
    /// If it is refused, or the connection ends.
    pub async fn read_stdout(&self, container_id: &str, len: u32) -> ttrpc::Result<Vec<u8>> {
        let container_id = container_id.to_owned();
        let request = ReadStreamRequest { container_id, len, ..Default::default() };
        Ok(self.agent.read_stdout(Context::default(), &request).await?.data)
    }

    /// `grpc.Health/Check`.
    ///
    /// # Errors
    /// If it is refused, or the connection ends.
    pub async fn check(&self) -> ttrpc::Result<HealthCheckResponse> {
        self.health.check(Context::default(), &CheckRequest::new()).await
    }
}

impl std::fmt::Debug for Runtime {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Runtime").finish_non_exhaustive()
    }
}
