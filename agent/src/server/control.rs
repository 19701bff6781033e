//! The control channel of a peer, from our hello to its end.

use std::sync::Arc;

use secure_comms_protocol::control::Hello;
use secure_comms_protocol::limits::{HELLO, PROTOCOL_VERSION};
use secure_comms_protocol::{Control, Phase, PhaseName, PodId};
use secure_comms_ssh::control::{self, ControlEnd};
use secure_comms_tunnel::flow::PeerFlow;
use secure_comms_tunnel::{Credits, Event, Receiver};
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::phase::AgentPhase;
use crate::agent::Agent;
use crate::peers::link::{PeerReceiver, PeerSender};
use crate::peers::peer::Peer;

/// Names of a list in a hello that are compared with ours, for the log: a stranger may send thousands.
const COMPARED_MAX: usize = 64;

/// Discards what comes on a session channel before it becomes the control channel. Returns false if it never does, and
/// true once `begun` was sent to.
pub(super) async fn becomes_control_channel(
    receiver: &mut PeerReceiver,
    mut begun: oneshot::Receiver<()>,
) -> bool {
    loop {
        tokio::select! {
            // First, for data that comes after it belongs to the control channel.
            biased;
            begun = &mut begun => return begun.is_ok(),
            event = receiver.recv() => if matches!(event, None | Some(Event::Close)) { return false },
        }
    }
}

/// Serves a peer without credits if it has sent no hello after [`HELLO`]: it has a session channel, but does not make it
/// the control channel.
pub(super) async fn settle_without_hello(credits: Credits) {
    if timeout(HELLO, credits.peer()).await.is_err() {
        credits.settle(PeerFlow::Plain);
    }
}

/// The tunnel names of this end.
struct Tunnels {
    inbounds: Vec<String>,
    outbounds: Vec<String>,
}

fn own_hello<P: Phase>(agent: &Agent, peer: &Peer<P>, own: &Tunnels) -> Hello {
    Hello {
        version: PROTOCOL_VERSION,
        credit: Some(peer.credits.initial()),
        pod_id: None,
        phase: Some(P::NAME),
        instance: Some(agent.instance.clone()),
        inbounds: own.inbounds.clone(),
        outbounds: own.outbounds.clone(),
    }
}

/// Runs the control channel of a peer until it ends, the peer is closed, or its connection is.
pub(super) async fn run_control_channel<P: AgentPhase>(
    agent: Arc<Agent>,
    peer: Arc<Peer<P>>,
    mut receiver: PeerReceiver,
    sender: PeerSender,
) {
    let own =
        Tunnels { inbounds: agent.tunnels.routes.names(P::NAME), outbounds: P::outbounds(&agent).names() };
    peer.outbox.send(Control::Hello(own_hello(&agent, &peer, &own)));
    let mut greeted = false;
    let on_message = |message| {
        if let Control::Hello(hello) = message
            && !std::mem::replace(&mut greeted, true)
        {
            on_hello(&agent, &peer, &hello, &own);
        }
    };
    let background = async {
        P::repeat_messages(&agent, &peer).await;
        std::future::pending().await
    };
    let end = tokio::select! {
        end = control::run(&mut receiver, &sender, &peer.credits, &peer.outbox, on_message) => Some(end),
        end = background => Some(end),
        () = peer.outbox.said_bye() => None,
    };
    match end {
        Some(end) => finish(&peer, &end, greeted),
        None => {
            // Nothing reads the channel from here on: the session must not wait for us while we wait for it.
            drop(receiver);
            disconnect_after_bye(&peer).await;
        }
    }
}

/// Sends the disconnect message, behind the bye. `close_gracefully` cuts a connection on which that takes too long.
async fn disconnect_after_bye<P>(peer: &Peer<P>) {
    tokio::select! {
        () = peer.link.opener().disconnect() => {}
        () = peer.credits.gone() => {}
    }
}

/// `ssh -s` may close the channel and go on with its tunnels; a peer with credits can't work without it.
fn finish<P>(peer: &Peer<P>, end: &ControlEnd, greeted: bool) {
    if greeted || *end != ControlEnd::Closed {
        log::info!("connection from {}: {end}", peer.connection.address);
        peer.connection.cut();
    }
    peer.credits.settle(PeerFlow::Plain);
}

/// Handles the first hello of a peer.
fn on_hello<P: AgentPhase>(agent: &Agent, peer: &Peer<P>, hello: &Hello, own: &Tunnels) {
    let address = peer.connection.address;
    match hello.pod_id.as_deref().map(str::parse::<PodId>) {
        Some(Ok(pod)) => {
            log::info!("connection from {address}: adaptor identified; pod {pod}");
            // Set once: later hellos are not handled.
            drop(peer.pod.set(pod));
        }
        Some(Err(error)) => {
            log::warn!("connection from {address}: {error}");
            peer.close_gracefully(&error.to_string());
        }
        None => {}
    }
    log_mismatches(P::NAME, "inbound here has no outbound on the peer", &own.inbounds, &hello.outbounds);
    log_mismatches(P::NAME, "outbound here has no inbound on the peer", &own.outbounds, &hello.inbounds);
    log_mismatches(P::NAME, "inbound on the peer has no outbound here", &hello.inbounds, &own.outbounds);
    log_mismatches(P::NAME, "outbound on the peer has no inbound here", &hello.outbounds, &own.inbounds);
    P::peers(agent).notify_changed();
}

/// Logs the names of `names` that `counterparts` does not have.
fn log_mismatches(phase: PhaseName, mismatch: &str, names: &[String], counterparts: &[String]) {
    let unmatched = |name: &&String| !counterparts.iter().any(|other| other.eq_ignore_ascii_case(name));
    for name in names.iter().take(COMPARED_MAX).filter(unmatched) {
        let name = name.escape_default();
        log::info!("tunnel {name:.80}, {phase} phase: {mismatch}");
    }
}
