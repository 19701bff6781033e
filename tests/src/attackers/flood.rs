//! Floods an agent with thousands of connections, a fixed number at a time.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::attackers::raw::{Key, Offer, Packet, Raw, cut, message, uint};

/// What each connection of a flood does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Sends nothing.
    Silent,
    /// Sends a byte per second.
    Drips,
    /// Exchanges keys, and tries to log in with a key of its own.
    FailsToAuthenticate,
    /// Attests, and opens channels in an endless loop.
    OpensChannels,
    /// Attests, sends requests in an endless loop, and never reads a reply.
    NeverReads,
    /// Attests, says hello, offers the KBS, and answers none of the agent's streams.
    OffersKbs,
    /// As [`Kind::OffersKbs`]; confirms the streams and sends nothing on them.
    ConfirmsKbs,
    /// As [`Kind::OffersKbs`], and comes back no sooner than an honest adaptor might.
    OffersKbsCalmly,
}

/// A running flood; ends when dropped.
#[derive(Debug)]
pub struct Flood {
    opened: watch::Sender<u64>,
    let_in: Arc<AtomicU64>,
    connections: JoinSet<()>,
}

/// Number of source addresses of this machine.
const SOURCES: u8 = 200;
/// Those of a flood that offers the KBS.
const KBS_SOURCES: u8 = 24;

impl Kind {
    fn sources(self) -> u8 {
        match self {
            Self::OffersKbs | Self::ConfirmsKbs | Self::OffersKbsCalmly => KBS_SOURCES,
            _ => SOURCES,
        }
    }
}

impl Flood {
    /// Starts a flood of `at_once` connections at a time.
    #[must_use]
    pub fn begin(kind: Kind, agent: SocketAddr, at_once: u64) -> Self {
        let (opened, let_in) = (watch::Sender::new(0), Arc::new(AtomicU64::new(0)));
        let mut connections = JoinSet::new();
        for number in 0..at_once {
            let (opened, let_in) = (opened.clone(), let_in.clone());
            let last = 2 + u8::try_from(number % u64::from(kind.sources())).unwrap_or_default();
            let source = IpAddr::from(Ipv4Addr::new(127, 0, 0, last));
            connections.spawn(async move {
                loop {
                    // The next connection follows, however this one ends.
                    if let Ok(raw) = Raw::connect_from(source, agent).await {
                        opened.send_modify(|opened| *opened += 1);
                        drop(pester(kind, raw, &let_in).await);
                    } else {
                        // This machine is out of ports or files for a moment.
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

    /// Connections that reached the state they aimed at.
    #[must_use]
    pub fn got_far(&self) -> u64 {
        self.let_in.load(Ordering::Relaxed)
    }

    /// Waits until at least `connections` connections were opened.
    pub async fn reaches(&self, connections: u64) {
        // The sender is a field of `self`, so waiting can't fail.
        drop(self.opened.subscribe().wait_for(|opened| *opened >= connections).await);
    }

    /// Ends the flood and all its connections.
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
            // Many small packets, because a packet holds one request only.
            let mut questions = Vec::new();
            loop {
                questions.clear();
                for _ in 0..1000 {
                    questions.extend(raw.seal(&Packet::global("?"))?);
                }
                raw.write(&questions).await?;
            }
        }
        Kind::OffersKbs => offer_kbs(&mut raw, got_far).await?,
        Kind::OffersKbsCalmly => {
            let offered = async {
                offer_kbs(&mut raw, got_far).await?;
                raw.ends().await
            };
            drop(offered.await);
            sleep(Duration::from_secs(1)).await;
            return Ok(());
        }
        Kind::ConfirmsKbs => {
            offer_kbs(&mut raw, got_far).await?;
            for ours in 10.. {
                let open = raw.expect(&[message::CHANNEL_OPEN]).await?;
                let (_, rest) = cut(open.get(1..).context("a channel open")?)?;
                let confirmation = Packet::new(message::CHANNEL_OPEN_CONFIRMATION);
                let confirmation = confirmation.uint(uint(rest, 0)?).uint(ours).uint(1 << 20).uint(1 << 15);
                raw.send(&confirmation).await?;
            }
        }
    }
    raw.ends().await
}

/// Attests as an adaptor does, up to its hello and its offer of the KBS.
async fn offer_kbs(raw: &mut Raw, got_far: &AtomicU64) -> Result<()> {
    attest(raw, got_far).await?;
    let control = raw.open_control(0).await?;
    raw.send(&Packet::global("tcpip-forward").string("KBS").uint(1)).await?;
    let pod = "a".repeat(64);
    let hello = format!("{{\"hello\":{{\"version\":1,\"credit\":32768,\"pod_id\":\"{pod}\"}}}}\n");
    raw.send(&Packet::data(control, hello)).await
}

async fn attest(raw: &mut Raw, got_far: &AtomicU64) -> Result<()> {
    raw.identify().await?;
    raw.exchange_keys(Offer::default()).await?;
    raw.attest().await?;
    got_far.fetch_add(1, Ordering::Relaxed);
    Ok(())
}
