//! Simulates the kata agent, or any server behind a tunnel, with bytes that a test can check. On a unix socket it is
//! the kata agent, with the bytes in ttrpc frames ([`framed`]); on TCP it is any server, with plain bytes.
//!
//! A connection starts with an 8-byte big-endian word: the command in its first byte, a count in the other seven.
//!
//! | command | count | then |
//! | --- | --- | --- |
//! | `echo` 1 | 0 | copies back what comes; after EOF it finishes and closes its write side |
//! | `source` 2 | bytes | reads an 8-byte seed, sends that many bytes of [`pattern`], then EOF |
//! | `sink` 3 | 0 | reads to EOF, answers with length and checksum (8 bytes each), closes |
//! | `stall` 4 | 0 | never reads again, and holds the connection |

pub mod client;
pub mod framed;
pub mod pattern;

use std::convert::identity;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::socket::{Backlog, listen};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, UnixListener};

use crate::accept::Serving;
use framed::Framed;
use pattern::Checksum;

/// Size of the buffers on both sides, in bytes.
const BUFFER: usize = 64 * 1024;

/// What a connection does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    Echo,
    Source(u64),
    Sink,
    Stall,
}

impl Command {
    fn encode(self) -> [u8; 8] {
        let (code, count) = match self {
            Self::Echo => (1, 0),
            Self::Source(count) => (2, count),
            Self::Sink => (3, 0),
            Self::Stall => (4, 0),
        };
        ((code << 56) | (count & COUNT)).to_be_bytes()
    }

    fn decode(word: [u8; 8]) -> Result<Self> {
        let word = u64::from_be_bytes(word);
        Ok(match (word >> 56, word & COUNT) {
            (1, 0) => Self::Echo,
            (2, count) => Self::Source(count),
            (3, 0) => Self::Sink,
            (4, 0) => Self::Stall,
            _ => bail!("kata: {word:#018x} is no command"),
        })
    }
}

/// The part of the first word that is the count.
const COUNT: u64 = (1 << 56) - 1;

/// A running simulator; stops, and removes its unix socket, when dropped.
#[derive(Debug)]
pub struct KataAgent {
    _serving: Serving,
    served: Arc<Served>,
    tcp: Option<SocketAddr>,
    unix: Option<PathBuf>,
}

/// Counters of the connections.
#[derive(Debug, Default)]
struct Served {
    connections: AtomicU64,
    open: AtomicU64,
}

impl KataAgent {
    /// Listens on a unix socket, with ttrpc frames; a stale socket at `path` is replaced, as the kata agent does.
    ///
    /// # Errors
    /// If the socket cannot be bound.
    pub fn unix(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(anyhow!(error).context(format!("kata: removing the stale {}", path.display())));
            }
            _ => {}
        }
        let listener =
            UnixListener::bind(&path).with_context(|| format!("kata: binding {}", path.display()))?;
        let served = Arc::<Served>::default();
        Ok(Self {
            _serving: Served::serve(&served, listener, Framed::new),
            served,
            tcp: None,
            unix: Some(path),
        })
    }

    /// Listens on a TCP address (port 0 for any free port), with plain bytes, for further tunnels.
    ///
    /// # Errors
    /// If the address cannot be bound.
    pub async fn tcp(addr: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind(addr).await.with_context(|| format!("kata: binding {addr}"))?;
        // Thousands of clients may leave at once: the kernel must not reset those behind them because the queue is full.
        listen(&listener, Backlog::MAXALLOWABLE).context("kata: making its queue longer")?;
        let addr = listener.local_addr().context("kata: reading the bound address")?;
        let served = Arc::<Served>::default();
        Ok(Self { _serving: Served::serve(&served, listener, identity), served, tcp: Some(addr), unix: None })
    }

    /// The TCP address, if any.
    #[must_use]
    pub fn addr(&self) -> Option<SocketAddr> {
        self.tcp
    }

    /// The unix socket, if any.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.unix.as_deref()
    }

    /// Connections accepted so far.
    #[must_use]
    pub fn connections(&self) -> u64 {
        self.served.connections.load(Ordering::Relaxed)
    }

    /// Connections open now.
    #[must_use]
    pub fn open(&self) -> u64 {
        self.served.open.load(Ordering::Relaxed)
    }
}

impl Drop for KataAgent {
    fn drop(&mut self) {
        if let Some(path) = &self.unix {
            // The socket may have been removed.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Counts a connection as open while it exists, also if its task is aborted.
struct Open(Arc<Served>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Served {
    /// Serves each connection, wrapped by `speak`.
    fn serve<L, S>(served: &Arc<Self>, listener: L, speak: fn(L::Stream) -> S) -> Serving
    where
        L: crate::accept::Listener,
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let served = Arc::clone(served);
        Serving::start(listener, move |stream| {
            served.connections.fetch_add(1, Ordering::Relaxed);
            served.open.fetch_add(1, Ordering::Relaxed);
            let open = Open(Arc::clone(&served));
            async move {
                let _open = open;
                // The client sees its connection end, and checks that.
                let _ = answer(speak(stream)).await;
            }
        })
    }
}

async fn answer(mut stream: impl AsyncRead + AsyncWrite + Unpin) -> Result<()> {
    let mut word = [0; 8];
    stream.read_exact(&mut word).await?;
    match Command::decode(word)? {
        Command::Echo => {
            let (mut read, mut write) = tokio::io::split(stream);
            let mut buffer = vec![0; BUFFER];
            loop {
                let n = read.read(&mut buffer).await?;
                let Some(bytes) = buffer.get(..n).filter(|bytes| !bytes.is_empty()) else { break };
                write.write_all(bytes).await?;
            }
            write.shutdown().await?;
        }
        Command::Source(count) => {
            let seed = stream.read_u64().await?;
            client::write_pattern(&mut stream, count, seed).await?;
            stream.shutdown().await?;
            // Held until the client is done: a reset must not overtake the bytes.
            let _ = stream.read(&mut [0]).await;
        }
        Command::Sink => {
            let mut checksum = Checksum::default();
            let mut buffer = vec![0; BUFFER];
            loop {
                let n = stream.read(&mut buffer).await?;
                let Some(bytes) = buffer.get(..n).filter(|bytes| !bytes.is_empty()) else { break };
                checksum.update(bytes);
            }
            stream.write_u64(checksum.length()).await?;
            stream.write_u64(checksum.value()).await?;
            stream.shutdown().await?;
        }
        Command::Stall => std::future::pending::<()>().await,
    }
    Ok(())
}
