//! Clients of the simulator, which move bytes through whatever is in between and check each of them.

use std::time::{Duration, Instant};
use std::{fmt, io};

use anyhow::{Context, Result, bail};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};

use super::pattern::{Checker, Checksum, fill};
use super::{BUFFER, Command};

/// A byte came after the last one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Surplus;

impl fmt::Display for Surplus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a byte came after the last one")
    }
}

impl std::error::Error for Surplus {}

/// Sends `n` bytes to `echo` and checks what comes back, both at once; leaves the stream open. Returns how long it
/// took.
///
/// # Errors
/// If the stream fails or ends, or a byte is wrong.
pub async fn echo_roundtrip<S>(stream: &mut S, n: u64, seed: u64) -> Result<Duration>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    EchoSession::open(stream).await?.roundtrip(n, seed).await
}

/// A connection to `echo` for many round trips, for instance to measure latency under load.
#[derive(Debug)]
pub struct EchoSession<S> {
    read: ReadHalf<S>,
    write: WriteHalf<S>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> EchoSession<S> {
    /// Requests `echo`.
    ///
    /// # Errors
    /// If the stream fails.
    pub async fn open(mut stream: S) -> Result<Self> {
        send_command(&mut stream, Command::Echo).await?;
        let (read, write) = tokio::io::split(stream);
        Ok(Self { read, write })
    }

    /// Sends `n` bytes and checks them as they come back. Returns how long it took.
    ///
    /// # Errors
    /// If the stream fails or ends, or a byte is wrong.
    pub async fn roundtrip(&mut self, n: u64, seed: u64) -> Result<Duration> {
        let start = Instant::now();
        let send = async { write_pattern(&mut self.write, n, seed).await.context("echo: sending") };
        let receive = async { check_pattern(&mut self.read, n, seed).await.context("echo: receiving") };
        tokio::try_join!(send, receive)?;
        Ok(start.elapsed())
    }

    /// The two directions, to be used by themselves.
    pub fn into_halves(self) -> (ReadHalf<S>, WriteHalf<S>) {
        (self.read, self.write)
    }

    /// Waits until the other side ends, without another byte.
    ///
    /// # Errors
    /// If the stream fails, or a byte comes.
    pub async fn until_end(&mut self) -> Result<()> {
        expect_eof(&mut self.read).await.context("echo")
    }

    /// Half-closes, and checks that the other side then ends without another byte.
    ///
    /// # Errors
    /// If it does not.
    pub async fn finish(mut self) -> Result<()> {
        self.write.shutdown().await.context("echo: closing the write side")?;
        expect_eof(&mut self.read).await.context("echo")
    }
}

/// `n` bytes through `echo`, both directions at full speed, then half-close: checks each byte and that exactly `n`
/// came back before EOF. Returns how long it took.
///
/// # Errors
/// If the stream fails or ends early or late, or a byte is wrong.
pub async fn bulk_both_ways<S>(stream: S, n: u64, seed: u64) -> Result<Duration>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let start = Instant::now();
    let EchoSession { mut read, mut write } = EchoSession::open(stream).await?;
    let send = async {
        write_pattern(&mut write, n, seed).await.context("bulk: sending")?;
        // Half-closed at once, while most of the echo is still in flight.
        write.shutdown().await.context("bulk: closing the write side")
    };
    let receive = async {
        check_pattern(&mut read, n, seed).await.context("bulk: receiving")?;
        expect_eof(&mut read).await.context("bulk")
    };
    tokio::try_join!(send, receive)?;
    Ok(start.elapsed())
}

/// Reads `n` bytes from `source`, to its EOF, and checks each. Returns how long it took.
///
/// # Errors
/// If the stream fails or ends early or late, or a byte is wrong.
pub async fn read_source<S>(mut stream: S, n: u64, seed: u64) -> Result<Duration>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let start = Instant::now();
    open_source(&mut stream, n, seed).await?;
    check_pattern(&mut stream, n, seed).await.context("source")?;
    expect_eof(&mut stream).await.context("source")?;
    stream.shutdown().await.context("source: closing")?;
    Ok(start.elapsed())
}

/// Requests `n` bytes of `source` and reads none, as a stalled reader.
///
/// # Errors
/// If the stream fails.
pub async fn open_source<S>(stream: &mut S, n: u64, seed: u64) -> Result<()>
where
    S: AsyncWrite + Unpin,
{
    send_command(stream, Command::Source(n)).await?;
    stream.write_u64(seed).await.context("source: sending the seed")?;
    stream.flush().await.context("source: sending the seed")
}

/// Writes `n` bytes to `sink` and compares its count and checksum. Returns how long it took.
///
/// # Errors
/// If the stream fails, or a byte was lost or changed.
pub async fn write_sink<S>(mut stream: S, n: u64, seed: u64) -> Result<Duration>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let start = Instant::now();
    send_command(&mut stream, Command::Sink).await?;
    write_pattern(&mut stream, n, seed).await.context("sink: sending")?;
    stream.shutdown().await.context("sink: closing the write side")?;
    let length = stream.read_u64().await.context("sink: reading the length")?;
    let checksum = stream.read_u64().await.context("sink: reading the checksum")?;
    expect_eof(&mut stream).await.context("sink")?;
    let took = start.elapsed();
    if length != n {
        bail!("sink: {length} bytes of {n} arrived");
    }
    if checksum != Checksum::of_pattern(seed, n) {
        bail!("sink: {n} bytes arrived, but not the ones that were sent");
    }
    Ok(took)
}

/// Requests `stall`: the server reads nothing from here on.
///
/// # Errors
/// If the stream fails.
pub async fn open_stall<S>(stream: &mut S) -> Result<()>
where
    S: AsyncWrite + Unpin,
{
    send_command(stream, Command::Stall).await
}

/// Writes the first `n` bytes of the pattern of `seed`.
///
/// # Errors
/// If the stream fails.
pub async fn write_pattern<W>(write: &mut W, n: u64, seed: u64) -> io::Result<()>
where
    W: AsyncWrite + Unpin,
{
    let mut buffer = vec![0; BUFFER];
    let mut sent = 0;
    while sent < n {
        let left = usize::try_from(n - sent).unwrap_or(usize::MAX);
        let size = left.min(BUFFER);
        let Some(piece) = buffer.get_mut(..size) else { break };
        fill(seed, sent, piece);
        write.write_all(piece).await?;
        sent += piece.len() as u64;
    }
    write.flush().await
}

/// Reads `n` bytes and checks them against the pattern of `seed`.
///
/// # Errors
/// If the stream fails or ends early, or a byte is wrong.
pub async fn check_pattern<R>(read: &mut R, n: u64, seed: u64) -> Result<()>
where
    R: AsyncRead + Unpin,
{
    let mut checker = Checker::new(seed);
    let mut buffer = vec![0; BUFFER];
    while checker.offset() < n {
        let left = usize::try_from(n - checker.offset()).unwrap_or(usize::MAX);
        let size = left.min(BUFFER);
        let Some(piece) = buffer.get_mut(..size) else { break };
        let read = read.read(piece).await?;
        let Some(piece) = piece.get(..read).filter(|piece| !piece.is_empty()) else {
            bail!("the stream ended after {} bytes of {n}", checker.offset());
        };
        checker.check(piece)?;
    }
    Ok(())
}

async fn expect_eof(read: &mut (impl AsyncRead + Unpin)) -> Result<()> {
    match read.read(&mut [0]).await.context("waiting for EOF")? {
        0 => Ok(()),
        _ => Err(Surplus.into()),
    }
}

async fn send_command(stream: &mut (impl AsyncWrite + Unpin), command: Command) -> Result<()> {
    stream.write_all(&command.encode()).await.context("kata: sending the command")?;
    stream.flush().await.context("kata: sending the command")
}
