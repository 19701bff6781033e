//! Answers requests about the test VM from inside it, and carries out a few. Access to its socket is full control of the
//!  VM, so no image for pods contains it.
//!
//! A request is a line of JSON ([`Request`]), and so is the answer: `{"ok": ...}` or `{"error": "..."}`. One request per
//!  connection.

pub mod client;
mod proc;
mod unix_sockets;

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use secure_comms_tunnel::netns::{self, Namespace};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};

use crate::accept::Serving;
use crate::kata::client::bulk_both_ways;

/// The longest request, in bytes.
const REQUEST_LIMIT: u64 = 64 * 1024;
/// Most bytes of a file or of a program's output in an answer.
const TEXT_LIMIT: u64 = 512 * 1024;
/// Most bytes of [`Request::Echo`].
const ECHO_LIMIT: u64 = 64 * 1024 * 1024;
/// Timeout of a request.
const TIME_LIMIT: Duration = Duration::from_secs(100);

/// A request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// Text of a file.
    Read(String),
    /// All processes: an array of [`Process`].
    Processes,
    /// Runs a program; the answer is [`Ran`].
    Run(Vec<String>),
    /// Sends a signal to each process of this name (`comm`, at most 15 characters); the answer is their number.
    Signal(String, i32),
    /// The TCP listeners in the network namespace of a process: an array of addresses.
    Listeners(i32),
    /// The unix sockets in the VM that have a path or an abstract name, and whether the process can connect to each: an
    /// array of [`UnixSocket`].
    UnixSockets(i32),
    /// Sends bytes to an echo server from inside a network namespace, and checks each that comes back.
    Echo {
        /// A name below /run/netns.
        namespace: String,
        /// Address of the server.
        address: String,
        /// Number of bytes.
        bytes: u64,
    },
    /// Reboots the machine. There is no answer.
    Reboot,
}

/// A process of the VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Process id.
    pub pid: i32,
    /// Name, cut after 15 characters.
    pub comm: String,
    /// Command line; empty for a kernel thread.
    pub command: Vec<String>,
    /// Network namespace, such as `net:[4026531840]`.
    pub net: String,
    /// Mount namespace.
    pub mnt: String,
}

/// A unix socket of the VM, as a process finds it in its mount namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnixSocket {
    /// Path, or an abstract name that begins with `@`.
    pub name: String,
    /// Error of connect(2); `None` if it succeeded.
    pub error: Option<String>,
}

/// How a program ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ran {
    /// Exit code; `None` if a signal ended it.
    pub code: Option<i32>,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

/// A running inspector; stops when dropped.
#[derive(Debug)]
pub struct Inspector {
    _serving: Serving,
}

impl Inspector {
    /// Listens on the unix socket `path`, and replaces an older one.
    ///
    /// # Errors
    /// If the socket can't be bound.
    pub fn start(path: &Path) -> Result<Self> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("inspector: removing {}", path.display()));
            }
            _ => {}
        }
        let listener =
            UnixListener::bind(path).with_context(|| format!("inspector: binding {}", path.display()))?;
        let serving = Serving::start(listener, |stream| async move {
            // The client has closed the connection.
            let _ = serve(stream).await;
        });
        Ok(Self { _serving: serving })
    }
}

async fn serve(stream: UnixStream) -> Result<()> {
    let mut stream = BufReader::new(stream);
    let answer = match tokio::time::timeout(TIME_LIMIT, read_and_answer(&mut stream)).await {
        Ok(Ok(answer)) => json!({ "ok": answer }),
        Ok(Err(error)) => json!({ "error": format!("{error:#}") }),
        Err(_) => json!({ "error": format!("not done within {TIME_LIMIT:?}") }),
    };
    stream.write_all(format!("{answer}\n").as_bytes()).await?;
    Ok(stream.shutdown().await?)
}

async fn read_and_answer(stream: &mut BufReader<UnixStream>) -> Result<Value> {
    let mut line = String::new();
    stream.take(REQUEST_LIMIT).read_line(&mut line).await.context("reading the request")?;
    let request: Request = serde_json::from_str(&line).context("reading the request")?;
    answer(request).await
}

async fn answer(request: Request) -> Result<Value> {
    Ok(match request {
        Request::Read(path) => {
            let file = tokio::fs::File::open(&path).await.with_context(|| format!("opening {path}"))?;
            json!(text(file).await.with_context(|| format!("reading {path}"))?)
        }
        Request::Processes => serde_json::to_value(proc::processes()?)?,
        Request::Run(command) => serde_json::to_value(run(&command).await?)?,
        Request::Signal(name, signal) => json!(send(&name, Signal::try_from(signal)?)?),
        Request::Listeners(pid) => serde_json::to_value(proc::listeners(pid)?)?,
        Request::UnixSockets(pid) => serde_json::to_value(unix_sockets::of(pid)?)?,
        Request::Echo { namespace, address, bytes } => {
            let server = address.parse().with_context(|| format!("{address:?} is not an address"))?;
            let stream = netns::connect(Some(&Namespace::new(&namespace)), server).await;
            let stream = stream.with_context(|| format!("connecting to {address} in {namespace}"))?;
            bulk_both_ways(stream, bytes.min(ECHO_LIMIT), 5).await?;
            Value::Null
        }
        Request::Reboot => restart().await?,
    })
}

async fn text(source: impl AsyncReadExt + Unpin) -> Result<String> {
    let mut bytes = Vec::new();
    source.take(TEXT_LIMIT).read_to_end(&mut bytes).await?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

async fn run(command: &[String]) -> Result<Ran> {
    let Some((program, args)) = command.split_first() else { bail!("no program to run") };
    let mut command = tokio::process::Command::new(program);
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut child = command.spawn().with_context(|| format!("starting {program}"))?;
    let stdout = child.stdout.take().context("no standard output")?;
    let stderr = child.stderr.take().context("no standard error")?;
    // A program that writes more gets a closed pipe, and ends.
    let (stdout, stderr) = tokio::try_join!(text(stdout), text(stderr))?;
    let status = child.wait().await.with_context(|| format!("waiting for {program}"))?;
    Ok(Ran { code: status.code(), stdout, stderr })
}

fn send(name: &str, signal: Signal) -> Result<usize> {
    let mut count = 0;
    for process in proc::processes()?.into_iter().filter(|process| process.comm == name) {
        nix::sys::signal::kill(Pid::from_raw(process.pid), signal)
            .with_context(|| format!("sending {signal} to {}", process.pid))?;
        count += 1;
    }
    if count == 0 {
        bail!("no process is named {name}");
    }
    Ok(count)
}

/// An orderly reboot if systemd runs.
async fn restart() -> Result<Value> {
    if Path::new("/run/systemd/system").exists() {
        let ran = run(&["systemctl".into(), "reboot".into()]).await?;
        return Ok(serde_json::to_value(ran)?);
    }
    nix::unistd::sync();
    let _: std::convert::Infallible = reboot(RebootMode::RB_AUTOBOOT).context("rebooting")?;
    Ok(Value::Null)
}
