//! Routes the local clients of an inbound to the connection or session of the inbound's phase.

use bytes::Bytes;
use secure_comms_protocol::{Attestation, Kubernetes, PhaseSet, TunnelName};
use secure_comms_tunnel::link::Gone;
use secure_comms_tunnel::session::{SessionLink, SessionReceiver, SessionSender};
use secure_comms_tunnel::{Event, Inbound, Link, OpenError, Receiver, Sender, Stream};
use tokio::sync::watch;

use crate::transport::ssh::AgentLink;

/// The current link of each phase. The types keep a client of a Kubernetes-phase inbound from an Attestation link.
#[derive(Debug)]
pub(crate) struct Routes {
    attestation: watch::Sender<Option<AgentLink<Attestation>>>,
    kubernetes: watch::Sender<Option<KubernetesLink>>,
    both: watch::Sender<Option<PhaseLink>>,
}

/// Opens streams in the Kubernetes phase.
#[derive(Clone, Debug)]
pub(crate) enum KubernetesLink {
    /// On a connection without a session.
    Alone(AgentLink<Kubernetes>),
    /// In a session.
    Session(SessionLink<AgentLink<Kubernetes>>),
}

/// The link of a `BOTH_PHASES` inbound, in whichever phase the connection is.
#[derive(Clone, Debug)]
pub(crate) enum PhaseLink {
    Attestation(AgentLink<Attestation>),
    Kubernetes(KubernetesLink),
}

/// Receiving half of a stream, with or without a session.
#[derive(Debug)]
pub(crate) enum AnyReceiver {
    Channel(<AgentLink<Kubernetes> as Link>::Receiver),
    Session(SessionReceiver<AgentLink<Kubernetes>>),
}

/// Sending half of a stream, with or without a session.
#[derive(Debug)]
pub(crate) enum AnySender {
    Channel(<AgentLink<Kubernetes> as Link>::Sender),
    Session(SessionSender<AgentLink<Kubernetes>>),
}

impl Receiver for AnyReceiver {
    async fn recv(&mut self) -> Option<Event> {
        match self {
            Self::Channel(channel) => channel.recv().await,
            Self::Session(stream) => stream.recv().await,
        }
    }
}

impl Sender for AnySender {
    async fn send(&self, data: Bytes) -> Result<(), Gone> {
        match self {
            Self::Channel(channel) => channel.send(data).await,
            Self::Session(stream) => stream.send(data).await,
        }
    }

    async fn eof(&self) -> Result<(), Gone> {
        match self {
            Self::Channel(channel) => channel.eof().await,
            Self::Session(stream) => stream.eof().await,
        }
    }

    async fn close(&self) -> Result<(), Gone> {
        match self {
            Self::Channel(channel) => channel.close().await,
            Self::Session(stream) => stream.close().await,
        }
    }
}

impl Link for KubernetesLink {
    type Receiver = AnyReceiver;
    type Sender = AnySender;

    async fn open(&self, name: &TunnelName) -> Result<Stream<AnyReceiver, AnySender>, OpenError> {
        match self {
            Self::Alone(link) => link.open(name).await.map(of_channel),
            Self::Session(link) => {
                let Stream { receiver, sender, flow } = link.open(name).await?;
                Ok(Stream {
                    receiver: AnyReceiver::Session(receiver),
                    sender: AnySender::Session(sender),
                    flow,
                })
            }
        }
    }

    async fn ready(&self, name: &TunnelName) {
        if let Self::Session(link) = self {
            link.ready(name).await;
        }
    }

    fn is_gone(&self) -> bool {
        match self {
            Self::Alone(link) => link.is_gone(),
            Self::Session(link) => link.is_gone(),
        }
    }
}

fn of_channel(
    stream: Stream<<AgentLink<Kubernetes> as Link>::Receiver, <AgentLink<Kubernetes> as Link>::Sender>,
) -> Stream<AnyReceiver, AnySender> {
    let Stream { receiver, sender, flow } = stream;
    Stream { receiver: AnyReceiver::Channel(receiver), sender: AnySender::Channel(sender), flow }
}

impl Link for PhaseLink {
    type Receiver = AnyReceiver;
    type Sender = AnySender;

    async fn open(&self, name: &TunnelName) -> Result<Stream<AnyReceiver, AnySender>, OpenError> {
        match self {
            Self::Attestation(link) => link.open(name).await.map(of_channel),
            Self::Kubernetes(link) => link.open(name).await,
        }
    }

    async fn ready(&self, name: &TunnelName) {
        if let Self::Kubernetes(link) = self {
            link.ready(name).await;
        }
    }

    fn is_gone(&self) -> bool {
        match self {
            Self::Attestation(link) => link.is_gone(),
            Self::Kubernetes(link) => link.is_gone(),
        }
    }
}

impl Default for Routes {
    fn default() -> Self {
        Self {
            attestation: watch::Sender::new(None),
            kubernetes: watch::Sender::new(None),
            both: watch::Sender::new(None),
        }
    }
}

impl Routes {
    /// Serves the clients of an inbound. Dropping the future closes the inbound and ends its streams.
    pub(crate) fn serve(&self, inbound: Inbound) -> impl Future<Output = ()> + Send + use<> {
        let phases = inbound.tag().phases;
        let (attestation, kubernetes, both) =
            (self.attestation.subscribe(), self.kubernetes.subscribe(), self.both.subscribe());
        async move {
            match phases {
                PhaseSet::Attestation => inbound.serve(attestation).await,
                PhaseSet::Kubernetes => inbound.serve(kubernetes).await,
                PhaseSet::Both => inbound.serve(both).await,
            }
        }
    }

    /// Routes the clients of the Attestation phase to an agent, or lets new ones wait. Those of a session that waits for a
    /// connection stay with it.
    pub(crate) fn set_attestation(&self, link: Option<AgentLink<Attestation>>) {
        if self.kubernetes.borrow().is_none() {
            self.both.send_replace(link.clone().map(PhaseLink::Attestation));
        }
        self.attestation.send_replace(link);
    }

    /// Routes the clients of the Kubernetes phase to the agent.
    pub(crate) fn set_kubernetes(&self, link: KubernetesLink) {
        self.both.send_replace(Some(PhaseLink::Kubernetes(link.clone())));
        self.kubernetes.send_replace(Some(link));
    }

    /// The link of the Kubernetes phase, if there is one that is not gone.
    pub(crate) fn kubernetes(&self) -> Option<KubernetesLink> {
        self.kubernetes.borrow().clone().filter(|link| !link.is_gone())
    }

    /// Removes the links: new clients wait for the next one. Open streams are not affected.
    pub(crate) fn close(&self) {
        self.attestation.send_replace(None);
        self.kubernetes.send_replace(None);
        self.both.send_replace(None);
    }
}
