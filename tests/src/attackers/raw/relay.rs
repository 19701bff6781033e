//! Relays packets between two connections, as a man in the middle who has agreed on keys with both ends.

use anyhow::Result;
use tokio::io::AsyncWriteExt;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};

use super::cipher::Cipher;
use super::{Raw, frame, read_packet, seal_body};

impl Raw {
    /// Relays every packet until either connection ends; `pass` sees each packet and decides whether it is relayed.
    /// The first argument of `pass` is true for packets of `self`.
    pub async fn relay(self, other: Self, pass: impl Fn(bool, &[u8]) -> bool) {
        let ((read, write), (other_read, other_write)) =
            (self.socket.into_split(), other.socket.into_split());
        let there =
            carry((read, self.incoming, self.received), (other_write, other.out, other.sent), |payload| {
                pass(true, payload)
            });
        let back =
            carry((other_read, other.incoming, other.received), (write, self.out, self.sent), |payload| {
                pass(false, payload)
            });
        // Both connections are dropped, however one ends.
        tokio::select! {
            ended = there => drop(ended),
            ended = back => drop(ended),
        }
    }
}

async fn carry(
    (mut from, mut opens, mut received): (OwnedReadHalf, Option<Cipher>, u32),
    (mut to, mut seals, mut sent): (OwnedWriteHalf, Option<Cipher>, u32),
    pass: impl Fn(&[u8]) -> bool,
) -> Result<()> {
    loop {
        let payload = read_packet(&mut from, &mut opens, &mut received).await?;
        if pass(&payload) {
            let body = frame(&payload, seals.is_some())?;
            let sealed = seal_body(&mut seals, &mut sent, u32::try_from(body.len())?, body)?;
            to.write_all(&sealed).await?;
        }
    }
}
