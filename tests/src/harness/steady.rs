//! A stream with a byte each way in steady steps, all of them checked.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{interval, timeout};

use crate::harness::scene::PATIENCE;
use crate::simulators::kata::client::EchoSession;
use crate::simulators::kata::pattern::{Checker, fill};

/// A running stream to an echo server; aborted when dropped.
#[derive(Debug)]
pub struct Steady {
    stop: watch::Sender<bool>,
    running: JoinSet<Result<u64>>,
}

impl Steady {
    /// Sends a byte every `step`, whether or not the bytes before it came back.
    ///
    /// # Errors
    /// If the stream fails at once.
    pub async fn start<S>(stream: S, step: Duration, seed: u64) -> Result<Self>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let (mut read, mut write) = EchoSession::open(stream).await?.into_halves();
        let (stop, mut stopped) = watch::channel(false);
        let mut running = JoinSet::new();
        running.spawn(async move {
            let send = async {
                let (mut sent, mut ticks) = (0, interval(step));
                loop {
                    tokio::select! {
                        _ = stopped.wait_for(|stopped| *stopped) => break,
                        _ = ticks.tick() => {}
                    }
                    let mut byte = [0];
                    fill(seed, sent, &mut byte);
                    write.write_all(&byte).await.context("steady: sending")?;
                    write.flush().await.context("steady: sending")?;
                    sent += 1;
                }
                write.shutdown().await.context("steady: closing the write side")?;
                anyhow::Ok(sent)
            };
            let receive = async {
                let mut checker = Checker::new(seed);
                let mut buffer = [0; 64];
                loop {
                    let size = read.read(&mut buffer).await.context("steady: receiving")?;
                    match buffer.get(..size).unwrap_or_default() {
                        [] => return anyhow::Ok(checker.offset()),
                        bytes => checker.check(bytes)?,
                    }
                }
            };
            let (sent, received) = tokio::try_join!(send, receive)?;
            ensure!(sent == received, "steady: {received} bytes of {sent} came back");
            Ok(sent)
        });
        Ok(Self { stop, running })
    }

    /// Fails if the stream has ended.
    ///
    /// # Errors
    /// As said, with the reason.
    pub fn lives(&mut self) -> Result<()> {
        match self.running.try_join_next() {
            None => Ok(()),
            Some(ended) => anyhow::bail!("a stream has ended: {:?}", ended?),
        }
    }

    /// Waits until the stream ends, although it was not finished.
    ///
    /// # Errors
    /// If it does not end.
    pub async fn fails(mut self) -> Result<()> {
        let ended =
            timeout(PATIENCE, self.running.join_next()).await.context("a stream outlives its session")?;
        ensure!(ended.context("it ended twice")??.is_err(), "a stream ended in good order");
        Ok(())
    }

    /// Sends no more, half-closes, and waits for the rest and the end; returns how many bytes went each way.
    ///
    /// # Errors
    /// If the stream failed, or a byte is wrong or missing.
    pub async fn finish(mut self) -> Result<u64> {
        self.stop.send_replace(true);
        let ended = timeout(PATIENCE, self.running.join_next()).await.context("a steady stream hangs")?;
        ended.context("it ended twice")??
    }
}
