//! Drives one pod's channel: first Attestation, then Kubernetes, which is kept up until the pod is stopped.
//!
//! ```text
//! new -------> connect: Attestation first --+--> run_attestation --- upgrade or end ---+
//!                                           |                                          v
//! restarted -> connect: Kubernetes first ---+--> run_kubernetes --- end ---> connect: Kubernetes first
//! ```
//! Where a connection falls silent in either phase, a failover connects to the agent while the old connection exists.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use secure_comms_protocol::limits::RETRY_MAX;
use secure_comms_protocol::{Attestation, Kubernetes, PhaseName};
use secure_comms_tunnel::Backoff;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use super::advice::{LOST, explain, init_data_mismatch};
use super::connect::{AnySession, Connected, Failure, connect_any};
use super::failover::await_failover;
use super::plan::Plan;
use super::status::{PodEvent, PodState, StatusReporter};
use super::vm_log::VmLog;
use super::withdrawal::until_gone;
use crate::transport::routes::Routes;
use crate::transport::session::{AttestationEvent, Session};
use crate::transport::ssh::AuthHold;

/// An order to end the channel from this side.
#[derive(Clone, Debug)]
pub(crate) struct Stop {
    /// The reason that the agent receives with the bye.
    pub(crate) reason: &'static str,
    /// The time that open streams get to end.
    pub(crate) drain: Duration,
}

/// Where a driver starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// A new pod: Attestation first. The start fails for good if the VM is lost.
    New,
    /// A pod that was started before this process was: Kubernetes first. It is retried without limit.
    Restarted,
}

/// Why a driver ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    Stopped,
    VmLost,
}

/// How the deletion of the pod's key from the KBS ended.
enum Withdrawal {
    /// The key is not there.
    Done,
    /// The pod is stopped.
    Stopped(Stop),
    /// The connection ended first.
    Ended(String),
    /// A failover replaced the connection first.
    Replaced(Box<Connected>),
}

/// Drives one pod's channel.
#[derive(Debug)]
pub(crate) struct Driver {
    plan: Plan,
    routes: Arc<Routes>,
    status: StatusReporter,
    stop: watch::Receiver<Option<Stop>>,
    /// The start fails for good when the VM is lost. Once the pod was up, connecting is retried without limit.
    starting: bool,
    backoff: Backoff,
    /// When the Kubernetes phase last came up.
    last_up: Option<Instant>,
    /// Whether an agent sent `upgrade` since the Kubernetes phase was last up.
    upgraded: bool,
    /// The mismatches reported last, so that a reconnect does not repeat them.
    reported_mismatches: HashMap<PhaseName, String>,
    /// What was shown of the VM's log.
    vm_log: VmLog,
}

impl Driver {
    /// A driver that stops once `stop` holds an order.
    pub(crate) fn new(
        plan: Plan,
        routes: Arc<Routes>,
        status: StatusReporter,
        stop: watch::Receiver<Option<Stop>>,
    ) -> Self {
        Self {
            plan,
            routes,
            status,
            stop,
            starting: true,
            backoff: Backoff::default(),
            last_up: None,
            upgraded: false,
            reported_mismatches: HashMap::new(),
            vm_log: VmLog::default(),
        }
    }

    /// Brings the channel up and keeps it up, until it is stopped or the start fails.
    ///
    /// Sets the states in between; the final one is the caller's to set. Dropping the future cuts the connection.
    pub(crate) async fn run(mut self, entry: Entry) -> Ended {
        self.starting = entry == Entry::New;
        let first = if self.starting && self.plan.attestation.attests() {
            PhaseName::Attestation
        } else {
            PhaseName::Kubernetes
        };
        let ended = self.connect_until_ended(first).await;
        self.routes.close();
        ended
    }

    async fn connect_until_ended(&mut self, mut first: PhaseName) -> Ended {
        loop {
            match self.connect_once(first).await {
                Ok(next) => first = next,
                Err(ended) => return ended,
            }
        }
    }

    /// Connects, and serves the connection and its failovers until the last one ends; or pauses if connecting fails.
    /// Returns the phase to try first the next time.
    async fn connect_once(&mut self, first: PhaseName) -> Result<PhaseName, Ended> {
        let hold = AuthHold::default();
        let result = tokio::select! {
            _ = stopped(&mut self.stop) => return Err(Ended::Stopped),
            result = connect_any(&self.plan, first, &hold) => result,
        };
        let mut next = match result {
            Ok(connected) => Some(connected),
            Err(failures) => {
                self.on_connect_failed(&failures)?;
                self.pause().await?;
                return Ok(first);
            }
        };
        while let Some(Connected { index, address, session }) = next {
            // The address that worked is tried first the next time.
            if let Some(addresses) = self.plan.addresses.get_mut(..=index) {
                addresses.rotate_right(1);
            }
            self.status.connected();
            next = match session {
                AnySession::Attestation(session) => self.run_attestation(address, session).await?,
                AnySession::Kubernetes(session) => self.run_kubernetes(address, session).await?,
            };
        }
        Ok(PhaseName::Kubernetes)
    }

    /// Serves a connection in the Attestation phase until the agent has its keys or the connection ends. Returns the
    /// connection of a failover, if one replaced it.
    async fn run_attestation(
        &mut self,
        address: SocketAddr,
        mut session: Session<Attestation>,
    ) -> Result<Option<Connected>, Ended> {
        let since = Instant::now();
        if let Some(publication) = &self.plan.publication {
            // Before the state changes, which has the keys published.
            publication.need();
        }
        let expected = self.plan.init_data.as_ref();
        self.status.init_data(init_data_mismatch(expected, session.agent().init_data.as_deref()));
        self.status.set_state(PodState::Attesting { attempt: 0, last_error: None });
        self.status.emit(&PodEvent::Attesting(address));
        self.report_mismatches(PhaseName::Attestation, session.tunnel_mismatches());
        self.routes.set_attestation(session.link());
        let (plan, liveness) = (self.plan.clone(), session.liveness());
        let mut failover = pin!(await_failover(&plan, &liveness, PhaseName::Attestation));
        let limits = self.plan.attestation_limits;
        let mut no_progress = pin!(sleep(limits.progress));
        let mut no_keys = pin!(sleep(limits.total));
        loop {
            tokio::select! {
                stop = stopped(&mut self.stop) => {
                    self.routes.close();
                    session.close(stop.reason).await;
                    return Err(Ended::Stopped);
                }
                event = session.next_event() => match event {
                    AttestationEvent::Keys(keys) => {
                        no_progress.as_mut().reset(Instant::now() + limits.progress);
                        self.status.keys(keys);
                    }
                    AttestationEvent::Upgrade => return self.on_upgrade(session).await.map(|()| None),
                    AttestationEvent::Ended(why) => {
                        return self.on_attestation_ended(&why.to_string(), since).await.map(|()| None);
                    }
                },
                connected = &mut failover => {
                    self.routes.close();
                    self.down(PhaseName::Attestation, failover_reason(address, &connected));
                    return Ok(Some(connected));
                }
                () = &mut no_progress => {
                    return self.on_no_keys(session, since, "reported nothing on its keys", limits.progress).await;
                }
                () = &mut no_keys => {
                    return self.on_no_keys(session, since, "did not get its keys", limits.total).await;
                }
            }
        }
    }

    /// The agent may be a stranger that only answers pings: the other addresses are tried, too.
    async fn on_no_keys(
        &mut self,
        session: Session<Attestation>,
        since: Instant,
        what: &str,
        limit: Duration,
    ) -> Result<Option<Connected>, Ended> {
        let why = format!("the agent {what} within {} s; trying every address again", limit.as_secs());
        self.routes.close();
        session.close("no progress with the keys").await;
        self.on_attestation_ended(&why, since).await.map(|()| None)
    }

    /// The agent has its keys: leaves the Attestation phase.
    async fn on_upgrade(&mut self, session: Session<Attestation>) -> Result<(), Ended> {
        self.status.set_state(PodState::Upgrading);
        self.status.emit(&PodEvent::Upgrade);
        self.routes.close();
        // The agent ends the connection when it is ready for the next one.
        session.close("reconnecting for the Kubernetes phase").await;
        // A stranger could send `upgrade` again and again.
        if std::mem::replace(&mut self.upgraded, true) {
            self.pause().await?;
        }
        Ok(())
    }

    async fn on_attestation_ended(&mut self, why: &str, since: Instant) -> Result<(), Ended> {
        self.routes.close();
        self.down(PhaseName::Attestation, why.to_owned());
        // The peer was not authenticated and may be a stranger: another address comes first now.
        self.plan.addresses.rotate_left(1);
        self.pause_if_short_lived(since).await
    }

    /// Serves a connection in the Kubernetes phase until it ends. Returns the connection of a failover, if one
    /// replaced it.
    async fn run_kubernetes(
        &mut self,
        address: SocketAddr,
        mut session: Session<Kubernetes>,
    ) -> Result<Option<Connected>, Ended> {
        let since = Instant::now();
        match self.withdraw_key(&mut session).await {
            Withdrawal::Done => {}
            Withdrawal::Stopped(stop) => {
                session.close(stop.reason).await;
                return Err(Ended::Stopped);
            }
            Withdrawal::Ended(why) => {
                self.down(PhaseName::Kubernetes, why);
                self.pause_if_short_lived(since).await?;
                return Ok(None);
            }
            Withdrawal::Replaced(connected) => {
                self.down(PhaseName::Kubernetes, failover_reason(address, &connected));
                return Ok(Some(*connected));
            }
        }
        (self.starting, self.upgraded) = (false, false);
        if self.last_up.replace(since).is_none_or(|last| last.elapsed() >= 2 * RETRY_MAX) {
            self.backoff.reset();
        }
        self.routes.set_kubernetes(session.link());
        let instance = session.agent().instance.clone().unwrap_or_default();
        self.status.up(address, instance.clone());
        self.report_mismatches(PhaseName::Kubernetes, session.tunnel_mismatches());
        let liveness = session.liveness();
        let vm_log = self.vm_log.show(session.take_log(), &instance, &self.status);
        tokio::select! {
            never = vm_log => match never {},
            stop = stopped(&mut self.stop) => {
                self.routes.close();
                self.drain_streams(&session, stop.drain).await;
                session.close(stop.reason).await;
                Err(Ended::Stopped)
            }
            why = session.ended() => {
                self.routes.close();
                let why = format!("{why}{}", cost(&session));
                drop(session);
                self.down(PhaseName::Kubernetes, why);
                self.pause_if_short_lived(since).await?;
                Ok(None)
            }
            connected = await_failover(&self.plan, &liveness, PhaseName::Kubernetes) => {
                self.routes.close();
                let why = failover_reason(address, &connected) + &cost(&session);
                drop(session);
                self.down(PhaseName::Kubernetes, why);
                Ok(Some(connected))
            }
        }
    }

    /// Deletes the pod's key from the KBS, unless the connection ends first.
    async fn withdraw_key(&mut self, session: &mut Session<Kubernetes>) -> Withdrawal {
        let Some(publication) = self.plan.publication.clone() else { return Withdrawal::Done };
        let (liveness, mut stop) = (session.liveness(), self.stop.clone());
        tokio::select! {
            // Nothing else is looked at if the key is gone already.
            biased;
            () = until_gone(&publication, &self.status, |why| self.set_degraded(why)) => Withdrawal::Done,
            stop = stopped(&mut stop) => Withdrawal::Stopped(stop),
            why = session.ended() => Withdrawal::Ended(why.to_string()),
            connected = await_failover(&self.plan, &liveness, PhaseName::Kubernetes) => {
                Withdrawal::Replaced(Box::new(connected))
            }
        }
    }

    /// Waits until no stream is open, for at most `limit`.
    async fn drain_streams(&self, session: &Session<Kubernetes>, limit: Duration) {
        // The streams that outlast the limit are counted below.
        drop(timeout(limit, session.idle()).await);
        match session.open_streams() {
            0 => {}
            left => tracing::warn!(
                "pod {}: stop: {left} streams did not end within {} s and are reset",
                self.plan.id,
                limit.as_secs()
            ),
        }
    }

    async fn pause(&mut self) -> Result<(), Ended> {
        tokio::select! {
            _ = stopped(&mut self.stop) => Err(Ended::Stopped),
            () = self.backoff.pause() => Ok(()),
        }
    }

    /// Pauses after a connection that ended soon, so that it is not retried in a tight loop. A connection that lasted
    /// resets the backoff.
    async fn pause_if_short_lived(&mut self, since: Instant) -> Result<(), Ended> {
        if since.elapsed() < RETRY_MAX {
            return self.pause().await;
        }
        self.backoff.reset();
        Ok(())
    }

    fn on_connect_failed(&self, failures: &[Failure]) -> Result<(), Ended> {
        // While another address cannot be reached, the pod's VM may still be booting there: the lost one may be a stale
        // address, or a stranger's.
        let lost = !failures.is_empty() && failures.iter().all(|failure| failure.vm_lost);
        let why = if lost {
            // After the start, a new VM may still appear at the same address.
            if self.starting {
                return Err(Ended::VmLost);
            }
            LOST.to_owned()
        } else {
            explain(&self.plan, failures)
        };
        self.status.connect_failed(&why);
        self.set_degraded(why);
        Ok(())
    }

    fn down(&self, phase: PhaseName, why: String) {
        self.status.down(phase, &why);
        self.set_degraded(why);
    }

    fn set_degraded(&self, why: String) {
        self.status.set_state(match self.last_up {
            Some(_) => PodState::Down { reason: why },
            None => PodState::Connecting { last_error: Some(why) },
        });
    }

    fn report_mismatches(&mut self, phase: PhaseName, line: Option<&str>) {
        let reported = self.reported_mismatches.insert(phase, line.unwrap_or_default().to_owned());
        if let Some(line) = line
            && reported.as_deref() != Some(line)
        {
            self.status.emit(&PodEvent::TunnelMismatch(line.to_owned()));
        }
    }
}

/// Why the connection to `address` was replaced.
fn failover_reason(address: SocketAddr, connected: &Connected) -> String {
    format!("connection to {address} timed out; failed over to {}", connected.address)
}

/// What the end of the connection costs: its streams cannot go on over another one.
fn cost(session: &Session<Kubernetes>) -> String {
    match session.open_streams() {
        0 => String::new(),
        1 => "; 1 stream is reset by the reconnect".to_owned(),
        streams => format!("; {streams} streams are reset by the reconnect"),
    }
}

/// Waits for the order to stop.
async fn stopped(stop: &mut watch::Receiver<Option<Stop>>) -> Stop {
    let order = stop.wait_for(Option::is_some).await.ok().and_then(|stop| stop.clone());
    // The sender was dropped: the adaptor is gone, and no order can come any more.
    order.unwrap_or(Stop { reason: "the adaptor is gone", drain: Duration::ZERO })
}
