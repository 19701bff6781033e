//! Connects to the agent at one of the pod's addresses, in the phase that the agent is in.
//!
//! Which phase that is, the attempts find out. Falling back to Attestation is safe: that phase authenticates neither
//! end, and nothing of the Kubernetes phase is served in it.

use std::fmt;
use std::net::SocketAddr;

use secure_comms_protocol::limits::{CONNECT_STAGGER, TCP_CONNECT};
use secure_comms_protocol::tag::Host;
use secure_comms_protocol::{Attestation, Kubernetes, Lane, PhaseName};
use secure_comms_tunnel::Resolver;
use secure_comms_tunnel::race::race;

use super::lost_vm::LostVmDetector;
use super::plan::Plan;
use crate::address::Address;
use crate::key_source::KeySource;
use crate::transport::agent_connection::{AgentConnection, Joining};
use crate::transport::ssh::{self, AuthHold, AuthLock, ConnectError, Dial, Flag};

/// A connection with an agent, in the phase that the agent is in.
#[derive(Debug)]
pub(super) enum AnyConnection {
    Attestation(AgentConnection<Attestation>),
    Kubernetes(AgentConnection<Kubernetes>),
}

/// A connection, and where it was opened.
#[derive(Debug)]
pub(super) struct Connected {
    /// Index into [`Plan::addresses`].
    pub(super) index: usize,
    pub(super) address: SocketAddr,
    pub(super) connection: AnyConnection,
}

/// Why connecting to one address failed: the last error of each phase that was tried.
#[derive(Debug)]
pub(super) struct Failure {
    address: String,
    pub(super) attestation: Option<ConnectError>,
    pub(super) kubernetes: Option<ConnectError>,
    /// Whether the VM there is lost to the pod.
    pub(super) vm_lost: bool,
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
    pub(super) fn new(address: impl fmt::Display) -> Self {
        Self { address: address.to_string(), attestation: None, kubernetes: None, vm_lost: false }
    }
}

/// Races all addresses of the pod, and all addresses that a name resolves to. `first` is the phase to try first at each.
/// Attempts that share `lock` authenticate in the Kubernetes phase one at a time.
///
/// # Errors
/// One failure for each address that was tried; none if the names resolve to nothing.
pub(super) async fn connect_any(
    plan: &Plan,
    first: PhaseName,
    hold: &AuthHold,
    lock: &AuthLock,
) -> Result<Connected, Vec<Failure>> {
    // Where the Kubernetes phase is expected, an agent that offers only Attestation may be a stranger.
    let settles = move |(_, connection): &(SocketAddr, AnyConnection)| {
        first == PhaseName::Attestation || matches!(connection, AnyConnection::Kubernetes(_))
    };
    let connect_address = |address: Address| {
        let (plan, lock, hold) = (plan.clone(), lock.clone(), hold.clone());
        async move {
            let sockets = resolve(&address, first).await.map_err(|failure| vec![failure])?;
            let attempt = |socket| {
                let attempt = Attempt::new(plan.clone(), socket, lock.clone(), hold.clone());
                async move { attempt.run(first).await.map(|connection| (socket, connection)) }
            };
            race(sockets, CONNECT_STAGGER, attempt, settles).await.map(|(_, connected)| connected)
        }
    };
    match race(plan.addresses.clone(), CONNECT_STAGGER, connect_address, settles).await {
        Ok((index, (address, connection))) => Ok(Connected { index, address, connection }),
        Err(failures) => Err(failures.into_iter().flatten().collect()),
    }
}

/// The socket addresses of an address.
///
/// # Errors
/// The name cannot be looked up.
pub(super) async fn resolve(address: &Address, first: PhaseName) -> Result<Vec<SocketAddr>, Failure> {
    let name = match &address.host {
        Host::Ip(ip) => return Ok(vec![(*ip, address.port).into()]),
        Host::Name(name) => name,
    };
    let error = match Resolver::default().lookup(name, address.port).await {
        Ok(found) => return Ok(found),
        Err(error) => ConnectError::Lookup(error),
    };
    let mut failure = Failure::new(address);
    match first {
        PhaseName::Attestation => failure.attestation = Some(error),
        PhaseName::Kubernetes => failure.kubernetes = Some(error),
    }
    Err(failure)
}

/// The connection attempts at one address.
pub(super) struct Attempt {
    plan: Plan,
    dial: Dial,
    lock: AuthLock,
    failure: Failure,
    detector: LostVmDetector,
}

impl Attempt {
    pub(super) fn new(plan: Plan, address: SocketAddr, lock: AuthLock, hold: AuthHold) -> Self {
        let dial = Dial {
            address,
            tcp_timeout: TCP_CONNECT,
            node_key: plan.node_key.clone(),
            rekey_bytes: plan.rekey_bytes,
            kex: plan.kex,
            hold,
            admission: plan.admission.clone(),
            connected: Flag::default(),
            answered: plan.answered.clone(),
            account: plan.account.clone(),
        };
        Self { plan, dial, lock, failure: Failure::new(address), detector: LostVmDetector::default() }
    }

    /// Alternates between the phases for as long as the agent says that it is in the other one.
    ///
    /// # Errors
    /// The last error of each phase that was tried.
    pub(super) async fn run(mut self, first: PhaseName) -> Result<AnyConnection, Failure> {
        /// Attestation and Kubernetes, and both again to be sure that the VM is lost.
        const ATTEMPTS_MAX: usize = 4;
        let mut phase = first;
        for _ in 0..ATTEMPTS_MAX {
            let other = match phase {
                PhaseName::Attestation => match self.attestation().await {
                    Ok(connection) => return Ok(AnyConnection::Attestation(connection)),
                    Err(error) => self.after_attestation(error),
                },
                PhaseName::Kubernetes => match self.kubernetes().await {
                    Ok(connection) => return Ok(AnyConnection::Kubernetes(connection)),
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

    async fn attestation(&self) -> Result<AgentConnection<Attestation>, ConnectError> {
        let KeySource::Kbs(tunnels) = &self.plan.attestation else {
            return Err(ConnectError::Protocol(
                "attest",
                "there is no Attestation phase without Trustee".into(),
            ));
        };
        let connection = ssh::connect_attestation(&self.dial, tunnels.outbounds()).await?;
        AgentConnection::establish(connection, &self.plan.id, tunnels, None).await
    }

    async fn kubernetes(&self) -> Result<AgentConnection<Kubernetes>, ConnectError> {
        let tunnels = &self.plan.kubernetes;
        let (host, lock) = (self.plan.pod_key, self.lock.clone());
        let connection = ssh::connect_kubernetes(&self.dial, host, lock, tunnels.outbounds()).await?;
        let joining = Joining { lane: Lane::Main, session: self.plan.session.clone() };
        AgentConnection::establish(connection, &self.plan.id, tunnels, Some(&joining)).await
    }

    /// The phase to try after a failure in the Attestation phase, if any.
    fn after_attestation(&mut self, error: ConnectError) -> Option<PhaseName> {
        let refused = matches!(error, ConnectError::Refused { .. });
        self.detector.attestation_refused(error.hint().filter(|_| !error.hints_fresh()));
        self.failure.attestation = Some(error);
        // A worker-node key that was rejected is not tried twice at one address.
        let rejected = matches!(self.failure.kubernetes, Some(ConnectError::Refused { .. }));
        (refused && !rejected).then_some(PhaseName::Kubernetes)
    }

    /// The phase to try after a failure in the Kubernetes phase, if any.
    fn after_kubernetes(&mut self, error: ConnectError) -> Option<PhaseName> {
        let attests = self.plan.attestation.attests();
        let fall_back = match &error {
            ConnectError::WrongHostKey { shown } => {
                self.failure.vm_lost = attests && self.detector.wrong_host_key(shown);
                !self.failure.vm_lost
            }
            ConnectError::Refused { .. } => self.failure.attestation.is_none(),
            ConnectError::Unreachable(_)
            | ConnectError::Lookup(_)
            | ConnectError::NotSsh(_)
            | ConnectError::Timeout(..)
            | ConnectError::Dismissed(..)
            | ConnectError::Protocol(..) => false,
        };
        self.failure.kubernetes = Some(error);
        (attests && fall_back).then_some(PhaseName::Attestation)
    }
}
