//! Where clients of the agent's inbounds go: to the peer whose turn it is, or nowhere yet.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use secure_comms_protocol::{Attestation, InboundTag, Kubernetes, Phase, PhaseName, TunnelName};
use secure_comms_tunnel::link::Gone;
use secure_comms_tunnel::{Event, Link, OpenError, Receiver, Sender, Stream};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, timeout_at};

use crate::peers::Peer;
use crate::server::{PeerLink, PeerReceiver, PeerSender};

/// Where a client of an inbound goes.
#[derive(Clone, Debug)]
pub enum Route {
    /// To a peer.
    Peer(PeerLink),
    /// To the KBS of an attestation peer, which must say something soon.
    Hurried(PeerLink, Hurry),
    /// Away at once: the attempt it belongs to has failed, and should fail fast.
    Refuse,
}

/// How soon a stream must bring something, and whom to tell that it did not.
#[derive(Clone, Debug)]
pub struct Hurry {
    /// The limit for its first byte.
    pub first_byte: Duration,
    /// The limit for a pause after that.
    pub pause: Duration,
    /// Told when a stream brought nothing.
    pub silent: Arc<Notify>,
    /// Whether a stream was closed for a pause.
    pub paused: Arc<AtomicBool>,
}

/// When a stream must have brought its first byte, or its pause ends.
type Deadline = Arc<watch::Sender<Due>>;

#[derive(Clone, Copy, Debug)]
enum Due {
    FirstByte(Instant),
    Anything(Instant),
}

impl Due {
    fn at(self) -> Instant {
        match self {
            Self::FirstByte(at) | Self::Anything(at) => at,
        }
    }
}

impl Link for Route {
    type Receiver = RouteReceiver;
    type Sender = RouteSender;

    async fn open(&self, name: &TunnelName) -> Result<Stream<RouteReceiver, RouteSender>, OpenError> {
        let (link, hurry) = match self {
            Self::Refuse => {
                return Err(OpenError::Refused("the attestation peer of this attempt is gone".into()));
            }
            Self::Peer(link) => {
                let Stream { receiver, sender, flow } = link.open(name).await?;
                return Ok(Stream {
                    receiver: RouteReceiver { receiver, hurry: None },
                    sender: RouteSender { sender, hurry: None },
                    flow,
                });
            }
            Self::Hurried(link, hurry) => (link, hurry),
        };
        let first = Instant::now() + hurry.first_byte;
        let Stream { receiver, sender, flow } = match timeout_at(first, link.open(name)).await {
            Ok(opened) => opened?,
            Err(_) => {
                hurry.silent.notify_one();
                return Err(OpenError::Refused("the attestation peer does not answer".into()));
            }
        };
        let deadline = Arc::new(watch::Sender::new(Due::FirstByte(first)));
        Ok(Stream {
            receiver: RouteReceiver { receiver, hurry: Some((deadline.clone(), hurry.clone())) },
            sender: RouteSender { sender, hurry: Some((deadline, hurry.pause)) },
            flow,
        })
    }

    fn is_gone(&self) -> bool {
        match self {
            Self::Peer(link) | Self::Hurried(link, _) => link.is_gone(),
            Self::Refuse => false,
        }
    }
}

/// A receiver that closes the stream when nothing comes in time. Without a first byte the peer is to blame. After it a pause may also be
/// the guest's, which meets a closed connection then and asks again, or fails at once.
#[derive(Debug)]
pub struct RouteReceiver {
    receiver: PeerReceiver,
    hurry: Option<(Deadline, Hurry)>,
}

impl Receiver for RouteReceiver {
    async fn recv(&mut self) -> Option<Event> {
        let Some((deadline, hurry)) = &self.hurry else { return self.receiver.recv().await };
        tokio::select! {
            biased;
            event = self.receiver.recv() => {
                deadline.send_replace(Due::Anything(Instant::now() + hurry.pause));
                event
            }
            due = passes(deadline) => {
                match due {
                    Due::FirstByte(_) => hurry.silent.notify_one(),
                    Due::Anything(_) => hurry.paused.store(true, Ordering::Relaxed),
                }
                Some(Event::Close)
            }
        }
    }
}

async fn passes(deadline: &Deadline) -> Due {
    let mut changes = deadline.subscribe();
    loop {
        let due = *changes.borrow_and_update();
        // It can't be closed: the receiver has it too.
        if timeout_at(due.at(), changes.changed()).await.is_err() {
            return due;
        }
    }
}

/// A sender that ends a pause.
#[derive(Debug)]
pub struct RouteSender {
    sender: PeerSender,
    hurry: Option<(Deadline, Duration)>,
}

impl Sender for RouteSender {
    async fn send(&self, data: Bytes) -> Result<(), Gone> {
        if let Some((deadline, pause)) = &self.hurry {
            deadline.send_if_modified(|due| match due {
                Due::FirstByte(_) => false,
                Due::Anything(at) => {
                    *at = Instant::now() + *pause;
                    true
                }
            });
        }
        self.sender.send(data).await
    }

    async fn eof(&self) -> Result<(), Gone> {
        self.sender.eof().await
    }

    async fn close(&self) -> Result<(), Gone> {
        self.sender.close().await
    }
}

/// The routes of all inbounds.
#[derive(Debug)]
pub struct Routes(Vec<(InboundTag, watch::Sender<Option<Route>>)>);

impl Routes {
    /// A route for each inbound; clients of all of them wait.
    pub fn new(tags: &[InboundTag]) -> Self {
        Self(tags.iter().map(|tag| (tag.clone(), watch::Sender::new(None))).collect())
    }

    /// The route of one inbound.
    pub fn of(&self, tag: &InboundTag) -> Option<watch::Receiver<Option<Route>>> {
        self.0.iter().find(|(own, _)| own == tag).map(|(_, route)| route.subscribe())
    }

    /// Names of the inbounds of a phase, for `hello`.
    pub fn names(&self, phase: PhaseName) -> Vec<String> {
        self.0
            .iter()
            .filter(|(tag, _)| tag.phases.includes(phase))
            .map(|(tag, _)| tag.name.to_string())
            .collect()
    }

    /// Whether a peer of this phase may ask to have `name` forwarded.
    pub fn has(&self, phase: PhaseName, name: &TunnelName) -> bool {
        self.0.iter().any(|(tag, _)| tag.phases.includes(phase) && &tag.name == name)
    }

    /// The attempt under way belongs to this peer. Of the KBS an answer is known to be due; an operator's tunnel may be silent.
    pub fn attest(&self, peer: &Peer<Attestation>, hurry: &Hurry) {
        let kbs = TunnelName::kbs();
        self.set(Attestation::NAME, |name| {
            let link = peer.offers(name).then(|| peer.link.clone())?;
            Some(if *name == kbs { Route::Hurried(link, hurry.clone()) } else { Route::Peer(link) })
        });
    }

    /// The attempt under way has lost its peer.
    pub fn refuse(&self) {
        self.set(Attestation::NAME, |_| Some(Route::Refuse));
    }

    /// This worker node drives the pod.
    pub fn kubernetes(&self, peer: &Peer<Kubernetes>) {
        self.set(Kubernetes::NAME, |name| peer.offers(name).then(|| Route::Peer(peer.link.clone())));
    }

    /// Nobody's turn: clients wait.
    pub fn hold(&self) {
        for (_, route) in &self.0 {
            route.send_replace(None);
        }
    }

    /// Inbounds that do not exist in the phase serve nobody in it.
    fn set(&self, phase: PhaseName, route: impl Fn(&TunnelName) -> Option<Route>) {
        for (tag, sender) in &self.0 {
            sender.send_replace(if tag.phases.includes(phase) { route(&tag.name) } else { None });
        }
    }
}
