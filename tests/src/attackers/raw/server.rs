//! The server role: plays the agent to an adaptor.

use anyhow::{Context, Result, bail, ensure};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use super::packet::{Packet, cut};
use super::{Key, Offer, Raw, message};
use crate::harness::scene::PATIENCE;

impl Raw {
    /// Accepts the next connection, and reads nothing.
    ///
    /// # Errors
    /// If none comes.
    pub async fn accept(listener: &TcpListener) -> Result<Self> {
        let accepted = timeout(PATIENCE, listener.accept()).await.context("raw: no connection came")?;
        Self::server(accepted?.0)
    }

    /// Plays the server on a socket.
    ///
    /// # Errors
    /// If the socket is closed.
    pub fn server(socket: TcpStream) -> Result<Self> {
        Self::over(socket, false)
    }

    /// Exchanges keys, with a correct signature.
    ///
    /// # Errors
    /// If the adaptor ends the connection, for instance because of the host key.
    pub async fn secure(&mut self, offer: Offer, host_key: &Key) -> Result<()> {
        self.identify().await?;
        let exchange = self.begin(offer).await?;
        let keys = self.agree_as(exchange, host_key).await?;
        self.seal_with(&keys).await?;
        self.open_with(&keys).await
    }

    /// Accepts the authentication service; returns the client's first request.
    ///
    /// # Errors
    /// If the adaptor ends the connection.
    pub async fn asked(&mut self) -> Result<Vec<u8>> {
        self.expect(&[message::SERVICE_REQUEST]).await?;
        self.send(&Packet::new(message::SERVICE_ACCEPT).string("ssh-userauth")).await?;
        self.expect(&[message::USERAUTH_REQUEST]).await
    }

    /// Exchanges keys, and accepts any login.
    ///
    /// # Errors
    /// If the adaptor ends the connection.
    pub async fn welcome(&mut self, host_key: &Key) -> Result<()> {
        self.secure(Offer::server(), host_key).await?;
        self.let_in().await
    }

    /// Accepts any login, whatever its key.
    ///
    /// # Errors
    /// If the adaptor ends the connection.
    pub async fn let_in(&mut self) -> Result<()> {
        self.asked().await?;
        self.send(&Packet::new(message::USERAUTH_SUCCESS)).await
    }

    /// Accepts the control channel, as `ours`, and `forwards` forwards; returns the adaptor's channel number.
    ///
    /// # Errors
    /// If the adaptor does not ask for them.
    pub async fn grant_control(&mut self, ours: u32, mut forwards: usize) -> Result<u32> {
        let mut channel = None;
        let mut granted = false;
        while !granted || forwards > 0 {
            let asked = self
                .expect(&[message::CHANNEL_OPEN, message::CHANNEL_REQUEST, message::GLOBAL_REQUEST])
                .await?;
            match (asked.first(), channel) {
                (Some(&message::CHANNEL_OPEN), None) => {
                    let (kind, rest) = cut(asked.get(1..).unwrap_or_default())?;
                    ensure!(kind == b"session", "raw: a stream comes first");
                    let theirs = super::uint(rest, 0)?;
                    channel = Some(theirs);
                    let confirmation =
                        Packet::new(message::CHANNEL_OPEN_CONFIRMATION).uint(theirs).uint(ours);
                    self.send(&confirmation.uint(1 << 20).uint(1 << 15)).await?;
                }
                (Some(&message::CHANNEL_REQUEST), Some(theirs)) => {
                    granted = true;
                    self.send(&Packet::new(message::CHANNEL_SUCCESS).uint(theirs)).await?;
                }
                (Some(&message::GLOBAL_REQUEST), _) => {
                    let (name, _) = cut(asked.get(1..).unwrap_or_default())?;
                    forwards = forwards.saturating_sub(usize::from(name == b"tcpip-forward"));
                    self.send(&Packet::new(message::REQUEST_SUCCESS)).await?;
                }
                _ => bail!("raw: more than a control channel: {}", asked.escape_ascii()),
            }
        }
        channel.context("raw: no control channel")
    }
}
