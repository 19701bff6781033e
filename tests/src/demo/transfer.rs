//! A file that goes through a tunnel to a server and back, and must not notice that the line is cut on its path.

use anyhow::{Context, Result, ensure};
use ring::digest::{Context as Sha256, SHA256};
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::harness::scene::PATIENCE;
use crate::simulators::kata::client::EchoSession;
use crate::simulators::kata::pattern::fill;

/// Bytes that are read or written at a time.
const PIECE: usize = 64 * 1024;

/// A running transfer; aborted when dropped.
#[derive(Debug)]
pub struct Transfer {
    length: u64,
    /// Bytes that are back.
    back: watch::Receiver<u64>,
    running: JoinSet<Result<[String; 2]>>,
}

impl Transfer {
    /// Begins to send `length` bytes on a connection to an echo server.
    ///
    /// # Errors
    /// If the connection fails at once.
    pub async fn begin(stream: TcpStream, length: u64) -> Result<Self> {
        let (read, write) = EchoSession::open(stream).await?.into_halves();
        let (count, back) = watch::channel(0);
        let mut running = JoinSet::new();
        running.spawn(async move {
            let (sent, received) = tokio::try_join!(send(write, length), receive(read, count))?;
            Ok([sent, received])
        });
        Ok(Self { length, back, running })
    }

    /// Bytes that are back.
    #[must_use]
    pub fn back(&self) -> u64 {
        *self.back.borrow()
    }

    /// Waits until more than this many bytes are back.
    ///
    /// # Errors
    /// If the transfer ends before, or hangs.
    pub async fn exceeds(&mut self, bytes: u64) -> Result<()> {
        let reached = timeout(PATIENCE, self.back.wait_for(|back| *back > bytes)).await;
        if reached.context("the transfer hangs")?.is_ok() {
            return Ok(());
        }
        self.running.join_next().await.context("the transfer has ended before")???;
        anyhow::bail!("the transfer ended after {} bytes of {}", self.back(), self.length)
    }

    /// Waits for the end. Returns the SHA-256, in hex, of what was sent and came back.
    ///
    /// # Errors
    /// If the connection failed or hangs, or something else came back than was sent.
    pub async fn finish(mut self) -> Result<String> {
        let ended = timeout(PATIENCE, self.running.join_next()).await.context("the transfer hangs")?;
        let [sent, received] = ended.context("the transfer has ended before")???;
        let (back, length) = (self.back(), self.length);
        ensure!(back == length, "the transfer: {back} bytes of {length} came back");
        ensure!(sent == received, "the transfer: sha256 {sent} was sent, and {received} came back");
        Ok(received)
    }
}

/// Sends `length` bytes and the end; returns their SHA-256.
async fn send(mut write: WriteHalf<TcpStream>, length: u64) -> Result<String> {
    let (mut sha256, mut sent, mut piece) = (Sha256::new(&SHA256), 0, vec![0; PIECE]);
    while sent < length {
        piece.truncate(usize::try_from(length - sent).unwrap_or(PIECE));
        fill(length, sent, &mut piece);
        sha256.update(&piece);
        write.write_all(&piece).await.context("the transfer, sending")?;
        sent += piece.len() as u64;
    }
    write.shutdown().await.context("the transfer, at its end")?;
    Ok(hex(sha256))
}

/// Receives to the end, and counts; returns the SHA-256.
async fn receive(mut read: ReadHalf<TcpStream>, count: watch::Sender<u64>) -> Result<String> {
    let (mut sha256, mut piece) = (Sha256::new(&SHA256), vec![0; PIECE]);
    loop {
        let size = read.read(&mut piece).await.context("the transfer, receiving")?;
        match piece.get(..size).unwrap_or_default() {
            [] => return Ok(hex(sha256)),
            bytes => sha256.update(bytes),
        }
        count.send_modify(|count| *count += size as u64);
    }
}

fn hex(sha256: Sha256) -> String {
    sha256.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use tokio::net::TcpListener;

    use super::*;

    /// What becomes of a transfer whose server sends back what `answer` makes of each piece, none for a reset.
    async fn transfer(answer: fn(&mut [u8]) -> Option<&[u8]>) -> Result<String> {
        let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let stream = TcpStream::connect(server.local_addr()?).await?;
        let (mut peer, _) = server.accept().await?;
        let transfer = Transfer::begin(stream, 300_001).await?;
        let mut buffer = [0; 1000];
        // The command.
        peer.read_exact(&mut buffer[..8]).await?;
        loop {
            let size = peer.read(&mut buffer).await?;
            if size == 0 {
                break;
            }
            let Some(bytes) = answer(&mut buffer[..size]) else {
                peer.set_zero_linger()?;
                break;
            };
            peer.write_all(bytes).await?;
        }
        drop(peer);
        transfer.finish().await
    }

    #[tokio::test]
    async fn a_whole_transfer_reports_its_sha256() {
        assert_eq!(transfer(|piece| Some(piece)).await.unwrap().len(), 64);
    }

    #[tokio::test]
    async fn a_wrong_missing_or_further_byte_fails_a_transfer() {
        let wrong = transfer(|piece| {
            piece[0] ^= 1;
            Some(piece)
        });
        assert!(wrong.await.unwrap_err().to_string().contains("sha256"));
        let missing = transfer(|piece| piece.split_last().map(|(_, rest)| rest));
        assert!(missing.await.unwrap_err().to_string().contains("bytes of 300001 came back"));
        let further = transfer(|piece| if piece.len() < 1000 { Some(&[7; 2000]) } else { Some(piece) });
        assert!(further.await.unwrap_err().to_string().contains("bytes of 300001 came back"));
    }

    #[tokio::test]
    async fn a_reset_fails_a_transfer() {
        assert!(transfer(|_| None).await.is_err());
    }
}
