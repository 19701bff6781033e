//! What an authenticated peer may do: open streams, offer tunnels, hold the control channel.

use std::sync::Arc;

use russh::server::Handle;
use secure_comms_protocol::{Attestation, Kubernetes, PhaseName, TunnelName};
use secure_comms_tunnel::flow::{PeerFlow, Side};
use secure_comms_tunnel::{Credits, Outbounds};
use tokio::sync::oneshot;

use super::control::{becomes_subsystem, run_control_channel, settle_without_hello};
use super::lanes::MemberSlot;
use super::phase::AgentPhase;
use super::status;
use super::streams::{Asked, serve};
use crate::agent::Agent;
use crate::connection::Connection;
use crate::peers::link::{ForwardOpener, Offers, PeerLink, PeerPending, PeerReceiver, PeerSender};
use crate::peers::peer::Peer;

/// What a session channel may become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Subsystem {
    /// The control channel.
    Control,
    /// One status, then the end of the channel.
    Status,
}

/// What an authenticated connection may do, in either phase. Dropped with its SSH session.
pub(super) trait PeerActions: Send {
    /// Takes the one session channel of the connection; false if it is taken.
    fn take_session_channel(&mut self) -> bool;
    /// Reads the session channel until the sender is used, and runs the subsystem on it from then on. Drop the sender if the
    /// channel will become none.
    fn control(&self, receiver: PeerReceiver, sender: PeerSender) -> oneshot::Sender<Subsystem>;
    /// Serves a stream that the peer asks for.
    fn serve_stream(&self, asked: Asked<'_>, pending: PeerPending);
    /// Adds a tunnel that the peer serves; false if there is no inbound of this name.
    fn add_forward(&self, name: &str, port: u32) -> bool;
    /// Removes a tunnel that the peer serves; false if it did not serve it.
    fn cancel_forward(&self, name: &str) -> bool;
}

/// Makes an authenticated connection a peer of `phase`; none if the agent has left that phase since.
pub(super) fn join(
    phase: PhaseName,
    agent: &Arc<Agent>,
    connection: &Connection,
    generation: u64,
    handle: Handle,
) -> Option<Box<dyn PeerActions>> {
    match phase {
        PhaseName::Attestation => PeerSession::<Attestation>::join(agent, connection, generation, handle),
        PhaseName::Kubernetes => PeerSession::<Kubernetes>::join(agent, connection, generation, handle),
    }
}

struct PeerSession<P: AgentPhase> {
    agent: Arc<Agent>,
    peer: Arc<Peer<P>>,
    /// Those of this connection: its streams share the limits of an interceptor.
    outbounds: Outbounds<P, P::Interceptor>,
    /// Its part in a session.
    slot: MemberSlot,
    has_session_channel: bool,
}

impl<P: AgentPhase> Drop for PeerSession<P> {
    fn drop(&mut self) {
        // Now: tasks may keep the peer for some time.
        self.peer.give_place_back();
    }
}

impl<P: AgentPhase> PeerSession<P> {
    fn join(
        agent: &Arc<Agent>,
        connection: &Connection,
        generation: u64,
        handle: Handle,
    ) -> Option<Box<dyn PeerActions>> {
        let place = P::reserve(agent, connection, generation)?;
        let credits = Credits::new(Side::Agent, P::LIMITS);
        let offers: Arc<Offers> = Arc::default();
        connection.set_authenticated(P::NAME, credits.clone(), P::LIMITS.held_max());
        let link = PeerLink::new(ForwardOpener::new(handle, offers.clone()), credits.clone());
        let peer = Arc::new(Peer::new(connection.clone(), credits, link, offers, place));
        log::log!(
            connection.log_level(log::Level::Info),
            "connection from {}: authenticated for the {} phase",
            connection.address,
            P::NAME
        );
        P::peers(agent).add(peer.clone());
        P::joined(&peer);
        Some(Box::new(Self {
            agent: agent.clone(),
            peer,
            outbounds: P::outbounds(agent).for_connection(),
            slot: MemberSlot::default(),
            has_session_channel: false,
        }))
    }

    /// A peer that uses tunnels before it opens a session channel will send no hello: it gets no credits.
    fn settle_without_session_channel(&self) {
        if !self.has_session_channel {
            self.peer.credits.set_peer_mode(PeerFlow::WindowOnly);
        }
    }

    /// The inbound of this phase that `name` names.
    fn inbound(&self, name: &str) -> Option<TunnelName> {
        name.parse().ok().filter(|name| self.agent.tunnels.routes.has(P::NAME, name))
    }
}

impl<P: AgentPhase> PeerActions for PeerSession<P> {
    fn take_session_channel(&mut self) -> bool {
        let first = !std::mem::replace(&mut self.has_session_channel, true);
        if first {
            let (agent, credits) = (self.agent.clone(), self.peer.credits.clone());
            tokio::spawn(async move {
                settle_without_hello(credits).await;
                P::peers(&agent).notify_changed();
            });
        }
        first
    }

    fn control(&self, mut receiver: PeerReceiver, sender: PeerSender) -> oneshot::Sender<Subsystem> {
        let (begin, begun) = oneshot::channel();
        let (agent, peer, slot) = (self.agent.clone(), self.peer.clone(), self.slot.clone());
        tokio::spawn(async move {
            match becomes_subsystem(&mut receiver, begun).await {
                Some(Subsystem::Control) => run_control_channel(agent, peer, slot, (receiver, sender)).await,
                Some(Subsystem::Status) => status::serve(&agent, &peer, receiver, sender).await,
                None => {}
            }
        });
        begin
    }

    fn serve_stream(&self, asked: Asked<'_>, pending: PeerPending) {
        if let Some(member) = self.slot.get() {
            return member.serve_stream(asked, pending);
        }
        self.settle_without_session_channel();
        serve(&self.peer.connection, &self.outbounds, &self.peer.credits, asked, pending);
    }

    fn add_forward(&self, name: &str, port: u32) -> bool {
        self.settle_without_session_channel();
        let Some(tunnel) = self.inbound(name) else {
            let (name, connection) = (name.escape_default(), &self.peer.connection);
            log::log!(
                connection.count_refusal(),
                "tunnel {name:.80}, {} phase: {} offered it, and there is no inbound of this name here",
                P::NAME,
                connection.address
            );
            return false;
        };
        self.peer.offers.add(tunnel, name, port);
        P::peers(&self.agent).notify_changed();
        true
    }

    fn cancel_forward(&self, name: &str) -> bool {
        let cancelled = self.inbound(name).is_some_and(|tunnel| self.peer.offers.remove(&tunnel));
        P::peers(&self.agent).notify_changed();
        cancelled
    }
}
