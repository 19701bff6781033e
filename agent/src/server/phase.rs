//! What differs between the peers of the two phases.

use std::sync::Arc;

use secure_comms_protocol::control::LogLine;
use secure_comms_protocol::limits::{CreditLimits, GUEST_TIME, KEYS_REPORT, LOG_BATCH, LOG_PAUSE};
use secure_comms_protocol::{AgentConfig, Attestation, Control, Hello, Kubernetes, Phase, PodId};
use secure_comms_tunnel::intercept::{Interceptor, PassThrough};
use secure_comms_tunnel::{Credits, Outbounds};
use tokio::time::{Instant, sleep, timeout};

use super::lanes::Greeted;
use crate::access::limiter::Place;
use crate::access::sources::Source;
use crate::agent::Agent;
use crate::connection::Connection;
use crate::kata::KataAgent;
use crate::os::operator_log::{Entry, level_name, operator_log};
use crate::peers::peer::{Peer, Peers};

/// A phase, as the agent serves its peers.
pub(super) trait AgentPhase: Phase {
    /// Flow-control limits of a connection.
    const LIMITS: CreditLimits;
    /// The interceptor in one of its tunnels.
    type Interceptor: Interceptor;
    /// The peers of the phase.
    fn peers(agent: &Agent) -> &Peers<Self>
    where
        Self: Sized;
    /// The outbounds of the phase.
    fn outbounds(agent: &Agent) -> Arc<Outbounds<Self, Self::Interceptor>>
    where
        Self: Sized;
    /// The configuration that its hello announces, to proven peers only.
    fn config(agent: &Agent) -> Option<AgentConfig>;
    /// Reserves a place for a connection of this generation; none if the phase is over.
    fn reserve(agent: &Agent, connection: &Connection, generation: u64) -> Option<Place>;
    /// Called when a peer has joined.
    fn joined(peer: &Arc<Peer<Self>>)
    where
        Self: Sized;
    /// Called when a peer's hello names its pod. Refuses by closing the peer.
    fn identified(greeted: &Greeted<'_, Self>, pod: &PodId, hello: &Hello)
    where
        Self: Sized;
    /// Sends the messages that the phase repeats, until there will be no more.
    fn repeat_messages(agent: &Agent, peer: &Peer<Self>) -> impl Future<Output = ()> + Send
    where
        Self: Sized;
}

impl AgentPhase for Attestation {
    const LIMITS: CreditLimits = CreditLimits::ATTESTATION;
    type Interceptor = PassThrough;

    fn peers(agent: &Agent) -> &Peers<Self> {
        &agent.peers.attestation
    }

    fn outbounds(agent: &Agent) -> Arc<Outbounds<Self>> {
        agent.tunnels.attestation.clone()
    }

    fn reserve(agent: &Agent, connection: &Connection, generation: u64) -> Option<Place> {
        if !agent.policy.allows_attestation(generation) {
            return None;
        }
        let limits = &agent.limits;
        // Before it takes its place: a flood must not look calm while it does.
        limits.sources.logged_in(Source::of(connection.address), Instant::now());
        Some(limits.attesting.admit_evicting(connection.clone(), agent.attempt.peer()))
    }

    fn joined(_: &Arc<Peer<Self>>) {}

    /// Refuses an adaptor of another pod before any attempt: addresses are used again, and a stranger could have this VM fetch
    /// another pod's keys.
    fn identified(greeted: &Greeted<'_, Self>, pod: &PodId, _: &Hello) {
        if let Some(own) = greeted.agent.expected_pod.as_ref().filter(|own| *own != pod) {
            refuse_other_pod(greeted.peer, pod, own);
        }
    }

    fn config(_: &Agent) -> Option<AgentConfig> {
        None
    }

    /// `keys`, on every change and at least every [`KEYS_REPORT`], so that an operator sees why a pod is not attested.
    async fn repeat_messages(agent: &Agent, peer: &Peer<Self>) {
        let mut progress = agent.attempt.progress.subscribe();
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

impl AgentPhase for Kubernetes {
    const LIMITS: CreditLimits = CreditLimits::KUBERNETES;
    type Interceptor = KataAgent;

    fn peers(agent: &Agent) -> &Peers<Self> {
        &agent.peers.kubernetes
    }

    fn outbounds(agent: &Agent) -> Arc<Outbounds<Self, KataAgent>> {
        agent.tunnels.kubernetes.clone()
    }

    fn config(agent: &Agent) -> Option<AgentConfig> {
        agent.config()
    }

    /// A guest, until its hello names its pod: `ssh kubernetes@vm uptime` must not cost the pod its adaptor.
    fn reserve(agent: &Agent, connection: &Connection, _: u64) -> Option<Place> {
        agent.limits.sources.proved(Source::of(connection.address), Instant::now());
        Some(agent.limits.guests.admit_evicting(connection.clone(), None))
    }

    fn joined(peer: &Arc<Peer<Self>>) {
        let peer = peer.clone();
        tokio::spawn(async move {
            if guest_time_is_up(&peer.credits, || peer.is_adaptor()).await {
                peer.close_gracefully(GUEST_TIME_IS_UP);
            }
        });
    }

    /// The newest adaptor replaces the older one: it was restarted, or its older connection is half dead.
    fn identified(greeted: &Greeted<'_, Self>, pod: &PodId, hello: &Hello) {
        match greeted.agent.own_pod().filter(|own| own != pod) {
            Some(own) => refuse_other_pod(greeted.peer, pod, &own),
            None => greeted.take_place(hello),
        }
    }

    /// `log`, for each line that the operator should hear of, the kept ones first. At most [`LOG_BATCH`] in [`LOG_PAUSE`].
    async fn repeat_messages(_: &Agent, peer: &Peer<Self>) {
        let mut newest = operator_log().subscribe();
        let mut sent = 0;
        loop {
            newest.mark_unchanged();
            let lines = operator_log().after(sent, LOG_BATCH);
            let caught_up = lines.is_empty();
            for line in lines {
                let number = line.number;
                if !peer.outbox.send_if_room(Control::Log(log_line(line))) {
                    break;
                }
                sent = number;
            }
            if caught_up && newest.changed().await.is_err() {
                return;
            }
            if !caught_up {
                sleep(LOG_PAUSE).await;
            }
        }
    }
}

fn refuse_other_pod<P: Phase>(peer: &Peer<P>, pod: &PodId, own: &PodId) {
    let address = peer.connection.address;
    log::log!(
        peer.connection.log_level(log::Level::Warn),
        "connection from {address}: its hello names pod {pod}, and this VM is pod {own}'s"
    );
    peer.close_gracefully(&format!("this VM is pod {own}'s, not pod {pod}'s"));
}

fn log_line(entry: Entry) -> LogLine {
    LogLine {
        seq: entry.number,
        age: entry.at.elapsed().as_secs(),
        level: level_name(entry.level).to_owned(),
        text: entry.text,
    }
}

/// Why a guest is closed after [`GUEST_TIME`].
const GUEST_TIME_IS_UP: &str = "a login without a hello that names its pod may last 1 h";

/// Waits until a peer has been a guest for [`GUEST_TIME`]; false if it has ended or is the adaptor by then.
async fn guest_time_is_up(credits: &Credits, is_adaptor: impl Fn() -> bool) -> bool {
    tokio::select! {
        () = credits.gone() => false,
        () = sleep(GUEST_TIME) => !is_adaptor(),
    }
}

#[cfg(test)]
mod tests {
    use secure_comms_tunnel::flow::Side;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_guest_may_stay_for_an_hour_and_an_adaptor_longer() {
        let credits = Credits::new(Side::Agent, Kubernetes::LIMITS);
        let began = Instant::now();
        assert!(guest_time_is_up(&credits, || false).await);
        assert_eq!(began.elapsed(), GUEST_TIME);
        assert!(!guest_time_is_up(&credits, || true).await, "the adaptor");
        credits.end();
        let began = Instant::now();
        assert!(!guest_time_is_up(&credits, || false).await, "the connection has ended");
        assert!(began.elapsed() < GUEST_TIME);
    }
}
