//! Routes the local clients of an inbound to the connection of the inbound's phase.

use secure_comms_protocol::{Attestation, Kubernetes, PhaseSet, TunnelName};
use secure_comms_tunnel::{Inbound, Link, OpenError, Stream};
use tokio::sync::watch;

use crate::transport::ssh::AgentLink;

/// The current link of each phase. The types keep a client of a Kubernetes-phase inbound from an Attestation link.
#[derive(Debug)]
pub(crate) struct Routes {
    attestation: watch::Sender<Option<AgentLink<Attestation>>>,
    kubernetes: watch::Sender<Option<AgentLink<Kubernetes>>>,
    both: watch::Sender<Option<PhaseLink>>,
}

/// The link of a `BOTH_PHASES` inbound, in whichever phase the connection is.
#[derive(Clone, Debug)]
pub(crate) enum PhaseLink {
    Attestation(AgentLink<Attestation>),
    Kubernetes(AgentLink<Kubernetes>),
}

impl Link for PhaseLink {
    type Receiver = <AgentLink<Kubernetes> as Link>::Receiver;
    type Sender = <AgentLink<Kubernetes> as Link>::Sender;

    async fn open(&self, name: &TunnelName) -> Result<Stream<Self::Receiver, Self::Sender>, OpenError> {
        match self {
            Self::Attestation(link) => link.open(name).await,
            Self::Kubernetes(link) => link.open(name).await,
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

    /// Routes clients to an agent in the Attestation phase.
    pub(crate) fn set_attestation(&self, link: AgentLink<Attestation>) {
        self.both.send_replace(Some(PhaseLink::Attestation(link.clone())));
        self.attestation.send_replace(Some(link));
    }

    /// Routes clients to the agent in the Kubernetes phase.
    pub(crate) fn set_kubernetes(&self, link: AgentLink<Kubernetes>) {
        self.both.send_replace(Some(PhaseLink::Kubernetes(link.clone())));
        self.kubernetes.send_replace(Some(link));
    }

    /// Removes the links: new clients wait for the next one. Open streams are not affected.
    pub(crate) fn close(&self) {
        self.attestation.send_replace(None);
        self.kubernetes.send_replace(None);
        self.both.send_replace(None);
    }
}
