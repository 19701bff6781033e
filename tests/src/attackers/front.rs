//! An address whose answers a test chooses: those of a forged agent, and then the real agent's.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context, Result};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;

use crate::attackers::raw::{Key, Offer, Packet, Raw, message};
use crate::harness::scene::PATIENCE;

/// Who answers at the address.
#[derive(Clone, Debug)]
pub enum Face {
    /// Something that closes every connection.
    Closes,
    /// A forged agent that claims to have latched other keys.
    Latched {
        /// What it says before it refuses.
        banner: String,
        /// Whether it shows another host key on each connection.
        new_keys: bool,
    },
    /// A forged agent that attests, answers pings, says these lines, and does nothing else.
    Attests(Vec<String>),
    /// Passes the connections on.
    Relays(SocketAddr),
}

/// The address.
#[derive(Debug)]
pub struct Front {
    address: SocketAddr,
    faces: watch::Sender<Face>,
    connections: watch::Receiver<usize>,
    serving: JoinHandle<()>,
}

impl Drop for Front {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Front {
    /// Answers at a port of 127.0.0.1.
    ///
    /// # Errors
    /// If there is no port, or no randomness for a host key.
    pub async fn start(face: Face) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let (address, key) = (listener.local_addr()?, Arc::new(Key::generate()?));
        let (count, connections) = watch::channel(0);
        let (faces, face) = watch::channel(face);
        let serving = tokio::spawn(async move {
            let mut answering = JoinSet::new();
            while let Ok((socket, _)) = listener.accept().await {
                while answering.try_join_next().is_some() {}
                let (key, mut faces) = (Arc::clone(&key), face.clone());
                let face = faces.borrow_and_update().clone();
                answering.spawn(async move {
                    tokio::select! {
                        // The adaptor ends connections as it likes: any end is fine.
                        ended = answer(socket, face, key) => drop(ended),
                        // What a former face served ends with it.
                        _ = faces.changed() => {}
                    }
                });
                count.send_modify(|count| *count += 1);
            }
        });
        Ok(Self { address, faces, connections, serving })
    }

    /// Where it answers.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Ends all connections, and answers further ones as this face does.
    pub fn becomes(&self, face: Face) {
        self.faces.send_replace(face);
    }

    /// Waits until there were this many connections.
    ///
    /// # Errors
    /// If there are not.
    pub async fn served(&self, count: usize) -> Result<()> {
        let mut connections = self.connections.clone();
        timeout(PATIENCE, connections.wait_for(|now| *now >= count))
            .await
            .context("too few connections")??;
        Ok(())
    }
}

async fn answer(mut socket: TcpStream, face: Face, key: Arc<Key>) -> Result<()> {
    match face {
        Face::Closes => Ok(()),
        Face::Latched { banner, new_keys } => {
            let key = if new_keys { Arc::new(Key::generate()?) } else { key };
            refuses(Raw::server(socket)?, &key, &banner).await
        }
        Face::Attests(lines) => attests(Raw::server(socket)?, &key, &lines).await,
        Face::Relays(address) => {
            let mut server = TcpStream::connect(address).await?;
            copy_bidirectional(&mut socket, &mut server).await?;
            Ok(())
        }
    }
}

async fn refuses(mut raw: Raw, key: &Key, banner: &str) -> Result<()> {
    raw.secure(Offer::server(), key).await?;
    raw.asked().await?;
    raw.send(&Packet::new(message::USERAUTH_BANNER).string(banner).string("")).await?;
    raw.send(&Packet::new(message::USERAUTH_FAILURE).string("password").byte(0)).await?;
    raw.ends().await
}

async fn attests(mut raw: Raw, key: &Key, lines: &[String]) -> Result<()> {
    raw.welcome(key).await?;
    let control = raw.grant_control(0, 1).await?;
    let hello =
        r#"{"hello":{"version":1,"credit":32768,"phase":"attestation","instance":"x","inbounds":["KBS"]}}"#;
    for line in [hello].into_iter().chain(lines.iter().map(String::as_str)) {
        raw.send(&Packet::data(control, format!("{line}\n"))).await?;
    }
    loop {
        let received = raw.receive().await?;
        match received.first() {
            Some(&message::GLOBAL_REQUEST) => raw.send(&Packet::new(message::REQUEST_SUCCESS)).await?,
            Some(&message::CHANNEL_DATA) => {
                for line in String::from_utf8_lossy(&received).lines() {
                    // The first line follows the fields of its message.
                    let ping = line.split_once(r#"{"ping":"#).and_then(|(_, rest)| rest.strip_suffix('}'));
                    if let Some(number) = ping {
                        raw.send(&Packet::data(control, format!("{{\"pong\":{number}}}\n"))).await?;
                    }
                }
            }
            _ => {}
        }
    }
}
