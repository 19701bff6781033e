//! The runtime of a pod with the calls that it keeps open, on the one connection that it has. It judges as the real one does:
//! a pod whose connection ends is dead, and one that answers no `Check` in time.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use tokio::net::UnixStream;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::harness::scene::PATIENCE;
use crate::simulators::kata_api::api::agent::{
    CopyFileRequest, CreateContainerRequest, CreateSandboxRequest, DestroySandboxRequest, GetOOMEventRequest,
    ReadStreamRequest, SignalProcessRequest, StartContainerRequest, WaitProcessRequest,
};
use crate::simulators::kata_api::client::Runtime;
use crate::simulators::kata_api::server::output;
use crate::simulators::kata_api::ttrpc::Error;
use crate::simulators::kata_api::ttrpc::context::Context;

/// Pause between two checks of the runtime.
const CHECK_EVERY: Duration = Duration::from_secs(5);
/// Time in which a check must be answered, or the runtime ends the pod.
const CHECK_WITHIN: Duration = Duration::from_secs(30);
/// Container whose calls are open.
const CONTAINER: &str = "pause";

/// A runtime with open calls.
#[derive(Debug)]
pub struct PodRuntime {
    runtime: Runtime,
    /// The calls that are open as long as the container runs; each returns its name.
    open: JoinSet<Result<&'static str>>,
    /// The checks; they end only if one fails.
    checks: JoinSet<anyhow::Error>,
}

impl PodRuntime {
    /// Connects, makes a sandbox and a container, and opens the calls.
    ///
    /// # Errors
    /// If a call fails.
    pub async fn start(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).await;
        let runtime = Runtime::new(stream.with_context(|| format!("connecting to {}", socket.display()))?);
        timeout(PATIENCE, Self::make(&runtime)).await.context("making the container hangs")??;
        let (mut open, mut checks) = (JoinSet::new(), JoinSet::new());
        let agent = runtime.agent().clone();
        open.spawn(async move {
            let request = WaitProcessRequest { container_id: CONTAINER.into(), ..Default::default() };
            let ended = agent.wait_process(Context::default(), &request).await.context("WaitProcess")?;
            ensure!(ended.status == 137, "WaitProcess: status {}", ended.status);
            Ok("WaitProcess")
        });
        let agent = runtime.agent().clone();
        open.spawn(async move {
            let request = ReadStreamRequest { container_id: CONTAINER.into(), ..Default::default() };
            refused("ReadStderr", agent.read_stderr(Context::default(), &request).await)
        });
        let agent = runtime.agent().clone();
        open.spawn(async move {
            let request = GetOOMEventRequest::new();
            refused("GetOOMEvent", agent.get_oom_event(Context::default(), &request).await)
        });
        let checked = runtime.clone();
        checks.spawn(async move {
            loop {
                match timeout(CHECK_WITHIN, checked.check()).await {
                    Err(_) => return anyhow::anyhow!("a Check had no answer in {CHECK_WITHIN:?}"),
                    Ok(Err(error)) => return anyhow::Error::new(error).context("Check"),
                    Ok(Ok(_)) => sleep(CHECK_EVERY).await,
                }
            }
        });
        Ok(Self { runtime, open, checks })
    }

    async fn make(runtime: &Runtime) -> Result<()> {
        // The first request of all, and the real one fails the pod without an answer.
        let checked = timeout(CHECK_WITHIN, runtime.check()).await;
        checked
            .with_context(|| format!("the first Check had no answer in {CHECK_WITHIN:?}"))?
            .context("Check")?;
        runtime.create_sandbox(&CreateSandboxRequest::new()).await.context("CreateSandbox")?;
        let request = CreateContainerRequest { container_id: CONTAINER.into(), ..Default::default() };
        runtime.create_container(&request).await.context("CreateContainer")?;
        let request = StartContainerRequest { container_id: CONTAINER.into(), ..Default::default() };
        runtime.agent().start_container(Context::default(), &request).await.context("StartContainer")?;
        Ok(())
    }

    /// The connection.
    #[must_use]
    pub fn calls(&self) -> &Runtime {
        &self.runtime
    }

    /// Fails if the runtime has given the pod up: a call that must be open has ended, or a check was not answered.
    ///
    /// # Errors
    /// As said.
    pub fn lives(&mut self) -> Result<()> {
        if let Some(failed) = self.checks.try_join_next() {
            return Err(failed?);
        }
        match self.open.try_join_next() {
            None => Ok(()),
            Some(ended) => bail!("a call has ended that must be open: {:?}", ended?),
        }
    }

    /// Writes this many bytes to the container and reads as many, all checked; the pod must live after it.
    ///
    /// # Errors
    /// If a call fails or hangs, a byte is wrong, or the pod is dead.
    pub async fn exchange(&mut self, bytes: u32) -> Result<()> {
        let size = usize::try_from(bytes)?;
        let taken = timeout(PATIENCE, self.runtime.write_stdin(CONTAINER, output("stdin", size)));
        let taken = taken.await.context("WriteStdin hangs")?.context("WriteStdin")?;
        ensure!(taken == bytes, "WriteStdin: {taken} bytes of {bytes}");
        let read = timeout(PATIENCE, self.runtime.read_stdout(CONTAINER, bytes));
        let read = read.await.context("ReadStdout hangs")?.context("ReadStdout")?;
        ensure!(read == output(CONTAINER, size), "ReadStdout: other bytes than were sent");
        self.lives()
    }

    /// Copies a file of this many bytes into the VM, as the runtime does with volumes.
    ///
    /// # Errors
    /// If the call fails or hangs.
    pub async fn copy_file(&self, bytes: usize) -> Result<()> {
        let request = CopyFileRequest { data: output("file", bytes), ..Default::default() };
        let copied = timeout(PATIENCE, self.runtime.agent().copy_file(Context::default(), &request)).await;
        copied.context("CopyFile hangs")?.context("CopyFile").map(drop)
    }

    /// Asks for the statistics of the container.
    ///
    /// # Errors
    /// If the call fails or hangs.
    pub async fn stats(&self) -> Result<()> {
        let stats = timeout(PATIENCE, self.runtime.stats_container(CONTAINER)).await;
        stats.context("StatsContainer hangs")?.context("StatsContainer")
    }

    /// Ends the container and the sandbox: each open call must get its answer now.
    ///
    /// # Errors
    /// If one does not, or the pod was dead.
    pub async fn finish(mut self) -> Result<()> {
        self.lives()?;
        drop(self.checks);
        let agent = self.runtime.agent();
        let request =
            SignalProcessRequest { container_id: CONTAINER.into(), signal: 9, ..Default::default() };
        let end = async {
            agent.signal_process(Context::default(), &request).await.context("SignalProcess")?;
            let request = DestroySandboxRequest::new();
            agent.destroy_sandbox(Context::default(), &request).await.context("DestroySandbox")?;
            while let Some(ended) = self.open.join_next().await {
                ended??;
            }
            anyhow::Ok(())
        };
        timeout(PATIENCE, end).await.context("an open call has no answer")?
    }

    /// Waits until the connection ends: all open calls fail.
    ///
    /// # Errors
    /// If it does not end.
    pub async fn dies(mut self) -> Result<()> {
        let all = async {
            while let Some(ended) = self.open.join_next().await {
                // An answer of the kata agent is no end of the connection.
                if let Ok(call) = ended? {
                    bail!("{call} was answered");
                }
            }
            Ok(())
        };
        timeout(PATIENCE, all).await.context("the runtime's connection outlives its session")?
    }
}

/// The kata agent's own error is the answer expected.
fn refused<T>(call: &'static str, answer: Result<T, Error>) -> Result<&'static str> {
    match answer {
        Err(Error::RpcStatus(_)) => Ok(call),
        Err(error) => Err(anyhow::Error::new(error).context(call)),
        Ok(_) => bail!("{call}: an answer without an error"),
    }
}
