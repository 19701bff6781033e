//! The SSH client: one connection, from TCP to authentication. The only room of the adaptor that names
//! russh.

mod error;
mod handler;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use russh::client::{self, AuthResult, Handle, Msg};
use russh::keys::{PrivateKeyWithHashAlg, PublicKey};
use russh::{Channel, ChannelMsg, MethodKind, MethodSet};
use secure_comms_keys::text::one_line;
use secure_comms_keys::{PodPublic, WorkerNodeKey};
use secure_comms_protocol::limits::{AUTHENTICATE, CONTROL_SUBSYSTEM, CreditLimits, TCP_CONNECT};
use secure_comms_protocol::{Attestation, Kubernetes, Phase, PhaseName, TunnelName};
use secure_comms_ssh::channel::split;
use secure_comms_ssh::guard::{Guard, Guarded, Peer};
use secure_comms_ssh::link::{Opener, SshLink};
use secure_comms_ssh::profile;
use secure_comms_tunnel::{Credits, Outbounds, Receiver, Sender};
use tokio::net::TcpStream;
use tokio::sync::{Mutex, OwnedMutexGuard, watch};
use tokio::time::timeout;

pub use self::error::ConnectError;
pub use self::handler::TransportEnd;
use self::handler::{Client, Shared, lock};

/// The most that is repeated of what a stranger says, in bytes.
const QUOTE_MAX: usize = 300;

/// What a stranger says, fit for a line of ours.
pub(crate) fn quote(text: &str) -> String {
    one_line(text, QUOTE_MAX)
}

/// A phase as this side of a connection sees it.
pub trait ClientPhase: Phase {
    /// What the agent's host key is held against. In the Kubernetes phase there is no way to leave it out.
    type Host: Copy + Send + Sync + 'static;
    /// What a connection may hold for slow readers.
    const CREDIT: CreditLimits;
    /// Whether the agent proved to be the one.
    fn trusts(host: &Self::Host, shown: &PublicKey) -> bool;
}

/// Nothing is proven in the Attestation phase: any host key will do.
#[derive(Clone, Copy, Debug)]
pub struct AnyHost;

impl ClientPhase for Attestation {
    type Host = AnyHost;
    const CREDIT: CreditLimits = CreditLimits::ATTESTATION;

    fn trusts(_: &AnyHost, _: &PublicKey) -> bool {
        true
    }
}

impl ClientPhase for Kubernetes {
    type Host = PodPublic;
    const CREDIT: CreditLimits = CreditLimits::KUBERNETES;

    fn trusts(host: &PodPublic, shown: &PublicKey) -> bool {
        // Constant time. A key that is not Ed25519 can't be the pod's.
        PodPublic::from_ssh(shown).is_ok_and(|shown| shown == *host)
    }
}

/// Where to connect to and as whom.
#[derive(Clone, Debug)]
pub struct Dial {
    /// The agent's address.
    pub address: SocketAddr,
    /// What the worker node proves itself with.
    pub node_key: WorkerNodeKey,
    /// Data in a direction after which new session keys are made, in bytes.
    pub rekey_bytes: usize,
    /// Where the attempt waits before it authenticates.
    pub gate: Gate,
}

/// Cuts the connection when dropped: nothing else stops a russh session.
#[derive(Debug)]
struct CutOnDrop(Guard);

impl Drop for CutOnDrop {
    fn drop(&mut self) {
        self.0.cut();
    }
}

/// An authenticated connection; dropping it cuts it and ends its streams.
pub struct Connection<P: ClientPhase> {
    handle: Arc<Handle<Client<P>>>,
    shared: Arc<Shared<P>>,
    cut: CutOnDrop,
    _turn: OwnedMutexGuard<()>,
}

impl<P: ClientPhase> std::fmt::Debug for Connection<P> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection").field("phase", &P::NAME).finish_non_exhaustive()
    }
}

impl<P: ClientPhase> Drop for Connection<P> {
    fn drop(&mut self) {
        // Streams under way see the end of the connection, and reset their local ends: aborting their tasks would
        // make half a stream look like a whole one.
        self.shared.end(TransportEnd::Broken("closed from this side".into()));
    }
}

/// Opens `direct-tcpip` channels: the host is the tunnel's name, the port means nothing.
pub struct DirectOpener<P: ClientPhase>(Arc<Handle<Client<P>>>);

impl<P: ClientPhase> Clone for DirectOpener<P> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<P: ClientPhase> std::fmt::Debug for DirectOpener<P> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DirectOpener({})", P::NAME)
    }
}

impl<P: ClientPhase> Opener for DirectOpener<P> {
    type Message = Msg;

    fn open(
        &self,
        name: &TunnelName,
        id: u32,
    ) -> impl Future<Output = Result<Channel<Msg>, russh::Error>> + Send + 'static {
        let (handle, name) = (Arc::clone(&self.0), name.to_string());
        async move { handle.channel_open_direct_tcpip(name, 1, "127.0.0.1", id).await }
    }
}

/// Attempts that share one authenticate one at a time, and hold it for as long as their connection: an agent lets a
/// newer Kubernetes peer take the place of an older one, so two addresses of one VM must not race each other in.
#[derive(Clone, Debug, Default)]
pub struct Turn(Arc<Mutex<()>>);

/// Holds attempts back that run beside a connection which may yet be alive: an agent that lets one of them in gives that
/// connection up. Open unless made shut.
#[derive(Clone, Debug)]
pub struct Gate(watch::Sender<GateState>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum GateState {
    Shut,
    Knocked,
    Open,
}

impl Default for Gate {
    fn default() -> Self {
        Self(watch::Sender::new(GateState::Open))
    }
}

impl Gate {
    /// One that lets nobody through yet.
    pub fn shut() -> Self {
        Self(watch::Sender::new(GateState::Shut))
    }

    fn is_open(&self) -> bool {
        *self.0.borrow() == GateState::Open
    }

    /// Lets everybody through from now on.
    pub fn open(&self) {
        self.0.send_replace(GateState::Open);
    }

    /// Waits until an attempt has found an agent and waits here.
    pub async fn knocked(&self) {
        self.until(|state| *state != GateState::Shut).await;
    }

    async fn pass(&self) {
        self.0.send_if_modified(|state| {
            let shut = *state == GateState::Shut;
            if shut {
                *state = GateState::Knocked;
            }
            shut
        });
        self.until(|state| *state == GateState::Open).await;
    }

    async fn until(&self, wanted: impl FnMut(&GateState) -> bool) {
        // It can't be closed: we hold it.
        drop(self.0.subscribe().wait_for(wanted).await);
    }
}

/// Streams to the agent in a phase.
pub type AgentLink<P> = SshLink<DirectOpener<P>>;

/// Connects to the Attestation phase: neither side proves anything, unless the agent insists on our key.
///
/// # Errors
/// See [`ConnectError`].
pub async fn attestation(
    dial: &Dial,
    outbounds: Arc<Outbounds<Attestation>>,
) -> Result<Connection<Attestation>, ConnectError> {
    // Nobody is let wait for a stranger.
    connect(dial, AnyHost, Turn::default(), outbounds).await
}

/// Connects to the Kubernetes phase: the agent proves itself with the pod's key, and we with the worker node's.
///
/// # Errors
/// See [`ConnectError`].
pub async fn kubernetes(
    dial: &Dial,
    pod: PodPublic,
    turn: Turn,
    outbounds: Arc<Outbounds<Kubernetes>>,
) -> Result<Connection<Kubernetes>, ConnectError> {
    connect(dial, pod, turn, outbounds).await
}

async fn connect<P: ClientPhase>(
    dial: &Dial,
    host: P::Host,
    turn: Turn,
    outbounds: Arc<Outbounds<P>>,
) -> Result<Connection<P>, ConnectError> {
    let tcp = match timeout(TCP_CONNECT, TcpStream::connect(dial.address)).await {
        Ok(tcp) => tcp.map_err(ConnectError::Unreachable)?,
        Err(_) => return Err(ConnectError::Timeout(TCP_CONNECT.as_secs(), "connecting")),
    };
    tcp.set_nodelay(true).map_err(ConnectError::Unreachable)?;
    let (socket, guard) = Guarded::new(tcp, Peer::Server);
    let cut = CutOnDrop(guard.clone());
    let shared = Shared::new(host, outbounds);
    let handshake = async {
        let mut config = profile::client(dial.rekey_bytes);
        if !dial.gate.is_open() {
            // russh sends keepalives before it has authenticated too, and ends a connection that brings one. The control channel's
            // pings are enough.
            config.keepalive_interval = None;
        }
        let handle = client::connect_stream(Arc::new(config), socket, Client(shared.clone()));
        let mut handle = handle.await.map_err(|error| handshake_error(&shared, &error))?;
        dial.gate.pass().await;
        let turn = turn.0.lock_owned().await;
        authenticate(&mut handle, &shared, &dial.node_key).await?;
        Ok((Arc::new(handle), turn))
    };
    match timeout(AUTHENTICATE, handshake).await {
        Ok(authenticated) => {
            let (handle, turn) = authenticated?;
            guard.may_hold(P::CREDIT.held_max());
            Ok(Connection { handle, shared, cut, _turn: turn })
        }
        Err(_) => Err(ConnectError::Timeout(AUTHENTICATE.as_secs(), "agreeing on keys and authenticating")),
    }
}

fn handshake_error<P: ClientPhase>(shared: &Shared<P>, error: &russh::Error) -> ConnectError {
    match lock(&shared.wrong_key).take() {
        Some(shown) => ConnectError::WrongHostKey { shown },
        None => ConnectError::Protocol("SSH handshake", cause(error)),
    }
}

fn cause(error: &russh::Error) -> String {
    match error {
        russh::Error::Disconnect | russh::Error::HUP => "the other end closed the connection".into(),
        russh::Error::IO(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            "the other end closed the connection".into()
        }
        other => quote(&other.to_string()),
    }
}

async fn authenticate<P: ClientPhase>(
    handle: &mut Handle<Client<P>>,
    shared: &Shared<P>,
    node_key: &WorkerNodeKey,
) -> Result<(), ConnectError> {
    let user = P::NAME.user();
    let broken = |error: russh::Error| ConnectError::Protocol("authenticate", cause(&error));
    if P::NAME == PhaseName::Attestation {
        match handle.authenticate_none(user).await.map_err(broken)? {
            AuthResult::Success => return Ok(()),
            AuthResult::Failure { remaining_methods, .. } => {
                if !remaining_methods.contains(&MethodKind::PublicKey) {
                    return Err(why_refused(shared, &remaining_methods).await);
                }
            }
        }
    }
    let key = PrivateKeyWithHashAlg::new(node_key.ssh(), None);
    match handle.authenticate_publickey(user, key).await.map_err(broken)? {
        AuthResult::Success => Ok(()),
        AuthResult::Failure { remaining_methods, .. } => Err(why_refused(shared, &remaining_methods).await),
    }
}

/// russh reports a connection that broke while it authenticated as a refusal without further methods.
async fn why_refused<P: ClientPhase>(shared: &Shared<P>, remaining: &MethodSet) -> ConnectError {
    if !remaining.is_empty() {
        return shared.refused();
    }
    match shared.ended().await {
        TransportEnd::Refused => shared.refused(),
        TransportEnd::Disconnected(why) | TransportEnd::Broken(why) => {
            ConnectError::Protocol("authenticate", why)
        }
    }
}

impl<P: ClientPhase> Connection<P> {
    /// Opens the control channel.
    ///
    /// # Errors
    /// The agent refuses it.
    pub async fn control(&self) -> Result<(impl Receiver + use<P>, impl Sender + use<P>), ConnectError> {
        let broken = |why: String| ConnectError::Protocol("open the control channel", why);
        let opened = self.handle.channel_open_session().await;
        let mut channel = opened.map_err(|error| broken(cause(&error)))?;
        let asked = channel.request_subsystem(true, CONTROL_SUBSYSTEM).await;
        asked.map_err(|error| broken(cause(&error)))?;
        loop {
            match channel.wait().await {
                Some(ChannelMsg::Success) => return Ok(split(channel)),
                Some(ChannelMsg::WindowAdjusted { .. }) => {}
                Some(ChannelMsg::Failure) => {
                    return Err(broken(format!("it has no subsystem {CONTROL_SUBSYSTEM}: not an agent")));
                }
                _ => return Err(broken("it was closed".into())),
            }
        }
    }

    /// Asks the agent to forward streams of this name to us; false if it refuses.
    ///
    /// # Errors
    /// The connection is gone.
    pub async fn forward(&self, name: &TunnelName, port: u16) -> Result<bool, ConnectError> {
        // Before the agent hears of it: a stream may come with the answer.
        lock(&self.shared.asked).insert(name.clone());
        match self.handle.tcpip_forward(name.as_str(), port.into()).await {
            Ok(_) => Ok(true),
            Err(russh::Error::RequestDenied) => {
                lock(&self.shared.asked).remove(name);
                Ok(false)
            }
            Err(error) => Err(ConnectError::Protocol("ask for a forward", cause(&error))),
        }
    }

    /// Where streams to the agent's outbounds are opened.
    pub fn link(&self) -> AgentLink<P> {
        SshLink::new(DirectOpener(Arc::clone(&self.handle)), self.shared.credits.clone())
    }

    /// The connection's flow control.
    pub fn credits(&self) -> &Credits {
        &self.shared.credits
    }

    /// The handle on its socket.
    pub(crate) fn guard(&self) -> Guard {
        self.cut.0.clone()
    }

    /// Waits for the end of the connection.
    pub fn ended(&self) -> impl Future<Output = TransportEnd> + Send + use<P> {
        let shared = Arc::clone(&self.shared);
        async move { shared.ended().await }
    }
}
