//! Where clients of the agent's inbounds go: to the peer whose turn it is, or nowhere yet.

use std::sync::Arc;
use std::time::Duration;

use secure_comms_protocol::{Attestation, InboundTag, Kubernetes, Phase, PhaseName, TunnelName};
use secure_comms_tunnel::{Event, Link, OpenError, Receiver, Stream};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, timeout_at};

use crate::peers::Peer;
use crate::ssh::{PeerLink, PeerReceiver, PeerSender};

/// Where a client of an inbound goes.
#[derive(Clone, Debug)]
pub enum Route {
    /// To a peer.
    Peer(PeerLink),
    /// To an attestation peer, which must say something soon.
    Hurried(PeerLink, Hurry),
    /// Away at once: the attempt it belongs to has failed, and should fail fast.
    Refuse,
}

/// How soon a stream must bring its first byte, and whom to tell that it did not.
#[derive(Clone, Debug)]
pub struct Hurry {
    /// The limit.
    pub first_byte: Duration,
    /// Told when a stream brought nothing.
    pub silent: Arc<Notify>,
}

impl Link for Route {
    type Receiver = RouteReceiver;
    type Sender = PeerSender;

    async fn open(&self, name: &TunnelName) -> Result<Stream<RouteReceiver, PeerSender>, OpenError> {
        let (link, hurry) = match self {
            Self::Refuse => {
                return Err(OpenError::Refused("the attestation peer of this attempt is gone".into()));
            }
            Self::Peer(link) => (link, None),
            Self::Hurried(link, hurry) => {
                (link, Some((Instant::now() + hurry.first_byte, hurry.silent.clone())))
            }
        };
        let Stream { receiver, sender, flow } = match &hurry {
            None => link.open(name).await?,
            Some((deadline, silent)) => match timeout_at(*deadline, link.open(name)).await {
                Ok(opened) => opened?,
                Err(_) => {
                    silent.notify_one();
                    return Err(OpenError::Refused("the attestation peer does not answer".into()));
                }
            },
        };
        Ok(Stream { receiver: RouteReceiver { receiver, hurry }, sender, flow })
    }

    fn is_gone(&self) -> bool {
        match self {
            Self::Peer(link) | Self::Hurried(link, _) => link.is_gone(),
            Self::Refuse => false,
        }
    }
}

/// A receiver that closes the stream when no first byte comes in time.
#[derive(Debug)]
pub struct RouteReceiver {
    receiver: PeerReceiver,
    hurry: Option<(Instant, Arc<Notify>)>,
}

impl Receiver for RouteReceiver {
    async fn recv(&mut self) -> Option<Event> {
        let Some((deadline, silent)) = &self.hurry else { return self.receiver.recv().await };
        match timeout_at(*deadline, self.receiver.recv()).await {
            Ok(event) => {
                self.hurry = None;
                event
            }
            Err(_) => {
                silent.notify_one();
                Some(Event::Close)
            }
        }
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

    /// The attempt under way belongs to this peer.
    pub fn attest(&self, peer: &Peer<Attestation>, hurry: &Hurry) {
        self.set(Attestation::NAME, |name| {
            peer.offers(name).then(|| Route::Hurried(peer.link.clone(), hurry.clone()))
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
