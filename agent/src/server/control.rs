//! The control channel of a peer, from our hello to its end.

use std::sync::Arc;

use secure_comms_protocol::limits::{FAREWELL, HELLO};
use secure_comms_protocol::{Control, Hello, PodId, TunnelNames};
use secure_comms_ssh::control::{self, ControlEnd};
use secure_comms_tunnel::flow::PeerFlow;
use secure_comms_tunnel::{Credits, Event, Receiver};
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::lanes::{Greeted, MemberSlot};
use super::mismatches;
use super::phase::AgentPhase;
use crate::agent::Agent;
use crate::peers::link::{PeerReceiver, PeerSender};
use crate::peers::peer::Peer;

/// Discards what comes on a session channel before it becomes a subsystem. Returns the subsystem that `begun` receives;
/// none if the channel never becomes one.
pub(super) async fn becomes_subsystem<T>(
    receiver: &mut PeerReceiver,
    mut begun: oneshot::Receiver<T>,
) -> Option<T> {
    loop {
        tokio::select! {
            // First, for data that comes after it belongs to the subsystem.
            biased;
            begun = &mut begun => return begun.ok(),
            event = receiver.recv() => if matches!(event, None | Some(Event::Close)) { return None },
        }
    }
}

/// Serves a peer without credits if it has sent no hello after [`HELLO`]: it has a session channel, but does not make it
/// the control channel.
pub(super) async fn settle_without_hello(credits: Credits) {
    if timeout(HELLO, credits.peer()).await.is_err() {
        credits.set_peer_mode(PeerFlow::WindowOnly);
    }
}

/// Runs the control channel of a peer until it ends, the peer is closed, or its connection is.
pub(super) async fn run_control_channel<P: AgentPhase>(
    agent: Arc<Agent>,
    peer: Arc<Peer<P>>,
    slot: MemberSlot,
    (mut receiver, sender): (PeerReceiver, PeerSender),
) {
    let tunnels = TunnelNames {
        inbounds: agent.tunnels.routes.names(P::NAME),
        outbounds: P::outbounds(&agent).names(),
    };
    let ours = Hello {
        init_data: agent.announced.init_data.as_ref().map(ToString::to_string),
        config: P::config(&agent),
        ..Hello::from_agent(P::NAME, &agent.instance, peer.credits.initial(), tunnels)
    };
    peer.outbox.send(Control::Hello(ours.clone()));
    peer.set_controlled();
    let mut greeted = false;
    let on_message = |message| match message {
        Control::Hello(hello) if !std::mem::replace(&mut greeted, true) => {
            on_hello(&Greeted { agent: &agent, peer: &peer, slot: &slot }, &hello, &ours);
        }
        Control::Streams(streams) => {
            if let Some(member) = slot.get() {
                member.peer_knows(&streams.known);
            }
        }
        _ => {}
    };
    let background = async {
        P::repeat_messages(&agent, &peer).await;
        std::future::pending().await
    };
    let end = tokio::select! {
        end = control::run(&mut receiver, &sender, &peer.credits, &peer.outbox, on_message) => end,
        end = background => end,
    };
    if let (ControlEnd::Bye(bye), Some(member)) = (&end, slot.get())
        && bye.ends_session
    {
        member.end_session(&agent, &bye.reason);
    }
    finish(&peer, &end, greeted).await;
    P::peers(&agent).notify_changed();
}

/// `ssh -s` may close the channel and go on with its tunnels; a peer with credits can't work without it.
async fn finish<P>(peer: &Peer<P>, end: &ControlEnd, greeted: bool) {
    peer.credits.set_peer_mode(PeerFlow::WindowOnly);
    match end {
        ControlEnd::Closed if !greeted => {}
        // Mostly the connection has ended, and its SSH session knows better why.
        ControlEnd::Closed if timeout(FAREWELL, peer.credits.gone()).await.is_ok() => {}
        _ => peer.connection.end(&end.to_string()),
    }
}

/// Handles the first hello of a peer.
fn on_hello<P: AgentPhase>(greeted: &Greeted<'_, P>, hello: &Hello, ours: &Hello) {
    let (agent, peer) = (greeted.agent, greeted.peer);
    let address = peer.connection.address;
    match hello.pod_id.as_deref().map(str::parse::<PodId>) {
        Some(Ok(pod)) => {
            let level = peer.connection.log_level(log::Level::Info);
            log::log!(level, "connection from {address}: adaptor identified; pod {pod}");
            P::identified(greeted, &pod, hello);
            // Set once: later hellos are not handled.
            drop(peer.pod.set(pod));
        }
        Some(Err(error)) => {
            log::log!(peer.connection.log_level(log::Level::Warn), "connection from {address}: {error}");
            peer.close_gracefully(&error.to_string());
        }
        None => {}
    }
    if let Some(mismatches) = mismatches::describe(P::NAME, ours, hello) {
        let level = peer.connection.log_level(log::Level::Info);
        log::log!(level, "connection from {address}: {mismatches}");
    }
    P::peers(agent).notify_changed();
}
