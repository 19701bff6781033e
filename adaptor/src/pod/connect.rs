//! Reaching the agent at one address, in whichever phase it is.

use std::fmt;
use std::net::SocketAddr;

use secure_comms_protocol::limits::TCP_CONNECT;
use secure_comms_protocol::tag::Host;
use secure_comms_protocol::{Attestation, Kubernetes, PhaseName};
use tokio::net::lookup_host;
use tokio::time::timeout;

use super::driver::{Plan, Way};
use crate::address::Address;
use crate::transport::race::race;
use crate::transport::session::Session;
use crate::transport::ssh::{self, ConnectError, Dial, Gate, Turn};

/// An agent that was reached, and the phase that it is in.
#[derive(Debug)]
pub(super) enum Reached {
    Attestation(Session<Attestation>),
    Kubernetes(Session<Kubernetes>),
}

/// Why no agent of the pod was reached at one address: the last error of each phase that was tried.
#[derive(Debug)]
pub(super) struct Failure {
    address: String,
    pub(super) attestation: Option<ConnectError>,
    pub(super) kubernetes: Option<ConnectError>,
    /// The VM there is lost to the pod.
    pub(super) lost: bool,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.address)?;
        for (phase, error) in
            [(PhaseName::Attestation, &self.attestation), (PhaseName::Kubernetes, &self.kubernetes)]
        {
            if let Some(error) = error {
                write!(f, ": {}: {error}", phase.user())?;
            }
        }
        Ok(())
    }
}

impl Failure {
    fn new(address: impl fmt::Display) -> Self {
        Self { address: address.to_string(), attestation: None, kubernetes: None, lost: false }
    }
}

/// An agent that was reached, where, and the index of that address among the pod's.
pub(super) type Won = (usize, (SocketAddr, Reached));

/// Tries all addresses of the pod, names by all addresses they resolve to; `first` is tried first at each.
pub(super) async fn anywhere(plan: &Plan, first: PhaseName, gate: &Gate) -> Result<Won, Vec<Failure>> {
    // Where the Kubernetes phase is expected, one that merely attests may be a stranger.
    let settles = move |(_, reached): &(SocketAddr, Reached)| {
        first == PhaseName::Attestation || matches!(reached, Reached::Kubernetes(_))
    };
    let turn = Turn::default();
    let one = |address: Address| {
        let (plan, turn, gate) = (plan.clone(), turn.clone(), gate.clone());
        async move {
            let sockets = resolve(&address, first).await.map_err(|failure| vec![failure])?;
            let attempt = |socket| {
                let attempt = Attempt::new(plan.clone(), socket, turn.clone(), gate.clone());
                async move { attempt.run(first).await.map(|reached| (socket, reached)) }
            };
            race(sockets, attempt, settles).await.map(|(_, won)| won)
        }
    };
    let raced = race(plan.addresses.clone(), one, settles).await;
    raced.map_err(|failures| failures.into_iter().flatten().collect())
}

async fn resolve(address: &Address, first: PhaseName) -> Result<Vec<SocketAddr>, Failure> {
    let name = match &address.host {
        Host::Ip(ip) => return Ok(vec![(*ip, address.port).into()]),
        Host::Name(name) => name,
    };
    let error = match timeout(TCP_CONNECT, lookup_host((name.as_str(), address.port))).await {
        Ok(Ok(found)) => return Ok(found.collect()),
        Ok(Err(error)) => ConnectError::Unreachable(error),
        Err(_) => ConnectError::Timeout(TCP_CONNECT.as_secs(), "looking up the name"),
    };
    let mut failure = Failure::new(address);
    match first {
        PhaseName::Attestation => failure.attestation = Some(error),
        PhaseName::Kubernetes => failure.kubernetes = Some(error),
    }
    Err(failure)
}

/// The tries at one address.
struct Attempt {
    plan: Plan,
    dial: Dial,
    turn: Turn,
    failure: Failure,
    /// A wrong host key that was shown before an agent in the Kubernetes phase refused attestation.
    suspect: Suspect,
}

/// Is the VM lost to its pod? Over a KBS without TLS a stranger may have played the KBS to it. The finding takes three
/// tries in a row: a host key that is not the pod's, a refusal to attest because the agent is in the Kubernetes phase,
/// and the same host key again. The last one is for an agent that got its keys between the first two.
#[derive(Debug, Default)]
enum Suspect {
    #[default]
    Nothing,
    Shown(String),
    ShownThenRefused(String),
}

impl Suspect {
    /// A host key that is not the pod's; true if the VM is lost.
    fn wrong_key(&mut self, shown: &str) -> bool {
        let lost = matches!(self, Self::ShownThenRefused(before) if before == shown);
        *self = Self::Shown(shown.to_owned());
        lost
    }

    /// A refusal of attestation, by an agent that says it is in this phase for good.
    fn refused(&mut self, hint: Option<PhaseName>) {
        *self = match std::mem::take(self) {
            Self::Shown(key) if hint == Some(PhaseName::Kubernetes) => Self::ShownThenRefused(key),
            _ => Self::Nothing,
        };
    }
}

impl Attempt {
    fn new(plan: Plan, address: SocketAddr, turn: Turn, gate: Gate) -> Self {
        let dial = Dial { address, node_key: plan.node_key.clone(), rekey_bytes: plan.rekey_bytes, gate };
        Self { plan, dial, turn, failure: Failure::new(address), suspect: Suspect::Nothing }
    }

    /// Goes back and forth between the phases, as long as the agent says that it is in the other one.
    async fn run(mut self, first: PhaseName) -> Result<Reached, Failure> {
        /// Attestation, Kubernetes, and both again to be sure that the VM is lost.
        const TRIES: usize = 4;
        let mut phase = first;
        for _ in 0..TRIES {
            let other = match phase {
                PhaseName::Attestation => match self.attestation().await {
                    Ok(session) => return Ok(Reached::Attestation(session)),
                    Err(error) => self.after_attestation(error),
                },
                PhaseName::Kubernetes => match self.kubernetes().await {
                    Ok(session) => return Ok(Reached::Kubernetes(session)),
                    Err(error) => self.after_kubernetes(error),
                },
            };
            match other {
                Some(other) => phase = other,
                None => break,
            }
        }
        Err(self.failure)
    }

    async fn attestation(&self) -> Result<Session<Attestation>, ConnectError> {
        let Way::Attests(tunnels) = &self.plan.way else {
            return Err(ConnectError::Protocol(
                "attest",
                "there is no Attestation phase without Trustee".into(),
            ));
        };
        let connection = ssh::attestation(&self.dial, tunnels.outbounds()).await?;
        Session::establish(connection, &self.plan.id, tunnels).await
    }

    async fn kubernetes(&self) -> Result<Session<Kubernetes>, ConnectError> {
        let tunnels = &self.plan.kubernetes;
        let connection =
            ssh::kubernetes(&self.dial, self.plan.pod_key, self.turn.clone(), tunnels.outbounds()).await?;
        Session::establish(connection, &self.plan.id, tunnels).await
    }

    /// The phase to try next, if any.
    fn after_attestation(&mut self, error: ConnectError) -> Option<PhaseName> {
        let refused = matches!(error, ConnectError::Refused { .. });
        self.suspect.refused(error.hint().filter(|_| !error.hints_fresh()));
        self.failure.attestation = Some(error);
        // A worker-node key that was rejected once is not tried again in this round.
        let rejected = matches!(self.failure.kubernetes, Some(ConnectError::Refused { .. }));
        (refused && !rejected).then_some(PhaseName::Kubernetes)
    }

    fn after_kubernetes(&mut self, error: ConnectError) -> Option<PhaseName> {
        let attests = matches!(self.plan.way, Way::Attests(_));
        let fall_back = match &error {
            ConnectError::WrongHostKey { shown } => {
                self.failure.lost = attests && self.suspect.wrong_key(shown);
                !self.failure.lost
            }
            ConnectError::Refused { .. } => self.failure.attestation.is_none(),
            ConnectError::Unreachable(_) | ConnectError::Timeout(..) | ConnectError::Protocol(..) => false,
        };
        self.failure.kubernetes = Some(error);
        (attests && fall_back).then_some(PhaseName::Attestation)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_wrong_key_on_both_sides_of_a_refusal_is_a_lost_vm() {
        let mut suspect = Suspect::default();
        suspect.refused(Some(PhaseName::Kubernetes));
        assert!(!suspect.wrong_key("k"));
        assert!(!suspect.wrong_key("k"));
        suspect.refused(Some(PhaseName::Kubernetes));
        assert!(suspect.wrong_key("k"));
    }

    #[test]
    fn an_agent_that_moved_on_between_the_tries_is_not_lost() {
        let mut suspect = Suspect::default();
        assert!(!suspect.wrong_key("ephemeral"));
        suspect.refused(Some(PhaseName::Kubernetes));
        assert!(!suspect.wrong_key("another"));
        for hint in [None, Some(PhaseName::Attestation)] {
            suspect.refused(hint);
            assert!(!suspect.wrong_key("another"));
        }
    }
}
