//! Opens one connection: TCP, handshake, authentication.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use russh::client::{self, AuthResult, Handle};
use russh::keys::PrivateKeyWithHashAlg;
use russh::{ChannelMsg, MethodKind, MethodSet};
use secure_comms_protocol::limits::{AUTHENTICATE, CONTROL_SUBSYSTEM};
use secure_comms_protocol::{Attestation, Kubernetes, Lane, PhaseName, TunnelName};
use secure_comms_ssh::channel::split;
use secure_comms_ssh::guard::{Guard, Guarded, Peer};
use secure_comms_ssh::link::SshLink;
use secure_comms_ssh::profile::{self, KeyExchange};
use secure_comms_tunnel::flow::LaneNumber;
use secure_comms_tunnel::session::Session;
use secure_comms_tunnel::{Account, Credits, Outbounds, Receiver, Sender};
use tokio::net::TcpStream;
use tokio::sync::OwnedMutexGuard;
use tokio::time::timeout;

use super::admission::{Admission, Precedence};
use super::auth_hold::{AuthHold, AuthLock};
use super::error::{ConnectError, cause};
use super::handler::{AgentLink, Callbacks, DirectOpener, Serving, Shared, TransportEnd, lock};
use super::phase::{AnyHost, ClientPhase};
use crate::transport::kbs_filter::KbsFilter;
use secure_comms_keys::{PodPublic, WorkerNodeKey};

/// Where to connect to, and with which key.
#[derive(Clone, Debug)]
pub(crate) struct Dial {
    /// Socket address of the agent.
    pub(crate) address: SocketAddr,
    /// Timeout of the TCP connect.
    pub(crate) tcp_timeout: Duration,
    /// The key that the worker node logs in with.
    pub(crate) node_key: WorkerNodeKey,
    /// Bytes in one direction after which the session keys are renewed.
    pub(crate) rekey_bytes: usize,
    /// Which key exchange is offered and accepted.
    pub(crate) kex: KeyExchange,
    /// What the attempt waits for before it authenticates.
    pub(crate) hold: AuthHold,
    /// The key exchanges of all pods.
    pub(crate) admission: Admission,
    /// Learns that the TCP handshake is complete.
    pub(crate) connected: Flag,
    /// Learns of an SSH server at the address.
    pub(crate) answered: Flag,
    /// What the pod's streams hold and move.
    pub(crate) account: Account,
}

/// Something that has happened, such as that an SSH server has answered at an address of the pod.
#[derive(Clone, Debug, Default)]
pub(crate) struct Flag(Arc<AtomicBool>);

impl Flag {
    pub(crate) fn get(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Records at the end of an attempt, however it ends, whether an SSH server answered.
struct RecordAnswer<'a> {
    guard: Guard,
    answered: &'a Flag,
}

impl Drop for RecordAnswer<'_> {
    fn drop(&mut self) {
        if self.guard.identified() {
            self.answered.set();
        }
    }
}

/// Cuts the connection when dropped: dropping a russh handle does not end its SSH session.
#[derive(Debug)]
struct CutOnDrop(Guard);

impl Drop for CutOnDrop {
    fn drop(&mut self) {
        self.0.cut();
    }
}

/// An authenticated connection. Dropping it cuts it and ends its streams.
pub(crate) struct SshConnection<P: ClientPhase> {
    handle: Arc<Handle<Callbacks<P>>>,
    shared: Arc<Shared<P>>,
    cut: CutOnDrop,
    _lock: OwnedMutexGuard<()>,
}

impl<P: ClientPhase> std::fmt::Debug for SshConnection<P> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SshConnection").field("phase", &P::NAME).finish_non_exhaustive()
    }
}

impl<P: ClientPhase> Drop for SshConnection<P> {
    fn drop(&mut self) {
        // Open streams see the end of the connection and reset their local ends. Aborting their tasks would close the
        // sockets in good order, and a truncated stream would look complete.
        self.shared.end(TransportEnd::Broken("closed from this side".into()));
    }
}

/// Connects in the Attestation phase: neither end is authenticated, unless the agent demands the worker-node key.
///
/// Dropping the future cuts the connection.
///
/// # Errors
/// See [`ConnectError`].
pub(crate) async fn connect_attestation(
    dial: &Dial,
    outbounds: Arc<Outbounds<Attestation, KbsFilter>>,
) -> Result<SshConnection<Attestation>, ConnectError> {
    // A lock of its own: an unauthenticated agent must not delay the other attempts.
    connect_phase(dial, AnyHost, AuthLock::default(), outbounds).await
}

/// Connects in the Kubernetes phase: the agent is authenticated by the pod key, and the adaptor by the worker-node key.
///
/// Dropping the future cuts the connection.
///
/// # Errors
/// See [`ConnectError`].
pub(crate) async fn connect_kubernetes(
    dial: &Dial,
    pod: PodPublic,
    lock: AuthLock,
    outbounds: Arc<Outbounds<Kubernetes, KbsFilter>>,
) -> Result<SshConnection<Kubernetes>, ConnectError> {
    connect_phase(dial, pod, lock, outbounds).await
}

async fn connect_phase<P: ClientPhase>(
    dial: &Dial,
    host: P::Host,
    lock: AuthLock,
    outbounds: Arc<Outbounds<P, KbsFilter>>,
) -> Result<SshConnection<P>, ConnectError> {
    let tcp = match timeout(dial.tcp_timeout, TcpStream::connect(dial.address)).await {
        Ok(tcp) => tcp.map_err(ConnectError::Unreachable)?,
        Err(_) => return Err(ConnectError::Timeout(dial.tcp_timeout.as_secs(), "connecting")),
    };
    dial.connected.set();
    tcp.set_nodelay(true).map_err(ConnectError::Unreachable)?;
    let (socket, guard) = Guarded::new(tcp, Peer::Server);
    let cut = CutOnDrop(guard.clone());
    let _answer = RecordAnswer { guard: guard.clone(), answered: &dial.answered };
    let shared = Shared::new(dial.address, host, outbounds, dial.account.clone());
    // After TCP, so that a VM that still boots needs no place; before the time of the handshake begins.
    let place = dial.admission.enter(precedence(P::NAME)).await;
    let handshake = async {
        let mut config = profile::client(dial.rekey_bytes, dial.kex);
        if !dial.hold.is_open() {
            // russh sends keepalives before authentication, too, and ends an unauthenticated connection that receives one.
            // The pings of the control channel are enough.
            config.keepalive_interval = None;
        }
        let handle = client::connect_stream(Arc::new(config), socket, Callbacks(shared.clone()));
        let mut handle = place.lend(handle).await.map_err(|error| handshake_error(&shared, &error))?;
        dial.hold.wait().await;
        let lock = lock.acquire().await;
        authenticate(&mut handle, &shared, &dial.node_key).await?;
        Ok((Arc::new(handle), lock))
    };
    let result = timeout(AUTHENTICATE, handshake).await;
    if let (Err(_) | Ok(Err(_)), Some(what)) = (&result, guard.not_ssh()) {
        return Err(ConnectError::NotSsh(what));
    }
    match result {
        Ok(authenticated) => {
            let (handle, lock) = authenticated?;
            guard.set_read_ahead_limit(P::CREDIT.held_max());
            guard.charge_read_ahead_to(dial.account.clone());
            Ok(SshConnection { handle, shared, cut, _lock: lock })
        }
        Err(_) => Err(ConnectError::Timeout(AUTHENTICATE.as_secs(), "agreeing on keys and authenticating")),
    }
}

fn precedence(phase: PhaseName) -> Precedence {
    match phase {
        PhaseName::Kubernetes => Precedence::Kubernetes,
        PhaseName::Attestation => Precedence::Attestation,
    }
}

fn handshake_error<P: ClientPhase>(shared: &Shared<P>, error: &russh::Error) -> ConnectError {
    match lock(&shared.wrong_key).take() {
        Some(shown) => ConnectError::WrongHostKey { shown },
        None => {
            ConnectError::Protocol("SSH handshake", shared.disconnected().unwrap_or_else(|| cause(error)))
        }
    }
}

async fn authenticate<P: ClientPhase>(
    handle: &mut Handle<Callbacks<P>>,
    shared: &Shared<P>,
    node_key: &WorkerNodeKey,
) -> Result<(), ConnectError> {
    let user = P::NAME.user();
    let why = |error: &russh::Error| shared.disconnected().unwrap_or_else(|| cause(error));
    let broken = |error: russh::Error| ConnectError::Protocol("authenticate", why(&error));
    if P::NAME == PhaseName::Attestation {
        match handle.authenticate_none(user).await.map_err(broken)? {
            AuthResult::Success => return Ok(()),
            AuthResult::Failure { remaining_methods, .. } => {
                if !remaining_methods.contains(&MethodKind::PublicKey) {
                    return Err(refusal_or_break(shared, &remaining_methods).await);
                }
            }
        }
    }
    let key = PrivateKeyWithHashAlg::new(node_key.ssh(), None);
    match handle.authenticate_publickey(user, key).await.map_err(broken)? {
        AuthResult::Success => Ok(()),
        AuthResult::Failure { remaining_methods, .. } => {
            Err(refusal_or_break(shared, &remaining_methods).await)
        }
    }
}

/// Distinguishes a refusal from a broken connection: russh reports both as a failure, the latter without further methods.
async fn refusal_or_break<P: ClientPhase>(shared: &Shared<P>, remaining: &MethodSet) -> ConnectError {
    if !remaining.is_empty() {
        return shared.refused();
    }
    match shared.ended().await {
        TransportEnd::Refused => shared.refused(),
        TransportEnd::Disconnected(why) => {
            ConnectError::Protocol("authenticate", format!("the agent disconnected: {why}"))
        }
        TransportEnd::Broken(why) => ConnectError::Protocol("authenticate", why),
    }
}

impl<P: ClientPhase> SshConnection<P> {
    /// Opens the control channel.
    ///
    /// # Errors
    /// The agent refuses it, or the connection is gone.
    pub(crate) async fn open_control(
        &self,
    ) -> Result<(impl Receiver + use<P>, impl Sender + use<P>), ConnectError> {
        let broken = |why: String| ConnectError::Protocol("open the control channel", why);
        let opened = self.handle.channel_open_session().await;
        let mut channel = opened.map_err(|error| broken(self.why(&error)))?;
        let requested = channel.request_subsystem(true, CONTROL_SUBSYSTEM).await;
        requested.map_err(|error| broken(self.why(&error)))?;
        loop {
            match channel.wait().await {
                Some(ChannelMsg::Success) => return Ok(split(channel)),
                Some(ChannelMsg::WindowAdjusted { .. }) => {}
                Some(ChannelMsg::Failure) => {
                    return Err(broken(format!(
                        "it has no subsystem {CONTROL_SUBSYSTEM}: it is not an agent"
                    )));
                }
                _ => {
                    return Err(broken(self.shared.disconnected().unwrap_or_else(|| "it was closed".into())));
                }
            }
        }
    }

    /// Asks the agent to forward streams of this name; false if it refuses.
    ///
    /// # Errors
    /// The connection is gone.
    pub(crate) async fn request_forward(&self, name: &TunnelName, port: u16) -> Result<bool, ConnectError> {
        // Before the request is sent: a stream may arrive with the answer.
        lock(&self.shared.requested).insert(name.clone());
        match self.handle.tcpip_forward(name.as_str(), port.into()).await {
            Ok(_) => Ok(true),
            Err(russh::Error::RequestDenied) => {
                lock(&self.shared.requested).remove(name);
                Ok(false)
            }
            Err(error) => Err(ConnectError::Protocol("ask for a forward", self.why(&error))),
        }
    }

    /// Why a request failed: the agent's reason, if it disconnected with one.
    fn why(&self, error: &russh::Error) -> String {
        self.shared.disconnected().unwrap_or_else(|| cause(error))
    }

    /// Opens streams to the agent's outbounds.
    pub(crate) fn link(&self) -> AgentLink<P> {
        SshLink::new(DirectOpener::new(&self.handle), self.shared.credits.clone())
    }

    /// Serves the agent's streams from now on, without a session. In the Kubernetes phase those that come earlier wait.
    pub(crate) fn serve_streams(&self) {
        self.shared.serve_streams(Serving::<P>::Alone);
    }

    /// Makes the connection a lane of the session, and serves the agent's streams there from now on; those that come
    /// earlier wait.
    pub(crate) fn join(&self, session: &Session<AgentLink<P>>, lane: Lane) -> LaneNumber {
        let number = session.connect(lane, self.link());
        self.shared.serve_streams(Serving::InSession(session.clone(), number));
        number
    }

    /// Flow control of the connection.
    pub(crate) fn credits(&self) -> &Credits {
        &self.shared.credits
    }

    /// Handle on the connection's socket.
    pub(crate) fn guard(&self) -> Guard {
        self.cut.0.clone()
    }

    /// Waits for the end of the connection.
    pub(crate) fn ended(&self) -> impl Future<Output = TransportEnd> + Send + use<P> {
        let shared = Arc::clone(&self.shared);
        async move { shared.ended().await }
    }
}
