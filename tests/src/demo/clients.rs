//! Clients that must not notice that the line between worker node and VM is cut: a runtime connection on which a call is
//! open, and a file that goes through another tunnel to the VM and back.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ring::digest;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::harness::scene::PATIENCE;
use crate::simulators::kata::client::open_echo;
use crate::simulators::kata::pattern::fill;
use crate::simulators::kata_api::api::agent::{
    CreateContainerRequest, SignalProcessRequest, WaitProcessRequest, WaitProcessResponse,
};
use crate::simulators::kata_api::api::oci::{Linux, Spec};
use crate::simulators::kata_api::client::Runtime;
use crate::simulators::kata_api::protobuf::MessageField;
use crate::simulators::kata_api::server::{KataServer, Request};
use crate::simulators::kata_api::ttrpc;
use crate::simulators::kata_api::ttrpc::context::Context as CallContext;

/// A runtime's connection to the kata agent. It is made once: when it ends, its calls fail.
#[derive(Debug)]
pub struct RuntimeConnection {
    runtime: Runtime,
    /// `WaitProcess`, which a runtime keeps open for a container's life.
    open_call: JoinHandle<ttrpc::Result<WaitProcessResponse>>,
    opened: Instant,
}

/// A call of the runtime that waits for its answer.
pub type Call<T> = JoinHandle<ttrpc::Result<T>>;

/// The container's name.
const CONTAINER: &str = "demo";
/// Exit status of a container that was killed, as the kata agent reports it.
const KILLED: i32 = 137;

impl RuntimeConnection {
    /// Connects to `kata` through the adaptor's unix inbound, makes a container, and leaves a call open.
    ///
    /// # Errors
    /// If the connection ends, or a call is refused.
    pub async fn open(inbound: &Path, kata: &KataServer) -> Result<Self> {
        let stream = UnixStream::connect(inbound).await;
        let stream = stream.with_context(|| format!("connecting to {}", inbound.display()))?;
        let runtime = Runtime::new(stream);
        let spec = Spec { Linux: MessageField::some(Linux::new()), ..Spec::new() };
        let request = CreateContainerRequest {
            container_id: CONTAINER.into(),
            OCI: MessageField::some(spec),
            ..CreateContainerRequest::new()
        };
        within("CreateContainer", runtime.create_container(&request)).await??;
        let (caller, opened) = (runtime.clone(), Instant::now());
        let open_call = tokio::spawn(async move {
            let request = WaitProcessRequest { container_id: CONTAINER.into(), ..WaitProcessRequest::new() };
            caller.agent().wait_process(CallContext::default(), &request).await
        });
        let arrived = kata.wait_for(|request| (*request == WAIT_PROCESS).then_some(()));
        within("the arrival of WaitProcess", arrived).await?;
        Ok(Self { runtime, open_call, opened })
    }

    /// Sends a `Check`, as a runtime does every 5 s.
    #[must_use]
    pub fn check(&self) -> Call<()> {
        let runtime = self.runtime.clone();
        tokio::spawn(async move { runtime.check().await.map(drop) })
    }

    /// Ends the container: the call that is still open must be answered, on this connection. Returns how long it was open.
    ///
    /// # Errors
    /// If it is not, or the call was sent more than once.
    pub async fn finish(self, kata: &KataServer) -> Result<Duration> {
        ensure!(!self.open_call.is_finished(), "WaitProcess ended before its container");
        let request = SignalProcessRequest { container_id: CONTAINER.into(), ..SignalProcessRequest::new() };
        let signalled = self.runtime.agent().signal_process(CallContext::default(), &request);
        within("SignalProcess", signalled).await??;
        let answer = answered("WaitProcess", self.open_call).await?;
        ensure!(answer.status == KILLED, "WaitProcess: status {} instead of {KILLED}", answer.status);
        let times = kata.requests().iter().filter(|request| **request == WAIT_PROCESS).count();
        ensure!(times == 1, "WaitProcess arrived {times} times");
        Ok(self.opened.elapsed())
    }
}

const WAIT_PROCESS: Request = Request::Other("WaitProcess");

/// Waits for the answer to a call.
///
/// # Errors
/// If it is an error, as it is once the connection has ended.
pub async fn answered<T>(what: &str, call: Call<T>) -> Result<T> {
    let answer = within(what, call).await??;
    answer.with_context(|| format!("{what}: the runtime's connection"))
}

async fn within<T>(what: &str, work: impl Future<Output = T>) -> Result<T> {
    timeout(PATIENCE, work).await.with_context(|| format!("{what}: no answer within {PATIENCE:?}"))
}

/// A file on its path through a tunnel to a server that sends it back.
#[derive(Debug)]
pub struct Transfer {
    length: u64,
    /// Bytes that are back.
    back: watch::Receiver<u64>,
    running: JoinHandle<Result<(digest::Digest, digest::Digest)>>,
}

/// Bytes that are read or written at a time.
const PIECE: usize = 64 * 1024;

impl Transfer {
    /// Begins to send `length` bytes on a connection to the simulator `echo`.
    ///
    /// # Errors
    /// If the connection fails.
    pub async fn begin(mut stream: TcpStream, length: u64) -> Result<Self> {
        open_echo(&mut stream).await?;
        let (mut read, mut write) = stream.into_split();
        let send = async move {
            let (mut sha256, mut sent, mut piece) =
                (digest::Context::new(&digest::SHA256), 0, vec![0; PIECE]);
            while sent < length {
                let size = usize::try_from(length - sent).unwrap_or(PIECE).min(PIECE);
                piece.truncate(size);
                fill(length, sent, &mut piece);
                sha256.update(&piece);
                write.write_all(&piece).await.context("the transfer, sending")?;
                sent += size as u64;
            }
            write.shutdown().await.context("the transfer, at its end")?;
            anyhow::Ok(sha256.finish())
        };
        let (count, back) = watch::channel(0);
        let receive = async move {
            let (mut sha256, mut piece) = (digest::Context::new(&digest::SHA256), vec![0; PIECE]);
            loop {
                let size = read.read(&mut piece).await.context("the transfer, receiving")?;
                if size == 0 {
                    return anyhow::Ok(sha256.finish());
                }
                sha256.update(piece.get(..size).unwrap_or_default());
                count.send_modify(|count| *count += size as u64);
            }
        };
        let running = tokio::spawn(async move { tokio::try_join!(send, receive) });
        Ok(Self { length, back, running })
    }

    /// Bytes that are back.
    #[must_use]
    pub fn back(&self) -> u64 {
        *self.back.borrow()
    }

    /// Waits until more than so many bytes are back.
    ///
    /// # Errors
    /// If the transfer ends before.
    pub async fn exceeds(&mut self, bytes: u64) -> Result<()> {
        let reached = within("the transfer", self.back.wait_for(|back| *back > bytes)).await?.map(drop);
        if reached.is_err() {
            (&mut self.running).await??;
        }
        reached.with_context(|| format!("the transfer ended after {} bytes of {}", self.back(), self.length))
    }

    /// Waits for the end. Returns the SHA-256, in hex, of what came back.
    ///
    /// # Errors
    /// If the connection failed, or something else came back than was sent.
    pub async fn finish(mut self) -> Result<String> {
        let (sent, received) = within("the transfer", &mut self.running).await???;
        let (back, length) = (self.back(), self.length);
        ensure!(back == length, "the transfer: {back} bytes of {length}");
        ensure!(
            sent.as_ref() == received.as_ref(),
            "the transfer: {length} bytes, but not those that were sent"
        );
        Ok(received.as_ref().iter().map(|byte| format!("{byte:02x}")).collect())
    }
}
