//! One socket address at which the pod's VM may be: connects there again and again, and serves the Attestation phase,
//! until the Kubernetes phase is up there or elsewhere.
//!
//! In the Attestation phase nothing is proven. So each address has a task, a backoff and limits of its own: whatever
//! answers at one of them holds up no other.

use std::net::SocketAddr;
use std::pin::pin;
use std::time::Duration;

use secure_comms_protocol::limits::RETRY_MAX;
use secure_comms_protocol::{Attestation, KeyProgress, Kubernetes, PhaseName};
use secure_comms_tunnel::Backoff;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, interval_at, sleep};

use super::connect::{AnyConnection, Attempt, Failure};
use super::failover::{await_failover, failover_reason};
use super::plan::Plan;
use super::slots::Slots;
use crate::transport::agent_connection::{AgentConnection, AttestationEvent};
use crate::transport::ssh::{AgentLink, AuthHold, AuthLock};

/// Where the Kubernetes phase is expected, an answer in the Attestation phase waits this long: an address of another VM,
/// or a stranger's, answers in that phase, too, and a pod that counts as attesting again needs its keys at the KBS.
const GRACE: Duration = Duration::from_secs(1);

/// What a candidate reports.
#[derive(Debug)]
pub(super) enum Report {
    /// A round of attempts failed.
    Failed(Failure),
    /// Connected in the Attestation phase.
    Attesting {
        link: AgentLink<Attestation>,
        mismatches: Option<String>,
        /// What the agent says of the VM's init-data.
        init_data: Option<String>,
    },
    Keys(KeyProgress),
    /// The agent says that it has its keys.
    Upgrade,
    /// The connection in the Attestation phase ended, and why.
    Ended(String),
}

/// What all candidates of a pod share.
#[derive(Clone, Debug)]
pub(super) struct Common {
    pub(super) plan: Plan,
    /// Only one of them authenticates in the Kubernetes phase at a time.
    pub(super) lock: AuthLock,
    pub(super) slots: Slots,
    /// Holds the reason for the agents once the candidates are to end.
    pub(super) end: watch::Receiver<Option<&'static str>>,
    pub(super) reports: mpsc::Sender<(SocketAddr, Report)>,
}

/// The task of one address.
pub(super) struct Candidate {
    common: Common,
    address: SocketAddr,
    /// The phase to try first the next time.
    first: PhaseName,
    backoff: Backoff,
    /// Whether the agent here said `upgrade` before.
    upgraded: bool,
}

/// How an attestation ended.
enum Attested {
    /// Another connection replaced it.
    Replaced(Box<AnyConnection>),
    /// The address is tried again, at once or after a pause.
    Again { pause: bool },
    /// The candidate is to end.
    End,
}

impl Candidate {
    pub(super) fn new(common: Common, address: SocketAddr, first: PhaseName) -> Self {
        Self { common, address, first, backoff: Backoff::default(), upgraded: false }
    }

    /// Returns the connection once the Kubernetes phase is up here; nothing if the candidate was to end before. Starts with
    /// the connection that was found already, if any.
    ///
    /// Dropping the future cuts the connection.
    pub(super) async fn run(
        mut self,
        mut found: Option<AnyConnection>,
    ) -> Option<AgentConnection<Kubernetes>> {
        let mut end = self.common.end.clone();
        let mut grace = self.first == PhaseName::Kubernetes && found.is_none();
        loop {
            let slots = self.common.slots.clone();
            let connected = async {
                let slot = slots.take().await;
                let connected = match found.take() {
                    Some(connection) => Ok(connection),
                    None => self.connect().await,
                };
                if std::mem::take(&mut grace) && matches!(connected, Ok(AnyConnection::Attestation(_))) {
                    sleep(GRACE).await;
                }
                (slot, connected)
            };
            let (slot, connected) = tokio::select! {
                _ = ordered(&mut end) => return None,
                connected = connected => connected,
            };
            let mut next = connected.map(|connection| Attested::Replaced(Box::new(connection)));
            let pause = loop {
                next = match next {
                    Ok(Attested::Replaced(connection)) => match *connection {
                        AnyConnection::Kubernetes(connection) => return Some(connection),
                        AnyConnection::Attestation(connection) => Ok(self.attest(connection).await),
                    },
                    Ok(Attested::Again { pause }) => break pause,
                    Ok(Attested::End) => return None,
                    Err(failure) => {
                        self.report(Report::Failed(failure)).await;
                        break true;
                    }
                };
            };
            drop(slot);
            if pause {
                tokio::select! {
                    _ = ordered(&mut end) => return None,
                    () = self.backoff.pause() => {}
                }
            }
        }
    }

    async fn connect(&self) -> Result<AnyConnection, Failure> {
        let Common { plan, lock, .. } = &self.common;
        Attempt::new(plan.clone(), self.address, lock.clone(), AuthHold::default()).run(self.first).await
    }

    /// Serves a connection in the Attestation phase until the agent has its keys, the connection ends, or one of its
    /// limits passes.
    async fn attest(&mut self, mut connection: AgentConnection<Attestation>) -> Attested {
        let since = Instant::now();
        // An agent that had its keys in the meantime is in the Kubernetes phase.
        self.first = PhaseName::Kubernetes;
        let (link, mismatches) = (connection.link(), connection.tunnel_mismatches().map(str::to_owned));
        let init_data = connection.agent().init_data.clone();
        self.report(Report::Attesting { link, mismatches, init_data }).await;
        let plan = self.common.plan.at(self.address);
        let (liveness, limits) = (connection.liveness(), plan.attestation_limits);
        let (lock, mut end) = (self.common.lock.clone(), self.common.end.clone());
        let mut failover = pin!(await_failover(&plan, &liveness, PhaseName::Attestation, &lock));
        let (mut no_progress, mut no_keys) = (pin!(sleep(limits.progress)), pin!(sleep(limits.total)));
        let mut share = interval_at(Instant::now() + limits.share, limits.share);
        let (why, bye) = loop {
            tokio::select! {
                reason = ordered(&mut end) => {
                    connection.close(reason).await;
                    return Attested::End;
                }
                event = connection.next_event() => match event {
                    AttestationEvent::Keys(keys) => {
                        no_progress.as_mut().reset(Instant::now() + limits.progress);
                        self.report(Report::Keys(keys)).await;
                    }
                    AttestationEvent::Upgrade => return self.upgrade(connection).await,
                    AttestationEvent::Ended(why) => break (why.to_string(), None),
                },
                connected = &mut failover => {
                    self.report(Report::Ended(failover_reason(self.address, connected.address))).await;
                    return Attested::Replaced(Box::new(connected.connection));
                }
                () = &mut no_progress => break (
                    format!("the agent reported nothing on its keys within {} s; connecting again", limits.progress.as_secs()),
                    Some("no progress with the keys"),
                ),
                () = &mut no_keys => break (
                    format!("the agent did not get its keys within {} s; connecting again", limits.total.as_secs()),
                    Some("no progress with the keys"),
                ),
                _ = share.tick() => if self.common.slots.is_crowded() {
                    break (
                        format!("the agent did not get its keys within {} s; other addresses wait", limits.share.as_secs()),
                        Some("other addresses wait"),
                    )
                },
            }
        };
        if let Some(bye) = bye {
            connection.close(bye).await;
        }
        self.report(Report::Ended(why)).await;
        self.again_after(since)
    }

    /// The agent has its keys, or says so.
    async fn upgrade(&mut self, connection: AgentConnection<Attestation>) -> Attested {
        self.report(Report::Upgrade).await;
        // The agent ends the connection when it is ready for the next one.
        connection.close("reconnecting for the Kubernetes phase").await;
        // A stranger could send `upgrade` again and again.
        Attested::Again { pause: std::mem::replace(&mut self.upgraded, true) }
    }

    /// A connection that ended soon is not retried in a tight loop. One that lasted resets the backoff.
    fn again_after(&mut self, since: Instant) -> Attested {
        let lasted = since.elapsed() >= RETRY_MAX;
        if lasted {
            self.backoff.reset();
        }
        Attested::Again { pause: !lasted }
    }

    async fn report(&self, report: Report) {
        // The receiver is gone once the candidates are to end: then nothing is shown any more.
        drop(self.common.reports.send((self.address, report)).await);
    }
}

/// Waits for the order to end.
async fn ordered(end: &mut watch::Receiver<Option<&'static str>>) -> &'static str {
    let order = end.wait_for(Option::is_some).await.ok().and_then(|order| *order);
    // The sender was dropped: the driver is gone.
    order.unwrap_or("the adaptor is gone")
}
