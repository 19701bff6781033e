//! Routes: where the local clients of each inbound are sent.

use secure_comms_protocol::{Attestation, InboundTag, Kubernetes, Phase, PhaseName, TunnelName};
use secure_comms_tunnel::session::SessionLink;
use secure_comms_tunnel::{Link, OpenError, Stream};
use tokio::sync::watch;

use super::deadlines::{self, DeadlineReceiver, DeadlineSender, KbsDeadlines};
use super::link::PeerLink;
use super::peer::Peer;
use super::sessions::AdaptorSession;

/// Where a client of an inbound is sent.
#[derive(Clone, Debug)]
pub(crate) enum Route {
    /// To a peer.
    Peer(PeerLink),
    /// To the adaptor, over the connection that its session has then.
    Session(SessionLink<PeerLink>),
    /// To the KBS through an attestation peer, with deadlines.
    WithDeadlines(PeerLink, KbsDeadlines),
    /// To a refusal: the attempt that the client belongs to has failed, and should fail fast.
    Refuse,
}

impl Link for Route {
    type Receiver = DeadlineReceiver;
    type Sender = DeadlineSender;

    async fn open(&self, name: &TunnelName) -> Result<Stream<DeadlineReceiver, DeadlineSender>, OpenError> {
        match self {
            Self::Peer(link) => Ok(deadlines::unlimited(link.open(name).await?)),
            Self::Session(link) => Ok(deadlines::unlimited(link.open(name).await?)),
            Self::WithDeadlines(link, limits) => deadlines::open_with_deadlines(link, name, limits).await,
            Self::Refuse => Err(OpenError::Refused("the attestation peer of this attempt is gone".into())),
        }
    }

    async fn ready(&self, name: &TunnelName) {
        if let Self::Session(link) = self {
            link.ready(name).await;
        }
    }

    fn is_gone(&self) -> bool {
        match self {
            Self::Peer(link) | Self::WithDeadlines(link, _) => link.is_gone(),
            Self::Session(link) => link.is_gone(),
            Self::Refuse => false,
        }
    }
}

/// The routes of all inbounds. The clients of an inbound without a route wait.
#[derive(Debug)]
pub(crate) struct Routes(Vec<(InboundTag, watch::Sender<Option<Route>>)>);

impl Routes {
    /// No route for any of these inbounds.
    pub(crate) fn new(tags: &[InboundTag]) -> Self {
        Self(tags.iter().map(|tag| (tag.clone(), watch::Sender::new(None))).collect())
    }

    /// Follows the route of one inbound.
    pub(crate) fn subscribe(&self, tag: &InboundTag) -> Option<watch::Receiver<Option<Route>>> {
        self.0.iter().find(|(own, _)| own == tag).map(|(_, route)| route.subscribe())
    }

    /// Names of the inbounds of a phase, for `hello`.
    pub(crate) fn names(&self, phase: PhaseName) -> Vec<String> {
        self.0
            .iter()
            .filter(|(tag, _)| tag.phases.includes(phase))
            .map(|(tag, _)| tag.name.to_string())
            .collect()
    }

    /// The inbounds of a phase.
    pub(crate) fn tags(&self, phase: PhaseName) -> impl Iterator<Item = &InboundTag> {
        self.0.iter().map(|(tag, _)| tag).filter(move |tag| tag.phases.includes(phase))
    }

    /// Whether a peer of this phase may ask to have `name` forwarded.
    pub(crate) fn has(&self, phase: PhaseName, name: &TunnelName) -> bool {
        self.0.iter().any(|(tag, _)| tag.phases.includes(phase) && &tag.name == name)
    }

    /// Routes the Attestation phase to the peer of the current attempt. Only the KBS tunnel has deadlines: the KBS is
    /// known to answer, an operator's tunnel may be silent.
    pub(crate) fn set_attestation(&self, peer: &Peer<Attestation>, limits: &KbsDeadlines) {
        let kbs = TunnelName::kbs();
        self.set(Attestation::NAME, |name| {
            let link = peer.offers(name).then(|| peer.link.clone())?;
            Some(if *name == kbs { Route::WithDeadlines(link, limits.clone()) } else { Route::Peer(link) })
        });
    }

    /// Refuses clients of the Attestation phase: the current attempt has lost its peer.
    pub(crate) fn refuse_attestation(&self) {
        self.set(Attestation::NAME, |_| Some(Route::Refuse));
    }

    /// Routes the Kubernetes phase to this peer.
    pub(crate) fn set_kubernetes(&self, peer: &Peer<Kubernetes>) {
        self.set(Kubernetes::NAME, |name| peer.offers(name).then(|| Route::Peer(peer.link.clone())));
    }

    /// Routes the Kubernetes phase to the adaptor of this session.
    pub(crate) fn set_session(&self, session: &AdaptorSession) {
        let link = session.streams.link();
        self.set(Kubernetes::NAME, |name| session.offers(name).then(|| Route::Session(link.clone())));
    }

    /// Removes every route: clients wait.
    pub(crate) fn clear(&self) {
        for (_, route) in &self.0 {
            route.send_replace(None);
        }
    }

    /// Sets the routes of a phase. Inbounds that the phase does not have get none.
    fn set(&self, phase: PhaseName, route: impl Fn(&TunnelName) -> Option<Route>) {
        for (tag, sender) in &self.0 {
            sender.send_replace(if tag.phases.includes(phase) { route(&tag.name) } else { None });
        }
    }
}
