//! Connects a lane of a session again, quickly: whatever TCP's backoff has grown to elsewhere, a fresh connect is always
//! under way, so that the lane is back soon after the network is.
//!
//! Replacing a lane costs nothing, so nothing is held back here until an old connection is dead. Only the hellos come one
//! at a time: the agent keeps the connection whose hello was the last one.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use secure_comms_protocol::limits::{RETRY_MAX, TCP_CONNECT};
use secure_comms_protocol::tag::Host;
use secure_comms_protocol::{Kubernetes, PhaseName};
use secure_comms_tunnel::Backoff;
use tokio::sync::{Mutex, OwnedMutexGuard, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

use super::connect::resolve;
use super::plan::Plan;
use crate::address::Address;
use crate::transport::agent_connection::{AgentConnection, Joining};
use crate::transport::ssh::{self, AuthHold, AuthLock, ConnectError, Dial, Flag};

/// The interval at which connects to one address start.
const STAGGER: Duration = Duration::from_millis(300);
/// The timeout of the first connect, and how long the rest of an attempt may be silent. Shorter than TCP's second
/// retransmission.
const TIMEOUT_MIN: Duration = Duration::from_millis(1200);
/// The same in round trips; the longer of the two counts.
const TIMEOUT_ROUND_TRIPS: u32 = 4;
/// Attempts at one address at a time: as many as start within the longest timeout, and some more.
const ATTEMPTS_MAX: usize = 20;
/// The interval at which the silence of an attempt is checked.
const SILENCE_CHECK: Duration = Duration::from_millis(100);
/// Names looked up whose result may wait.
const LOOKUPS: usize = 16;

/// The pause after a connection that the network has broken at once.
const PAUSE_MIN: Duration = Duration::from_millis(100);
/// The longest pause. Short, for the runtime waits.
const PAUSE_MAX: Duration = Duration::from_millis(500);
/// A connection that has lasted for less was broken soon.
const SOON: Duration = Duration::from_millis(500);
/// How often in a row that may happen before the pauses grow: a network that comes back is used at once.
const QUICK: u32 = 8;

/// Paces the connections of a lane: what is in the network's path may break each one as soon as it is there.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// Connections in a row that were broken soon.
    soon: u32,
}

impl Pace {
    /// The pause after a connection that was broken after this long.
    pub(super) fn pause(&mut self, lasted: Duration) -> Duration {
        self.soon = if lasted < SOON { self.soon.saturating_add(1) } else { 0 };
        let doublings = self.soon.saturating_sub(QUICK).min(8);
        (PAUSE_MIN * 2_u32.pow(doublings)).min(PAUSE_MAX).saturating_sub(lasted)
    }
}

/// How to connect a lane.
#[derive(Clone, Debug)]
pub(super) struct Redial {
    plan: Plan,
    joining: Joining,
    /// Where the agent was seen last: it is tried first.
    last: SocketAddr,
    /// The shortest round trip seen.
    round_trip: Duration,
    /// Held while an attempt says its hello, and by the one that has won.
    hello: Arc<Mutex<()>>,
}

/// A connection whose hello was the last one, as long as the guard is held.
type Won = (AgentConnection<Kubernetes>, OwnedMutexGuard<()>);

impl Redial {
    /// To any address of the plan, besides the one where the agent was seen last.
    pub(super) fn new(plan: Plan, joining: Joining, last: SocketAddr, round_trip: Duration) -> Self {
        Self { plan, joining, last, round_trip, hello: Arc::default() }
    }

    /// Whether an attempt says its hello: the agent may have replaced the old connection.
    pub(super) fn says_hello(&self) -> bool {
        self.hello.try_lock().is_err()
    }

    /// Connects, and returns where. Never gives up; dropping the future ends all attempts.
    pub(super) async fn connect(&self) -> (SocketAddr, AgentConnection<Kubernetes>) {
        let (found, mut addresses) = mpsc::channel(LOOKUPS);
        let (mut lookups, mut dialers) = (JoinSet::new(), JoinSet::new());
        let mut known = Vec::new();
        let mut add = |address, dialers: &mut JoinSet<_>| {
            if !known.contains(&address) {
                known.push(address);
                let redial = self.clone();
                dialers.spawn(async move { (address, redial.dial(address).await) });
            }
        };
        add(self.last, &mut dialers);
        for address in &self.plan.addresses {
            match &address.host {
                Host::Ip(ip) => add((*ip, address.port).into(), &mut dialers),
                Host::Name(_) => _ = lookups.spawn(keep_looking_up(address.clone(), found.clone())),
            }
        }
        loop {
            tokio::select! {
                Some(address) = addresses.recv() => add(address, &mut dialers),
                // A panic was printed where it happened; the other addresses go on.
                Some(ended) = dialers.join_next() => if let Ok((address, (connection, last_hello))) = ended {
                    // No other attempt may say its hello any more.
                    dialers.shutdown().await;
                    drop(last_hello);
                    return (address, connection);
                }
            }
        }
    }

    /// Starts a connect to the address at each interval, except while one that has got through makes progress.
    async fn dial(&self, address: SocketAddr) -> Won {
        let mut attempts = JoinSet::new();
        let mut timeout = TIMEOUT_MIN.max(self.round_trip * TIMEOUT_ROUND_TRIPS).min(TCP_CONNECT);
        let (mut next, mut backoff) = (Instant::now(), Backoff::default());
        let mut newest = Flag::default();
        // When a connect got through last, while the attempts after it are held back.
        let mut through: Option<Instant> = None;
        loop {
            tokio::select! {
                Some(ended) = attempts.join_next() => match ended {
                    Ok(Ok(won)) => return won,
                    Ok(Err(error)) => {
                        tracing::debug!("pod {}: lane {}: {address}: {error}", self.plan.id, self.joining.lane);
                        // No attempt is known to make progress any more.
                        (newest, through) = (Flag::default(), None);
                        match error {
                            ConnectError::Timeout(..) => timeout = (timeout * 3 / 2).min(TCP_CONNECT),
                            ConnectError::Unreachable(_) | ConnectError::Protocol(..) => {}
                            // A server that is another one, or an agent that wants no connection, is not asked three times a
                            // second.
                            ConnectError::Lookup(_)
                            | ConnectError::NotSsh(_)
                            | ConnectError::WrongHostKey { .. }
                            | ConnectError::Refused { .. }
                            | ConnectError::Dismissed(..) => {
                                next = next.max(Instant::now() + backoff.next_pause());
                            }
                        }
                    }
                    // Its panic was printed where it happened.
                    Err(_) => {}
                },
                () = sleep_until(next), if attempts.len() < ATTEMPTS_MAX => {
                    next = Instant::now() + STAGGER;
                    if newest.get() {
                        let since = *through.get_or_insert_with(Instant::now);
                        if since.elapsed() < timeout {
                            continue;
                        }
                    }
                    (newest, through) = (Flag::default(), None);
                    let attempt = self.clone().attempt(address, timeout, newest.clone());
                    attempts.spawn(attempt);
                }
            }
        }
    }

    /// One attempt. `timeout` is that of the TCP connect, and how long the agent may be silent during the hello.
    async fn attempt(
        self,
        address: SocketAddr,
        timeout: Duration,
        connected: Flag,
    ) -> Result<Won, ConnectError> {
        let Plan { id, kubernetes, pod_key, .. } = &self.plan;
        let dial = Dial {
            address,
            tcp_timeout: timeout,
            node_key: self.plan.node_key.clone(),
            rekey_bytes: self.plan.rekey_bytes,
            kex: self.plan.kex,
            hold: AuthHold::default(),
            admission: self.plan.admission.clone(),
            connected,
            answered: self.plan.answered.clone(),
            account: self.plan.account.clone(),
        };
        let connection =
            ssh::connect_kubernetes(&dial, *pod_key, AuthLock::default(), kubernetes.outbounds()).await?;
        let (guard, last_hello) = (connection.guard(), Arc::clone(&self.hello).lock_owned().await);
        let silent = async {
            while guard.unanswered().is_none_or(|silence| silence < timeout) {
                sleep(SILENCE_CHECK).await;
            }
        };
        tokio::select! {
            joined = AgentConnection::establish(connection, id, kubernetes, Some(&self.joining)) => {
                joined.map(|joined| (joined, last_hello))
            }
            () = silent => Err(ConnectError::Timeout(timeout.as_secs(), "waiting for the agent's hello")),
        }
    }
}

/// Looks a name up again and again: its address may have changed. Ends with the redial.
async fn keep_looking_up(address: Address, found: mpsc::Sender<SocketAddr>) {
    let mut backoff = Backoff::default();
    loop {
        match resolve(&address, PhaseName::Kubernetes).await {
            Ok(addresses) => {
                for address in addresses {
                    if found.send(address).await.is_err() {
                        return;
                    }
                }
                sleep(RETRY_MAX).await;
            }
            Err(failure) => {
                tracing::debug!("{failure}");
                backoff.pause().await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_while_connections_are_broken_soon() {
        let mut pace = Pace::default();
        let mut pauses = |lasted: u64, count: usize| -> Vec<_> {
            (0..count).map(|_| pace.pause(Duration::from_millis(lasted)).as_millis()).collect()
        };
        assert_eq!(pauses(0, 12), [100, 100, 100, 100, 100, 100, 100, 100, 200, 400, 500, 500]);
        assert_eq!(pauses(120, 2), [380, 380]);
        // One that lasts is followed by the next at once.
        assert_eq!(pauses(500, 1), [0]);
        assert_eq!(pauses(30, 8), [70; 8]);
        assert_eq!(pauses(0, u16::MAX.into()).pop(), Some(500));
    }
}
