//! What an authenticated peer may do, and what the agent as a whole knows: typed by phase.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};

use secure_comms_protocol::control::{Empty, KeyProgress};
use secure_comms_protocol::limits::{
    ATTESTATION_PEERS_MAX, CreditLimits, HELLO, KATA_AGENT_CONNECT, KEYS_REPORT, UNAUTHENTICATED_MAX,
    WAITING_MAX,
};
use secure_comms_protocol::{
    Attestation, Control, Hello, Kubernetes, MismatchKind, Phase, PhaseName, PodId, Refusal, RefusalReason,
    TunnelName, TunnelNames,
};
use secure_comms_ssh::control::{self, ControlEnd};
use secure_comms_tunnel::flow::{PeerFlow, Side};
use secure_comms_tunnel::intercept::{Interceptor, PassThrough};
use secure_comms_tunnel::link::Incoming;
use secure_comms_tunnel::{Credits, Event, Outbounds, Receiver, outbound};
use tokio::sync::{Semaphore, oneshot, watch};
use tokio::time::timeout;

use crate::config::Config;
use crate::gate::Gate;
use crate::interceptor::KataAgent;
use crate::log::Throttle;
use crate::peers::{Connection, Offers, Peer, Peers, Slot, Slots};
use crate::routes::Routes;
use crate::ssh::{PeerLink, PeerPending, PeerReceiver, PeerSender};

/// Opens that may be under way on a connection beyond its streams; more are refused unread.
const PENDING_OPENS: usize = 16;
/// Names of a list that are looked up among those of the other end, for the log.
const UNMATCHED_MAX: usize = 64;
/// Connections a minute that never authenticated, and whose end is worth a line.
const STRANGERS_LOGGED: u32 = 20;
/// No attempt is under way.
const NOBODY: u64 = u64::MAX;

/// What all connections share.
#[derive(Debug)]
pub struct Agent {
    /// Who may come in.
    pub gate: Gate,
    /// Connections that wait for a place among the next, or for their peer's first line: these cost next to nothing.
    pub waiting: Arc<Slots>,
    /// Connections that have not authenticated.
    pub unauthenticated: Arc<Slots>,
    /// Peers of the Attestation phase.
    pub attestation: Peers<Attestation>,
    /// Peers of the Kubernetes phase: one, and any that it replaces.
    pub kubernetes: Peers<Kubernetes>,
    /// Where clients of inbounds go.
    pub routes: Routes,
    /// Lines about connections that never authenticated.
    pub strangers: Throttle,
    /// How getting the keys goes.
    pub progress: watch::Sender<Option<KeyProgress>>,
    attesting: Arc<Slots>,
    attempt: AtomicU64,
    attestation_outbounds: Arc<Outbounds<Attestation>>,
    kubernetes_outbounds: Arc<Outbounds<Kubernetes, KataAgent>>,
    instance: String,
}

impl Agent {
    /// An agent without peers.
    pub fn new(config: &Config, gate: Gate, instance: String) -> Self {
        let kubernetes_outbounds = Outbounds::new(&config.outbounds)
            .with_connect_timeout(&TunnelName::kata_agent(), KATA_AGENT_CONNECT)
            .with_interceptor(TunnelName::kata_agent(), KataAgent::new(config.pod_namespace.as_deref()));
        Self {
            gate,
            strangers: Throttle::new(STRANGERS_LOGGED),
            waiting: Slots::new(WAITING_MAX),
            unauthenticated: Slots::new(UNAUTHENTICATED_MAX),
            attesting: Slots::new(ATTESTATION_PEERS_MAX),
            attempt: AtomicU64::new(NOBODY),
            attestation: Peers::default(),
            kubernetes: Peers::default(),
            routes: Routes::new(&config.inbounds),
            attestation_outbounds: Arc::new(Outbounds::new(&config.outbounds)),
            kubernetes_outbounds: Arc::new(kubernetes_outbounds),
            instance,
            progress: watch::Sender::new(None),
        }
    }

    /// The attempt under way belongs to this peer, which newcomers do not push out.
    pub fn set_attempt(&self, peer: Option<u64>) {
        self.attempt.store(peer.unwrap_or(NOBODY), Ordering::Relaxed);
    }

    /// A connection has authenticated for a phase; none if the agent has left that phase meanwhile.
    pub fn join<P: Seat>(
        self: &Arc<Self>,
        connection: &Connection,
        generation: u64,
        link: impl FnOnce(&Credits, &Arc<Offers>) -> PeerLink,
    ) -> Option<PeerSession> {
        let slot = P::seat(self, connection, generation)?;
        let credits = Credits::new(Side::Agent, P::LIMITS);
        let offers: Arc<Offers> = Arc::default();
        connection.authenticated(credits.clone(), P::LIMITS.held_max());
        let peer = Arc::new(Peer::new(connection.clone(), credits.clone(), link(&credits, &offers), offers));
        log::info!("connection from {}: authenticated for the {} phase", connection.address, P::NAME);
        P::peers(self).add(peer.clone());
        let opens = Arc::new(Semaphore::new(P::LIMITS.streams + PENDING_OPENS));
        Some(Box::new(Member::<P> { agent: self.clone(), peer, opens, control: false, _slot: slot }))
    }

    /// A connection has ended.
    pub fn left(&self, id: u64) {
        self.attestation.remove(id);
        self.kubernetes.remove(id);
    }

    /// Tells every attestation peer why it must go, and sees that it does.
    pub fn dismiss_attestation(&self, reason: &str) {
        for peer in self.attestation.all() {
            peer.dismiss(reason);
        }
    }

    /// Tells every attestation peer that the keys are here.
    pub fn announce_upgrade(&self) {
        let progress = self.progress.borrow().clone();
        for peer in self.attestation.all() {
            // In this order; the report of the phase may come too late.
            if let Some(progress) = &progress {
                peer.outbox.send(Control::Keys(progress.clone()));
            }
            peer.outbox.send(Control::Upgrade(Empty {}));
        }
    }
}

/// What differs between peers of the two phases.
pub trait Seat: Phase {
    /// What a connection may hold for its streams.
    const LIMITS: CreditLimits;
    /// What stands in one of its tunnels.
    type Interceptor: Interceptor;
    /// The peers of the phase.
    fn peers(agent: &Agent) -> &Peers<Self>
    where
        Self: Sized;
    /// The outbounds of the phase.
    fn outbounds(agent: &Agent) -> Arc<Outbounds<Self, Self::Interceptor>>
    where
        Self: Sized;
    /// A place for one more; none if the phase is over. The inner none: the phase has no limit.
    fn seat(agent: &Agent, connection: &Connection, generation: u64) -> Option<Option<Slot>>;
    /// Something this phase tells its peers again and again.
    fn report(agent: &Agent, peer: &Peer<Self>) -> impl Future<Output = ()> + Send
    where
        Self: Sized;
}

impl Seat for Attestation {
    const LIMITS: CreditLimits = CreditLimits::ATTESTATION;
    type Interceptor = PassThrough;

    fn peers(agent: &Agent) -> &Peers<Self> {
        &agent.attestation
    }

    fn outbounds(agent: &Agent) -> Arc<Outbounds<Self>> {
        agent.attestation_outbounds.clone()
    }

    fn seat(agent: &Agent, connection: &Connection, generation: u64) -> Option<Option<Slot>> {
        let spared = agent.attempt.load(Ordering::Relaxed);
        agent.gate.attests(generation).then(|| Some(agent.attesting.enter(connection.clone(), Some(spared))))
    }

    /// `keys`, on every change and at least every [`KEYS_REPORT`], so that an operator sees why a pod is not attested.
    async fn report(agent: &Agent, peer: &Peer<Self>) {
        let mut progress = agent.progress.subscribe();
        loop {
            let latest = progress.borrow_and_update().clone();
            if let Some(latest) = latest {
                peer.outbox.send(Control::Keys(latest));
            }
            if let Ok(Err(_)) = timeout(KEYS_REPORT, progress.changed()).await {
                return;
            }
        }
    }
}

impl Seat for Kubernetes {
    const LIMITS: CreditLimits = CreditLimits::KUBERNETES;
    type Interceptor = KataAgent;

    fn peers(agent: &Agent) -> &Peers<Self> {
        &agent.kubernetes
    }

    fn outbounds(agent: &Agent) -> Arc<Outbounds<Self, KataAgent>> {
        agent.kubernetes_outbounds.clone()
    }

    /// The newest takes the place of the others: the adaptor was restarted, or its old connection is half dead.
    fn seat(agent: &Agent, _: &Connection, _: u64) -> Option<Option<Slot>> {
        for older in agent.kubernetes.all().into_iter().filter(|peer| !peer.is_dismissed()) {
            log::info!("connection from {}: replaced by a newer one", older.connection.address);
            older.dismiss("replaced by a newer connection of the worker node");
        }
        Some(None)
    }

    async fn report(_: &Agent, _: &Peer<Self>) {}
}

/// What an authenticated connection may do. Dropped with its session.
pub trait PeerActions: Send {
    /// Takes the one session channel of the connection.
    fn take_session_channel(&mut self) -> bool;
    /// Empties the session channel, and runs the control channel on it once told to; a sender that is dropped says that
    /// it will not be one.
    fn control(&self, receiver: PeerReceiver, sender: PeerSender) -> oneshot::Sender<()>;
    /// Serves a stream that the peer asks for.
    fn serve_stream(&self, name: &str, id: u32, pending: PeerPending);
    /// The peer serves a tunnel.
    fn forward(&self, name: &str, port: u32) -> bool;
    /// The peer serves it no longer.
    fn cancel_forward(&self, name: &str) -> bool;
}

/// An authenticated connection, whatever its phase.
pub type PeerSession = Box<dyn PeerActions>;

struct Member<P: Phase> {
    agent: Arc<Agent>,
    peer: Arc<Peer<P>>,
    opens: Arc<Semaphore>,
    control: bool,
    _slot: Option<Slot>,
}

impl<P: Seat> PeerActions for Member<P> {
    fn take_session_channel(&mut self) -> bool {
        let first = !std::mem::replace(&mut self.control, true);
        if first {
            tokio::spawn(settle_without_hello(self.peer.credits.clone()));
        }
        first
    }

    fn control(&self, mut receiver: PeerReceiver, sender: PeerSender) -> oneshot::Sender<()> {
        let (begin, begun) = oneshot::channel();
        let (agent, peer) = (self.agent.clone(), self.peer.clone());
        tokio::spawn(async move {
            if becomes_control(&mut receiver, begun).await {
                converse(agent, peer, receiver, sender).await;
            }
        });
        begin
    }

    fn serve_stream(&self, name: &str, id: u32, pending: PeerPending) {
        self.settle_without_control();
        let Ok(place) = self.opens.clone().try_acquire_owned() else {
            tokio::spawn(pending.refuse(Refusal::new(name, P::NAME, &RefusalReason::TooManyOpens)));
            return;
        };
        let permit = match P::outbounds(&self.agent).permit(name) {
            Ok(permit) => permit,
            Err(refusal) => {
                let connection = &self.peer.connection;
                log::log!(
                    connection.refused(),
                    "refusing a stream of {}: {}",
                    connection.address,
                    refusal.reason
                );
                tokio::spawn(pending.refuse(refusal));
                return;
            }
        };
        let credits = self.peer.credits.clone();
        tokio::spawn(async move {
            outbound::serve(permit, &credits, id, pending).await;
            drop(place);
        });
    }

    fn forward(&self, name: &str, port: u32) -> bool {
        self.settle_without_control();
        let Some(tunnel) = self.tunnel(name) else {
            let (name, connection) = (name.escape_default(), &self.peer.connection);
            log::log!(
                connection.refused(),
                "tunnel {name:.80}, {} phase: {} serves it, and there is no such inbound here",
                P::NAME,
                connection.address
            );
            return false;
        };
        self.offers().insert(tunnel, (name.to_owned(), port));
        P::peers(&self.agent).touch();
        true
    }

    fn cancel_forward(&self, name: &str) -> bool {
        let cancelled = self.tunnel(name).is_some_and(|tunnel| self.offers().remove(&tunnel).is_some());
        P::peers(&self.agent).touch();
        cancelled
    }
}

impl<P: Seat> Member<P> {
    /// A peer that uses tunnels before it opens a control channel will never say hello.
    fn settle_without_control(&self) {
        if !self.control {
            self.peer.credits.set_peer_mode(PeerFlow::WindowOnly);
        }
    }

    /// The inbound of this phase that `name` names.
    fn tunnel(&self, name: &str) -> Option<TunnelName> {
        name.parse().ok().filter(|name| self.agent.routes.has(P::NAME, name))
    }

    fn offers(&self) -> std::sync::MutexGuard<'_, std::collections::HashMap<TunnelName, (String, u32)>> {
        self.peer.offers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes what comes on a session channel before it asks to be the control channel; false if it never does.
async fn becomes_control(receiver: &mut PeerReceiver, mut begun: oneshot::Receiver<()>) -> bool {
    loop {
        tokio::select! {
            // First, for what comes after it is the control channel's.
            biased;
            begun = &mut begun => return begun.is_ok(),
            event = receiver.recv() => if matches!(event, None | Some(Event::Close)) { return false },
        }
    }
}

/// A peer that has a session channel and says no hello, or does not make a control channel of it, still gets its
/// tunnels served.
async fn settle_without_hello(credits: Credits) {
    if timeout(HELLO, credits.peer()).await.is_err() {
        credits.set_peer_mode(PeerFlow::WindowOnly);
    }
}

/// The control channel of a peer, from our hello to its end.
async fn converse<P: Seat>(
    agent: Arc<Agent>,
    peer: Arc<Peer<P>>,
    mut receiver: PeerReceiver,
    sender: PeerSender,
) {
    let tunnels =
        TunnelNames { inbounds: agent.routes.names(P::NAME), outbounds: P::outbounds(&agent).names() };
    let ours = Hello::from_agent(P::NAME, &agent.instance, peer.credits.initial(), tunnels);
    peer.outbox.send(Control::Hello(ours.clone()));
    let mut greeted = false;
    let heard = |message| {
        if let Control::Hello(hello) = message
            && !std::mem::replace(&mut greeted, true)
        {
            hear_hello(&agent, &peer, &hello, &ours);
        }
    };
    let background = async {
        P::report(&agent, &peer).await;
        std::future::pending().await
    };
    let end = tokio::select! {
        end = control::run(&mut receiver, &sender, &peer.credits, &peer.outbox, heard) => Some(end),
        end = background => Some(end),
        () = peer.outbox.said_bye() => None,
    };
    let Some(end) = end else {
        // Nobody empties the channel any more: the session must not wait for us while we wait for it.
        drop(receiver);
        // The disconnect comes after the bye; what stays all the same is cut by whoever dismissed it.
        tokio::select! {
            () = peer.link.opener().disconnect() => {}
            () = peer.credits.gone() => {}
        }
        return;
    };
    // `ssh -s` may leave and go on with its tunnels; a peer with credits can't do without.
    if greeted || end != ControlEnd::Closed {
        log::info!("connection from {}: {end}", peer.connection.address);
        peer.connection.cut();
    }
    peer.credits.set_peer_mode(PeerFlow::WindowOnly);
}

fn hear_hello<P: Seat>(agent: &Agent, peer: &Peer<P>, hello: &Hello, ours: &Hello) {
    let address = peer.connection.address;
    match hello.pod_id.as_deref().map(str::parse::<PodId>) {
        Some(Ok(pod)) => {
            log::info!("connection from {address}: drives pod {pod}");
            // Only the first hello is heard.
            drop(peer.pod.set(pod));
        }
        Some(Err(error)) => {
            log::warn!("connection from {address}: {error}");
            peer.dismiss(&error.to_string());
        }
        None => {}
    }
    log_mismatches(P::NAME, ours, hello);
    P::peers(agent).touch();
}

/// Logs the tunnels that one end has and the other lacks. The peer's names are untrusted text.
fn log_mismatches(phase: PhaseName, ours: &Hello, theirs: &Hello) {
    for mismatch in ours.mismatches(theirs, UNMATCHED_MAX) {
        let name = mismatch.name.escape_default();
        let what = match mismatch.kind {
            MismatchKind::OurInbound => "inbound here has no matching outbound on the peer",
            MismatchKind::OurOutbound => "outbound here has no matching inbound on the peer",
            MismatchKind::PeerInbound => "inbound on the peer has no matching outbound here",
            MismatchKind::PeerOutbound => "outbound on the peer has no matching inbound here",
        };
        log::info!("tunnel {name:.80}, {phase} phase: {what}");
    }
}
