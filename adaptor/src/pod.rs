//! One pod's channel: Attestation, then Kubernetes, then kept up for ever.
//!
//! ```text
//! start ---> reach: Attestation first --+--> attend ---- upgrade, or the end --+
//!                                       |                                      v
//! resume --> reach: Kubernetes first ---+--> keep up --- the end ------> reach: Kubernetes first
//! ```
//! Where a connection falls silent while it is attended or kept up, the agent is reached anew beside it.
//!
//! Reaching means to find out in which phase the agent is, and to connect in that one. Falling back to Attestation is
//! safe: it proves nothing to either side, and nothing of the Kubernetes phase is served on it.

mod beside;
mod reach;
mod report;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use secure_comms_keys::{PodPublic, WorkerNodeKey};
use secure_comms_protocol::limits::RETRY_MAX;
use secure_comms_protocol::{Attestation, Kubernetes, PhaseName, PodId};
use secure_comms_tunnel::Backoff;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use self::reach::{Failure, Reached, Won};
use crate::address::Address;
use crate::routes::Routes;
use crate::session::{Attested, Session, Tunnels};
use crate::ssh::{ConnectError, Gate};

pub(crate) use self::report::Report;
pub use self::report::{Observer, PodEvent, PodState};

/// What an operator reads who has lost a VM.
pub const LOST: &str = "the VM answers with a host key that is not this pod's and refuses attestation: it is lost to \
    this pod (a stranger played the KBS, or the address belongs to another VM); make a new VM, and use HTTPS to the KBS \
    to prevent it";

/// How a VM comes to its keys.
#[derive(Clone, Debug)]
pub(crate) enum Way {
    /// It attests, with these tunnels of ours.
    Attests(Tunnels<Attestation>),
    /// By its user data: there is no Attestation phase.
    UserData,
}

/// What a pod's channel is made of.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) id: PodId,
    /// Never empty.
    pub(crate) addresses: Vec<Address>,
    pub(crate) node_key: WorkerNodeKey,
    pub(crate) pod_key: PodPublic,
    pub(crate) way: Way,
    pub(crate) kubernetes: Tunnels<Kubernetes>,
    pub(crate) rekey_bytes: usize,
}

/// What ends a channel from this side.
#[derive(Clone, Debug)]
pub(crate) struct Stop {
    /// What the agent hears.
    pub(crate) reason: &'static str,
    /// How long open streams may go on.
    pub(crate) drain: Duration,
}

/// Why a channel is driven no more.
#[derive(Debug, PartialEq, Eq)]
enum Ended {
    Stopped,
    Lost,
}

/// Drives one pod's channel.
#[derive(Debug)]
pub(crate) struct Driver {
    plan: Plan,
    routes: Arc<Routes>,
    report: Report,
    stop: watch::Receiver<Option<Stop>>,
    /// A start fails for good when the VM is lost; a pod that has been up is worth waiting for.
    starting: bool,
    backoff: Backoff,
    /// When the Kubernetes phase last came up.
    last_up: Option<Instant>,
    /// An agent has said `upgrade`, and the Kubernetes phase has not been up since.
    upgraded: bool,
    /// The tunnels without a partner that were told of last, so that a reconnect does not repeat them.
    unpartnered: HashMap<PhaseName, Vec<String>>,
}

impl Driver {
    /// A driver that stops once there is something in `stop`.
    pub(crate) fn new(
        plan: Plan,
        routes: Arc<Routes>,
        report: Report,
        stop: watch::Receiver<Option<Stop>>,
    ) -> Self {
        Self {
            plan,
            routes,
            report,
            stop,
            starting: true,
            backoff: Backoff::default(),
            last_up: None,
            upgraded: false,
            unpartnered: HashMap::new(),
        }
    }

    /// Brings a new pod's channel up and keeps it up, until it is stopped or the start fails.
    pub(crate) async fn start(self) {
        let first = match self.plan.way {
            Way::Attests(_) => PhaseName::Attestation,
            Way::UserData => PhaseName::Kubernetes,
        };
        self.run(first).await;
    }

    /// The same for a pod that was started before this process was.
    pub(crate) async fn resume(mut self) {
        self.starting = false;
        self.run(PhaseName::Kubernetes).await;
    }

    async fn run(mut self, first: PhaseName) {
        let ended = self.drive(first).await;
        self.routes.close();
        match ended {
            Ended::Stopped => {
                self.report.state(PodState::Stopped);
                self.report.event(&PodEvent::Stopped);
            }
            Ended::Lost => self.report.state(PodState::Failed { reason: LOST.into() }),
        }
    }

    async fn drive(&mut self, mut first: PhaseName) -> Ended {
        loop {
            match self.round(first).await {
                Ok(next) => first = next,
                Err(ended) => return ended,
            }
        }
    }

    /// Reaches the agent and stays with it, or pauses; the phase to try first in the next round.
    async fn round(&mut self, first: PhaseName) -> Result<PhaseName, Ended> {
        let gate = Gate::default();
        let reached = tokio::select! {
            _ = stopped(&mut self.stop) => return Err(Ended::Stopped),
            reached = reach::anywhere(&self.plan, first, &gate) => reached,
        };
        match reached {
            Ok(won) => {
                let mut won = Some(won);
                while let Some((index, (address, reached))) = won {
                    // What worked is tried first the next time.
                    if let Some(addresses) = self.plan.addresses.get_mut(..=index) {
                        addresses.rotate_right(1);
                    }
                    self.report.connected();
                    won = match reached {
                        Reached::Attestation(session) => self.attend(address, session).await?,
                        Reached::Kubernetes(session) => self.keep_up(address, session).await?,
                    };
                }
                Ok(PhaseName::Kubernetes)
            }
            Err(failures) => {
                self.failed(&failures)?;
                self.pause().await?;
                Ok(first)
            }
        }
    }

    /// Stays with an agent that attests, until it has its keys; or until it is silent and was reached anew.
    async fn attend(
        &mut self,
        address: SocketAddr,
        mut session: Session<Attestation>,
    ) -> Result<Option<Won>, Ended> {
        let since = Instant::now();
        self.report.state(PodState::Attesting { attempt: 0, last_error: None });
        self.report.event(&PodEvent::Attesting(address));
        self.tell_unpartnered(PhaseName::Attestation, session.unpartnered());
        self.routes.attestation(session.link());
        let (plan, pulse) = (self.plan.clone(), session.pulse());
        let mut beside = pin!(beside::another(&plan, &pulse, PhaseName::Attestation));
        loop {
            tokio::select! {
                stop = stopped(&mut self.stop) => {
                    self.routes.close();
                    session.close(stop.reason).await;
                    return Err(Ended::Stopped);
                }
                event = session.next() => match event {
                    Attested::Keys(keys) => self.report.keys(keys),
                    Attested::Upgrade => {
                        self.report.state(PodState::Upgrading);
                        self.report.event(&PodEvent::Upgrade);
                        self.routes.close();
                        // The agent ends the connection when it is ready for the next one.
                        session.close("coming back as kubernetes").await;
                        // A stranger could say it again and again.
                        let again = std::mem::replace(&mut self.upgraded, true);
                        if again {
                            self.pause().await?;
                        }
                        return Ok(None);
                    }
                    Attested::Ended(why) => {
                        self.routes.close();
                        self.down(PhaseName::Attestation, why.to_string());
                        // Whoever that was, another address gets the first chance now.
                        self.plan.addresses.rotate_left(1);
                        self.rest(since).await?;
                        return Ok(None);
                    }
                },
                won = &mut beside => {
                    self.routes.close();
                    self.down(PhaseName::Attestation, silent(address, &won));
                    return Ok(Some(won));
                }
            }
        }
    }

    /// Stays with the agent in the Kubernetes phase, until the connection ends; or until it is silent and was reached anew.
    async fn keep_up(
        &mut self,
        address: SocketAddr,
        mut session: Session<Kubernetes>,
    ) -> Result<Option<Won>, Ended> {
        let since = Instant::now();
        (self.starting, self.upgraded) = (false, false);
        if self.last_up.replace(since).is_none_or(|last| last.elapsed() >= 2 * RETRY_MAX) {
            self.backoff.reset();
        }
        self.routes.kubernetes(session.link());
        self.report.up(address, session.agent().instance.clone().unwrap_or_default());
        self.tell_unpartnered(PhaseName::Kubernetes, session.unpartnered());
        let pulse = session.pulse();
        tokio::select! {
            stop = stopped(&mut self.stop) => {
                self.routes.close();
                drain(&session, stop.drain).await;
                session.close(stop.reason).await;
                Err(Ended::Stopped)
            }
            why = session.ended() => {
                self.routes.close();
                drop(session);
                self.down(PhaseName::Kubernetes, why.to_string());
                self.rest(since).await?;
                Ok(None)
            }
            won = beside::another(&self.plan, &pulse, PhaseName::Kubernetes) => {
                self.routes.close();
                drop(session);
                self.down(PhaseName::Kubernetes, silent(address, &won));
                Ok(Some(won))
            }
        }
    }

    async fn pause(&mut self) -> Result<(), Ended> {
        tokio::select! {
            _ = stopped(&mut self.stop) => Err(Ended::Stopped),
            () = self.backoff.pause() => Ok(()),
        }
    }

    /// A connection that lasted was a success; one that did not must not be made again and again without a pause.
    async fn rest(&mut self, since: Instant) -> Result<(), Ended> {
        if since.elapsed() < RETRY_MAX {
            return self.pause().await;
        }
        self.backoff.reset();
        Ok(())
    }

    fn failed(&mut self, failures: &[Failure]) -> Result<(), Ended> {
        let why = if failures.iter().any(|failure| failure.lost) {
            // Later on the VM may yet be replaced at the same address.
            if self.starting {
                return Err(Ended::Lost);
            }
            LOST.to_owned()
        } else if failures.is_empty() {
            "the names of the addresses resolve to nothing".to_owned()
        } else {
            failures.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ") + &self.advice(failures)
        };
        self.report.failing(&why);
        self.trouble(why);
        Ok(())
    }

    fn advice(&self, failures: &[Failure]) -> String {
        let kubernetes = || failures.iter().filter_map(|failure| failure.kubernetes.as_ref());
        let attests = matches!(self.plan.way, Way::Attests(_));
        if kubernetes().any(|error| matches!(error, ConnectError::Refused { .. })) {
            let node = self.plan.node_key.public().map(|key| key.to_string()).unwrap_or_default();
            let source =
                if attests { "default/sshclient/publicKey in the KBS" } else { "sc-wn-pub in its user data" };
            return format!(
                "; the agent has this pod's key and rejects this worker node's ({node}): see that {source} is this \
                 node's, and start a new VM"
            );
        }
        if !attests && kubernetes().any(|error| matches!(error, ConnectError::WrongHostKey { .. })) {
            return "; see that the VM got this pod's user data, and that the address is its own".into();
        }
        String::new()
    }

    fn down(&mut self, phase: PhaseName, why: String) {
        self.report.down(phase, &why);
        self.trouble(why);
    }

    fn trouble(&self, why: String) {
        self.report.state(match self.last_up {
            Some(_) => PodState::Down { reason: why },
            None => PodState::Connecting { last_error: Some(why) },
        });
    }

    fn tell_unpartnered(&mut self, phase: PhaseName, lines: &[String]) {
        let told = self.unpartnered.entry(phase).or_default();
        if told.as_slice() != lines {
            *told = lines.to_vec();
            lines.iter().for_each(|line| self.report.event(&PodEvent::Unpartnered(line.clone())));
        }
    }
}

/// Why a connection to `address` was given up.
fn silent(address: SocketAddr, (_, (anew, _)): &Won) -> String {
    format!("nothing came from {address} any more; the agent was reached anew at {anew}")
}

/// Waits for the order to stop.
async fn stopped(stop: &mut watch::Receiver<Option<Stop>>) -> Stop {
    let order = stop.wait_for(Option::is_some).await.ok().and_then(|stop| stop.clone());
    // Nobody is left to give one: the adaptor is gone.
    order.unwrap_or(Stop { reason: "the adaptor is gone", drain: Duration::ZERO })
}

/// Waits until no stream is open. There is no event for that, and the process is ending: so it looks now and then.
async fn drain(session: &Session<Kubernetes>, limit: Duration) {
    // What does not end in time is counted below.
    drop(timeout(limit, session.idle()).await);
    match session.open_streams() {
        0 => {}
        left => tracing::warn!("{left} streams are cut: they did not end within {} s", limit.as_secs()),
    }
}
