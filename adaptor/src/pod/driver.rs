//! Drives one pod's channel: reaches the agent (`reach`), then keeps the Kubernetes phase up until the pod is stopped.
//!
//! ```text
//! new: Attestation first ---------+--> reach: every address at once, in either phase
//! restarted: Kubernetes first ----+       |
//!                     ^                   v Kubernetes phase up at one address; the other connections end
//!                     +---- end --- run_kubernetes: one session (`session`), over many connections;
//!                                                   with an agent that knows none, one connection
//! ```
//! Where a connection falls silent in either phase, a failover connects to the agent while the old connection exists.

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use secure_comms_protocol::limits::RETRY_MAX;
use secure_comms_protocol::{Kubernetes, PhaseName};
use secure_comms_tunnel::{Backoff, Credits};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use super::candidates::Reached;
use super::connect::{AnyConnection, Connected};
use super::failover::{await_failover, failover_reason};
use super::plan::Plan;
use super::status::{PodEvent, PodState, StatusReporter};
use super::vm_log::VmLog;
use super::withdrawal::{CLIENTS_WAIT, until_gone};
use crate::text::quote;
use crate::transport::agent_connection::{AgentConnection, Joined};
use crate::transport::routes::{KubernetesLink, Routes};
use crate::transport::ssh::AuthLock;

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
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    Stopped,
    VmLost,
    /// A new pod's agent runs with what is not expected; with the differences.
    Unexpected(String),
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
    pub(super) plan: Plan,
    pub(super) routes: Arc<Routes>,
    pub(super) status: StatusReporter,
    pub(super) stop: watch::Receiver<Option<Stop>>,
    /// The start fails for good when the VM is lost. Once the pod was up, connecting is retried without limit.
    pub(super) starting: bool,
    pub(super) backoff: Backoff,
    /// When the Kubernetes phase last came up.
    last_up: Option<Instant>,
    /// Connections of the Attestation phase that end, each within a second.
    pub(super) ending: JoinSet<()>,
    /// The mismatches reported last, so that a reconnect does not repeat them.
    reported_mismatches: HashMap<PhaseName, String>,
    /// The warnings on the agent that were logged last, so that a reconnect does not repeat them.
    logged_warnings: Vec<String>,
    /// What was shown of the VM's log.
    pub(super) vm_log: VmLog,
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
            ending: JoinSet::new(),
            reported_mismatches: HashMap::new(),
            logged_warnings: Vec::new(),
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
        let Err(ended) = self.connect_until_ended(first).await;
        self.routes.close();
        ended
    }

    async fn connect_until_ended(&mut self, mut first: PhaseName) -> Result<Infallible, Ended> {
        let mut found = None;
        loop {
            let reached = match found.take() {
                Some(Connected { index, address, connection: AnyConnection::Kubernetes(connection) }) => {
                    Reached { index, address, connection }
                }
                attesting => self.reach(first, attesting).await?,
            };
            found = self.run_kubernetes(reached).await?;
            first = PhaseName::Kubernetes;
        }
    }

    /// Serves the Kubernetes phase from this connection on, until it ends. Returns the connection that follows, if there
    /// is one already.
    async fn run_kubernetes(&mut self, reached: Reached) -> Result<Option<Connected>, Ended> {
        let (address, connection, since) = (reached.address, reached.connection, Instant::now());
        match self.plan.expected.check(connection.agent()) {
            Ok(warnings) => self.log_warnings(warnings),
            Err(unexpected) => {
                let why = unexpected.to_string();
                return self.on_unexpected(connection, since, why).await.map(|()| None);
            }
        }
        match self.withdraw_key(&connection).await {
            Withdrawal::Done => {}
            Withdrawal::Stopped(stop) => {
                connection.close_with_session(stop.reason).await;
                return Err(Ended::Stopped);
            }
            Withdrawal::Ended(why) => {
                self.down(PhaseName::Kubernetes, why);
                self.pause_if_short_lived(since).await?;
                return Ok(None);
            }
            Withdrawal::Replaced(connected) => {
                self.down(PhaseName::Kubernetes, failover_reason(address, connected.address));
                return Ok(Some(*connected));
            }
        }
        self.starting = false;
        if self.last_up.replace(since).is_none_or(|last| last.elapsed() >= 2 * RETRY_MAX) {
            self.backoff.reset();
        }
        match connection.session() {
            Some(Joined { id, .. }) => {
                let id = id.clone();
                self.run_session(address, connection, id).await
            }
            None => self.run_alone(address, connection, since).await,
        }
    }

    /// Serves a connection to an agent that knows no sessions.
    async fn run_alone(
        &mut self,
        address: SocketAddr,
        mut connection: AgentConnection<Kubernetes>,
        since: Instant,
    ) -> Result<Option<Connected>, Ended> {
        connection.serve_streams();
        self.routes.set_kubernetes(KubernetesLink::Alone(connection.link()));
        let instance = connection.agent().instance.clone().unwrap_or_default();
        self.status.up(address, instance.clone());
        self.report_mismatches(PhaseName::Kubernetes, connection.tunnel_mismatches());
        let (liveness, lock) = (connection.liveness(), AuthLock::default());
        let vm_log = self.vm_log.show(connection.take_log(), &instance, &self.status);
        tokio::select! {
            never = vm_log => match never {},
            stop = stopped(&mut self.stop) => {
                self.routes.close();
                self.drain_streams(connection.credits(), stop.drain).await;
                connection.close(stop.reason).await;
                Err(Ended::Stopped)
            }
            why = connection.ended() => {
                self.routes.close();
                let why = format!("{why}{}", cost(&connection));
                drop(connection);
                self.down(PhaseName::Kubernetes, why);
                self.pause_if_short_lived(since).await?;
                Ok(None)
            }
            connected = await_failover(&self.plan, &liveness, PhaseName::Kubernetes, &lock) => {
                self.routes.close();
                let why = failover_reason(address, connected.address) + &cost(&connection);
                drop(connection);
                self.down(PhaseName::Kubernetes, why);
                Ok(Some(connected))
            }
        }
    }

    /// The agent has the pod's key, so what it runs with is proven: a start fails for good. Later a new VM may be at the
    /// same address.
    pub(super) async fn on_unexpected(
        &mut self,
        connection: AgentConnection<Kubernetes>,
        since: Instant,
        why: String,
    ) -> Result<(), Ended> {
        connection.close_with_session(&quote(&why)).await;
        if self.starting {
            return Err(Ended::Unexpected(why));
        }
        self.down(PhaseName::Kubernetes, why);
        self.pause_if_short_lived(since).await
    }

    pub(super) fn log_warnings(&mut self, warnings: Vec<String>) {
        if warnings != self.logged_warnings {
            for warning in &warnings {
                tracing::warn!("pod {}: {warning}", self.plan.id);
            }
            self.logged_warnings = warnings;
        }
    }

    /// Deletes the pod's key from the KBS, unless the connection ends first.
    async fn withdraw_key(&mut self, connection: &AgentConnection<Kubernetes>) -> Withdrawal {
        let Some(publication) = self.plan.publication.clone() else { return Withdrawal::Done };
        let (liveness, mut stop, lock) = (connection.liveness(), self.stop.clone(), AuthLock::default());
        tokio::select! {
            // Nothing else is looked at if the key is gone already.
            biased;
            () = until_gone(&publication, &self.status, CLIENTS_WAIT, |why| self.set_degraded(why)) => Withdrawal::Done,
            stop = stopped(&mut stop) => Withdrawal::Stopped(stop),
            why = connection.ended() => Withdrawal::Ended(why.to_string()),
            connected = await_failover(&self.plan, &liveness, PhaseName::Kubernetes, &lock) => {
                Withdrawal::Replaced(Box::new(connected))
            }
        }
    }

    /// Waits until no stream is open, for at most `limit`.
    pub(super) async fn drain_streams(&self, streams: &Credits, limit: Duration) {
        // The streams that outlast the limit are counted below.
        drop(timeout(limit, streams.idle()).await);
        match streams.open_streams() {
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
    pub(super) async fn pause_if_short_lived(&mut self, since: Instant) -> Result<(), Ended> {
        if since.elapsed() < RETRY_MAX {
            return self.pause().await;
        }
        self.backoff.reset();
        Ok(())
    }

    pub(super) fn down(&self, phase: PhaseName, why: String) {
        self.status.down(phase, &why);
        self.set_degraded(why);
    }

    pub(super) fn set_degraded(&self, why: String) {
        self.status.set_state(match self.last_up {
            Some(_) => PodState::Down { reason: why },
            None => PodState::Connecting { last_error: Some(why) },
        });
    }

    pub(super) fn report_mismatches(&mut self, phase: PhaseName, line: Option<&str>) {
        let reported = self.reported_mismatches.insert(phase, line.unwrap_or_default().to_owned());
        if let Some(line) = line
            && reported.as_deref() != Some(line)
        {
            self.status.emit(&PodEvent::TunnelMismatch(line.to_owned()));
        }
    }
}

/// What the end of the connection costs: its streams cannot go on over another one.
fn cost(connection: &AgentConnection<Kubernetes>) -> String {
    match connection.open_streams() {
        0 => String::new(),
        1 => "; 1 stream is reset by the reconnect".to_owned(),
        streams => format!("; {streams} streams are reset by the reconnect"),
    }
}

/// Waits for the order to stop.
pub(super) async fn stopped(stop: &mut watch::Receiver<Option<Stop>>) -> Stop {
    let order = stop.wait_for(Option::is_some).await.ok().and_then(|stop| stop.clone());
    // The sender was dropped: the adaptor is gone, and no order can come any more.
    order.unwrap_or(Stop { reason: "the adaptor is gone", drain: Duration::ZERO })
}
