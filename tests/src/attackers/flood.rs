//! Thousands of connections that mean no good, at an agent: as fast as it takes them, so many at a time.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Result;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::attackers::raw::{Key, Offer, Packet, Raw, message};

/// What each connection of a flood does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Says nothing.
    Silent,
    /// Sends a byte a second.
    Drips,
    /// Exchanges keys, and tries one of its own.
    FailsToAuthenticate,
    /// Attests, and opens channels for ever.
    OpensChannels,
    /// Attests, asks for ever and never reads an answer.
    NeverReads,
}

/// Every kind.
pub const KINDS: [Kind; 5] =
    [Kind::Silent, Kind::Drips, Kind::FailsToAuthenticate, Kind::OpensChannels, Kind::NeverReads];

/// A flood under way; ends when dropped.
#[derive(Debug)]
pub struct Flood {
    opened: watch::Sender<u64>,
    let_in: Arc<AtomicU64>,
    connections: JoinSet<()>,
}

/// Where a flood comes from: this many addresses of this machine.
const SOURCES: u8 = 200;

impl Flood {
    /// Begins one, with so many connections at a time.
    #[must_use]
    pub fn begin(kind: Kind, agent: SocketAddr, at_once: u64) -> Self {
        let (opened, let_in) = (watch::Sender::new(0), Arc::new(AtomicU64::new(0)));
        let mut connections = JoinSet::new();
        for number in 0..at_once {
            let (opened, let_in) = (opened.clone(), let_in.clone());
            let last = 2 + u8::try_from(number % u64::from(SOURCES)).unwrap_or_default();
            let source = IpAddr::from(Ipv4Addr::new(127, 0, 0, last));
            connections.spawn(async move {
                loop {
                    // However it ends, the next one comes.
                    if let Ok(raw) = Raw::connect_from(source, agent).await {
                        opened.send_modify(|opened| *opened += 1);
                        drop(pester(kind, raw, &let_in).await);
                    } else {
                        // Ports and files of this machine are used up for a moment.
                        sleep(Duration::from_millis(10)).await;
                    }
                }
            });
        }
        Self { opened, let_in, connections }
    }

    /// Connections so far.
    #[must_use]
    pub fn opened(&self) -> u64 {
        *self.opened.borrow()
    }

    /// Of these, the ones that got as far as they wanted.
    #[must_use]
    pub fn got_far(&self) -> u64 {
        self.let_in.load(Ordering::Relaxed)
    }

    /// Waits until there have been as many.
    pub async fn reaches(&self, connections: u64) {
        // The sender is ours.
        drop(self.opened.subscribe().wait_for(|opened| *opened >= connections).await);
    }

    /// Ends it, with all its connections.
    pub async fn end(mut self) {
        self.connections.shutdown().await;
    }
}

async fn pester(kind: Kind, mut raw: Raw, got_far: &AtomicU64) -> Result<()> {
    match kind {
        Kind::Silent => {}
        Kind::Drips => {
            for byte in b"SSH-2.0-Drip".iter().cycle() {
                tokio::select! {
                    ended = raw.ends() => return ended,
                    () = sleep(Duration::from_secs(1)) => raw.write(&[*byte]).await?,
                }
            }
        }
        Kind::FailsToAuthenticate => {
            raw.identify().await?;
            raw.exchange_keys(Offer::default()).await?;
            raw.ask_to_authenticate().await?;
            let login = Key::generate()?.login("kubernetes", raw.session());
            raw.authenticate(&login).await?;
            got_far.fetch_add(1, Ordering::Relaxed);
            return Ok(());
        }
        Kind::OpensChannels => {
            attest(&mut raw, got_far).await?;
            for id in 0.. {
                raw.send(&Packet::open("session", id)).await?;
                let stream = Packet::open("direct-tcpip", id).string("KBS").uint(1).string("127.0.0.1");
                raw.send(&stream.uint(2 * id + 1)).await?;
                let answers = [message::CHANNEL_OPEN_CONFIRMATION, message::CHANNEL_OPEN_FAILURE];
                raw.expect(&answers).await?;
                raw.expect(&answers).await?;
            }
        }
        Kind::NeverReads => {
            attest(&mut raw, got_far).await?;
            // The largest packets that hold as many questions as possible would be one question: many small ones.
            let mut questions = Vec::new();
            loop {
                questions.clear();
                for _ in 0..1000 {
                    questions.extend(raw.seal(&Packet::global("?"))?);
                }
                raw.write(&questions).await?;
            }
        }
    }
    raw.ends().await
}

async fn attest(raw: &mut Raw, got_far: &AtomicU64) -> Result<()> {
    raw.identify().await?;
    raw.exchange_keys(Offer::default()).await?;
    raw.attest().await?;
    got_far.fetch_add(1, Ordering::Relaxed);
    Ok(())
}
