//! Receives the hello of a connection, or answers what is not one.

use std::io;

use tokio::net::TcpStream;

use super::hangup::reset;
use super::hello::{CHUNK, Hello, HelloFault, HelloReader};
use super::refusal::Refusal;

/// Receives the hello. The caller limits the time.
pub(super) async fn hello(stream: &TcpStream) -> Result<Hello, HelloFault> {
    let mut reader = HelloReader::default();
    loop {
        let mut buffer = [0; CHUNK];
        let space = buffer.get_mut(..reader.room()).unwrap_or_default();
        let piece = match receive(stream, space).await {
            Ok(0) => return Err(Refusal::ClosedEarly.into()),
            Ok(count) => space.get(..count).unwrap_or_default(),
            Err(error) => {
                return Err(HelloFault { detail: error.to_string(), ..Refusal::ClosedEarly.into() });
            }
        };
        if let Some(hello) = reader.take(piece)? {
            return Ok(hello);
        }
    }
}

async fn receive(stream: &TcpStream, space: &mut [u8]) -> io::Result<usize> {
    loop {
        stream.readable().await?;
        match stream.try_read(space) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            done => return done,
        }
    }
}

/// Answers a fault by its alert, or else by a reset.
pub(super) fn answer(fault: &HelloFault, stream: &TcpStream) {
    if fault.alert.is_empty() {
        reset(stream);
    } else if let Err(error) = stream.try_write(&fault.alert) {
        // The client is gone, or has not read: it has no need of an alert.
        tracing::debug!("caa front: no alert was sent: {error}");
    }
}
