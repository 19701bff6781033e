//! A TCP path that can be cut and frozen: what lies between the worker node and the VM, in hostile hands.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use anyhow::{Context, Result};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// What the path does with the connections on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Carries them.
    Carries,
    /// Takes them and moves nothing: half-open to both sides.
    Frozen,
}

/// A path from a local address to a server; ends with its connections when dropped.
#[derive(Debug)]
pub struct Cable {
    address: SocketAddr,
    state: watch::Sender<State>,
    cuts: watch::Sender<u64>,
    serving: JoinHandle<()>,
}

impl Cable {
    /// Lays it to `server`.
    ///
    /// # Errors
    /// No port is free.
    pub async fn to(server: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.context("laying a cable")?;
        let address = listener.local_addr()?;
        let (state, cuts) = (watch::Sender::new(State::Carries), watch::Sender::new(0));
        let ends = Arc::new((state.subscribe(), cuts.subscribe()));
        let serving = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (state, cuts) = (ends.0.clone(), ends.1.clone());
                tokio::spawn(carry(client, server, state, cuts));
            }
        });
        Ok(Self { address, state, cuts, serving })
    }

    /// Where clients connect.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Resets every connection; new ones are carried.
    pub fn cut(&self) {
        self.cuts.send_modify(|cuts| *cuts += 1);
    }

    /// Carries nothing from now on, and tells nobody.
    pub fn freeze(&self) {
        self.state.send_replace(State::Frozen);
    }

    /// Carries again, what was held back first.
    pub fn thaw(&self) {
        self.state.send_replace(State::Carries);
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        self.serving.abort();
        self.cut();
    }
}

async fn carry(
    client: TcpStream,
    server: SocketAddr,
    state: watch::Receiver<State>,
    mut cuts: watch::Receiver<u64>,
) {
    cuts.mark_unchanged();
    let Ok(server) = TcpStream::connect(server).await else { return reset(client) };
    let ((client_read, client_write), (server_read, server_write)) =
        (client.into_split(), server.into_split());
    let up = pump(client_read, server_write, state.clone());
    let down = pump(server_read, client_write, state);
    tokio::pin!(up, down);
    tokio::select! {
        _ = cuts.changed() => {}
        _ = async { tokio::join!(&mut up, &mut down) } => {}
    }
}

/// Dropping a socket after this resets its connection.
fn reset(stream: TcpStream) {
    // A socket that is dead already can't be reset.
    drop(stream.set_zero_linger());
}

async fn pump(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut state: watch::Receiver<State>) {
    drop(from.as_ref().set_zero_linger());
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let read = from.read(&mut buffer).await;
        if state.wait_for(|state| *state == State::Carries).await.is_err() {
            return;
        }
        let goes_on = match read {
            Ok(len @ 1..) => to.write_all(buffer.get(..len).unwrap_or_default()).await.is_ok(),
            Ok(_) => {
                // That the other side is dead already makes no difference.
                drop(to.shutdown().await);
                false
            }
            Err(_) => false,
        };
        if !goes_on {
            return;
        }
    }
}
