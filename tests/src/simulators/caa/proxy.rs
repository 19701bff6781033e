//! The agent proxy of a sandbox: one TLS connection to its VM, dialled once, and the runtime's connection to it.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::pin::Pin;
use std::task::{Context as TaskContext, Poll};
use std::time::Duration;

use anyhow::{Context, Result};
use secure_comms_tunnel::netns::{self, Namespace};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf, copy_bidirectional};
use tokio::net::{TcpStream, UnixListener};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout_at};
use tokio_rustls::client::TlsStream;

use super::CaaOptions;
use super::tls::Connector;

/// First pause between two dials; it doubles.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Bytes of the ClientHello in its first segment: the real one's has more than fit into one.
const FIRST_SEGMENT: usize = 100;

/// The connection to a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Line {
    /// It dials, after this number of failed dials.
    Dials(u32),
    /// The VM has accepted, and the TLS handshake is not done; this number of dials failed before.
    Held(u32),
    /// The handshake is done.
    Up,
    /// It has ended, and why; there is no other.
    Ended(String),
}

/// A running proxy; killed when dropped.
#[derive(Debug)]
pub(super) struct Proxy {
    line: watch::Receiver<Line>,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Proxy {
    /// Dials the VM, and then serves the first client of `listener`.
    pub(super) fn start(
        options: &CaaOptions,
        listener: UnixListener,
        address: IpAddr,
        tls: Connector,
    ) -> Self {
        let (stop, stopped) = watch::channel(false);
        let (says, line) = watch::channel(Line::Dials(0));
        let dialler = Dialler {
            node: options.node.clone(),
            to: SocketAddr::new(address, options.forwarder_port),
            tls,
            deadline: Instant::now() + options.proxy_timeout,
            backoff: options.backoff,
        };
        let task = tokio::spawn(async move {
            let end = run(dialler, listener, stopped, &says).await;
            says.send_replace(Line::Ended(end));
        });
        Self { line, stop, task }
    }

    pub(super) fn line(&self) -> watch::Receiver<Line> {
        self.line.clone()
    }

    /// Stops; returns whether it has. One that dials goes on until it is connected or its time is over.
    pub(super) async fn stop(&mut self) -> bool {
        self.stop.send_replace(true);
        let dials = matches!(*self.line.borrow(), Line::Dials(_) | Line::Held(_));
        if !dials {
            // That it has ended is what matters.
            let _ = (&mut self.task).await;
        }
        !dials
    }

    /// Ends it as the process's end does.
    pub(super) async fn kill(mut self) {
        self.task.abort();
        // The error is the cancellation that was requested.
        let _ = (&mut self.task).await;
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Listens on the agent's socket. It belongs to the node's network namespace, where `/proc/net/unix` shows it.
pub(super) async fn listen(node: Option<&Namespace>, path: &Path) -> Result<UnixListener> {
    let at = path.to_owned();
    let bind = move || {
        match std::fs::remove_file(&at) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = std::os::unix::net::UnixListener::bind(&at)?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    };
    let listener = match node {
        Some(node) => node.run(bind).await.map_err(anyhow::Error::from),
        None => bind().map_err(anyhow::Error::from),
    };
    let listener = listener.with_context(|| format!("CAA: listening on {}", path.display()))?;
    Ok(UnixListener::from_std(listener)?)
}

/// Returns why it ended.
async fn run(
    dialler: Dialler,
    listener: UnixListener,
    mut stopped: watch::Receiver<bool>,
    says: &watch::Sender<Line>,
) -> String {
    let mut vm = match dialler.dial(says).await {
        Ok(vm) => vm,
        Err(error) => return format!("{error:#}"),
    };
    // Only now does the real one look whether it was stopped.
    if !*stopped.borrow() {
        says.send_replace(Line::Up);
    }
    let end = tokio::select! {
        _ = stopped.wait_for(|stopped| *stopped) => "StopVM".to_owned(),
        end = serve(&listener, &mut vm) => end,
    };
    // The peer may have closed it already.
    let _ = vm.shutdown().await;
    end
}

async fn serve(listener: &UnixListener, vm: &mut TlsStream<Segmented>) -> String {
    let mut runtime = match listener.accept().await {
        Ok((runtime, _)) => runtime,
        Err(error) => return format!("accepting the runtime: {error}"),
    };
    match copy_bidirectional(&mut runtime, vm).await {
        Ok((sent, received)) => format!("closed after {sent} bytes to the VM and {received} from it"),
        Err(error) => format!("the relay failed: {error}"),
    }
}

struct Dialler {
    node: Option<Namespace>,
    to: SocketAddr,
    tls: Connector,
    deadline: Instant,
    backoff: Duration,
}

impl Dialler {
    async fn dial(&self, says: &watch::Sender<Line>) -> Result<TlsStream<Segmented>> {
        let (mut pause, mut failed) = (FIRST_PAUSE.min(self.backoff), 0);
        loop {
            let attempt = timeout_at(self.deadline, self.attempt(says, failed)).await;
            let error = match attempt.context("the proxy timeout is over")? {
                Ok(stream) => return Ok(stream),
                Err(error) => error,
            };
            failed += 1;
            says.send_replace(Line::Dials(failed));
            let paused = timeout_at(self.deadline, sleep(pause)).await;
            if paused.is_err() {
                return Err(error.context("the proxy timeout is over; the last dial"));
            }
            pause = (pause * 2).min(self.backoff);
        }
    }

    async fn attempt(&self, says: &watch::Sender<Line>, failed: u32) -> Result<TlsStream<Segmented>> {
        let tcp = netns::connect(self.node.as_ref(), self.to).await.context("TCP")?;
        tcp.set_nodelay(true)?;
        says.send_replace(Line::Held(failed));
        let (connector, name) = &self.tls;
        let stream = Segmented { tcp, left: FIRST_SEGMENT };
        connector.connect(name.clone(), stream).await.context("TLS")
    }
}

/// A connection whose first bytes go out in a segment of their own.
#[derive(Debug)]
struct Segmented {
    tcp: TcpStream,
    left: usize,
}

impl AsyncRead for Segmented {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Segmented {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let most = if self.left == 0 { bytes.len() } else { self.left };
        let first = bytes.get(..most).unwrap_or(bytes);
        let written = std::task::ready!(Pin::new(&mut self.tcp).poll_write(cx, first))?;
        self.left = self.left.saturating_sub(written);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }
}
