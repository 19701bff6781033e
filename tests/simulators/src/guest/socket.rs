//! Protocol between front and back: a request is a line with the path; the answer is a line `ok <length>` and the
//! bytes, or a line `error <cause>`. One request per connection.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};

use super::Cdh;
use crate::accept::Serving;

/// The longest line of the protocol, in bytes.
const LINE_LIMIT: u64 = 4096;

/// [`Cdh`] on a unix socket; stops and removes the socket when dropped.
#[derive(Debug)]
pub struct CdhSocket {
    path: PathBuf,
    _serving: Serving,
}

impl CdhSocket {
    /// Listens on `path`, which must not exist yet.
    ///
    /// # Errors
    /// If the socket cannot be bound.
    pub fn start(path: impl Into<PathBuf>, cdh: Arc<Cdh>) -> Result<Self> {
        let path = path.into();
        let listener =
            UnixListener::bind(&path).with_context(|| format!("guest: binding {}", path.display()))?;
        let serving = Serving::start(listener, move |stream| {
            let cdh = Arc::clone(&cdh);
            async move {
                // The front may have closed the connection.
                let _ = answer(&cdh, stream).await;
            }
        });
        Ok(Self { path, _serving: serving })
    }
}

impl Drop for CdhSocket {
    fn drop(&mut self) {
        // The socket may have been removed.
        let _ = std::fs::remove_file(&self.path);
    }
}

async fn answer(cdh: &Cdh, stream: UnixStream) -> Result<()> {
    let mut stream = BufReader::new(stream);
    let path = read_line(&mut stream).await?;
    match cdh.fetch(&path).await {
        Ok(bytes) => {
            stream.write_all(format!("ok {}\n", bytes.len()).as_bytes()).await?;
            stream.write_all(&bytes).await?;
        }
        Err(error) => {
            let cause = format!("{error:#}").replace('\n', " ");
            stream.write_all(format!("error {cause}\n").as_bytes()).await?;
        }
    }
    stream.shutdown().await?;
    Ok(())
}

/// Requests `path` from the back on `socket`.
pub(super) async fn fetch(socket: &Path, path: &str) -> Result<Bytes> {
    let stream = UnixStream::connect(socket).await;
    let mut stream = BufReader::new(stream.with_context(|| format!("guest: CDH at {}", socket.display()))?);
    stream.write_all(format!("{path}\n").as_bytes()).await?;
    let line = read_line(&mut stream).await?;
    let Some(length) = line.strip_prefix("ok ") else { bail!("guest: CDH: {line}") };
    let length: usize = length.parse().context("guest: CDH: length")?;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).await?;
    if bytes.len() != length {
        bail!("guest: CDH: {} bytes of {length} came", bytes.len());
    }
    Ok(bytes.into())
}

async fn read_line(stream: &mut BufReader<UnixStream>) -> Result<String> {
    let mut line = String::new();
    stream.take(LINE_LIMIT).read_line(&mut line).await?;
    let Some(line) = line.strip_suffix('\n') else { bail!("guest: a line was cut short") };
    Ok(line.to_owned())
}
