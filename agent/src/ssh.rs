//! The SSH server: one connection, from its first byte to its end. The only file of the agent, that names
//! russh.

use std::sync::Arc;

use russh::keys::{PrivateKey, PublicKey};
use russh::server::{
    Auth, ChannelOpenHandle, Config, Handle, Handler, Msg, PublicKeyOffer, Session, VerifiedPublicKey,
};
use russh::{Channel, ChannelId, MethodKind, MethodSet, Pty};
use secure_comms_protocol::limits::{AUTHENTICATE, CONTROL_SUBSYSTEM, FIRST_LINE};
use secure_comms_protocol::{Attestation, Kubernetes, PhaseName, TunnelName};
use secure_comms_ssh::channel::{ChannelReceiver, ChannelSender, PendingChannel, split};
use secure_comms_ssh::guard::{self, Guarded};
use secure_comms_ssh::link::{Opener, SshLink};
use secure_comms_ssh::profile;
use tokio::net::TcpStream;
use tokio::sync::{Notify, oneshot};
use tokio::time::timeout;

use crate::gate::Admission;
use crate::peers::{Connection, Offers, Slot};
use crate::session::{Agent, PeerSession};

/// The sending half of a stream to a peer.
pub type PeerSender = ChannelSender<Msg>;
/// The receiving half of a stream from a peer.
pub type PeerReceiver = ChannelReceiver;
/// Opens streams to a peer.
pub type PeerLink = SshLink<ForwardOpener>;
/// A stream that a peer asks for.
pub type PeerPending = PendingChannel<Msg>;

/// A host key, ready to be served.
#[derive(Clone, Debug)]
pub struct Identity(Arc<Config>);

impl Identity {
    /// Serves this host key in a phase.
    pub fn new(phase: PhaseName, host_key: Arc<PrivateKey>, rekey_bytes: usize) -> Self {
        Self(Arc::new(profile::server(phase, (*host_key).clone(), rekey_bytes)))
    }
}

/// Opens `forwarded-tcpip` channels, with the address and port that the peer asked for.
#[derive(Clone, Debug)]
pub struct ForwardOpener {
    handle: Handle,
    offers: Arc<Offers>,
}

impl ForwardOpener {
    /// Ends the connection in good order, after all that was sent on it before.
    pub async fn disconnect(&self) {
        let reason = russh::Disconnect::ByApplication;
        // It may be gone already.
        drop(self.handle.disconnect(reason, "bye".into(), "en".into()).await);
    }
}

impl Opener for ForwardOpener {
    type Message = Msg;

    fn open(
        &self,
        name: &TunnelName,
        id: u32,
    ) -> impl Future<Output = Result<Channel<Msg>, russh::Error>> + Send + 'static {
        let offer = self.offers.lock().unwrap_or_else(std::sync::PoisonError::into_inner).get(name).cloned();
        let handle = self.handle.clone();
        async move {
            // The peer may have cancelled the forward meanwhile.
            let (address, port) = offer.ok_or(russh::Error::RequestDenied)?;
            handle.channel_open_forwarded_tcpip(address, port, "127.0.0.1", id).await
        }
    }
}

/// Serves one connection until it ends.
pub async fn serve(agent: Arc<Agent>, socket: TcpStream, id: u64, address: std::net::SocketAddr) {
    if let Err(error) = socket.set_nodelay(true) {
        log::debug!("connection from {address}: {error}");
        return;
    }
    let (mut socket, guard) = Guarded::new(socket, guard::Peer::Client);
    let connection = Connection::new(id, address, guard);
    let deadline = tokio::time::sleep(AUTHENTICATE);
    tokio::pin!(deadline);
    let admitted = tokio::select! {
        admitted = admitted(&agent, &mut socket, &connection) => admitted,
        () = &mut deadline => Err(too_late()),
    };
    let slot = match admitted {
        Ok(slot) => slot,
        Err(error) => {
            let level = agent.strangers.level(log::Level::Info);
            log::log!(level, "connection from {address}: ended: {error}");
            return;
        }
    };
    let admission = agent.gate.admission();
    let authenticated = Arc::new(Notify::new());
    let handler = ConnectionHandler {
        agent: agent.clone(),
        connection: connection.clone(),
        admission: admission.clone(),
        asked: None,
        authenticated: authenticated.clone(),
        peer: None,
        control: None,
        requests: 0,
    };
    let session = async {
        russh::server::run_stream(admission.identity.0, socket, handler).await?.await?;
        Ok::<(), russh::Error>(())
    };
    tokio::pin!(session);
    let ended = tokio::select! {
        ended = &mut session => Some(ended),
        () = authenticated.notified() => None,
        () = &mut deadline => {
            log::info!("connection from {address}: {}", too_late());
            connection.cut();
            None
        }
    };
    drop(slot);
    let ended = match ended {
        Some(ended) => ended,
        None => tokio::select! {
            ended = &mut session => ended,
            () = connection.broken() => {
                // A peer that sends more than it was granted must not be trusted to stop.
                connection.cut();
                session.await
            }
        },
    };
    // Wakes whatever still waits on this connection.
    connection.cut();
    agent.left(id);
    let level = if connection.has_authenticated() {
        log::Level::Info
    } else {
        agent.strangers.level(log::Level::Info)
    };
    match ended {
        Ok(()) => log::log!(level, "connection from {address}: closed"),
        Err(error) => log::log!(level, "connection from {address}: ended: {error}"),
    }
}

/// A place for a connection whose peer has begun to speak, or has waited for us to begin.
async fn admitted(
    agent: &Agent,
    socket: &mut Guarded<TcpStream>,
    connection: &Connection,
) -> std::io::Result<Slot> {
    let _waiting = agent.waiting.enter(connection.clone(), None);
    if let Ok(ended) = timeout(FIRST_LINE, socket.first_line()).await {
        ended?;
    }
    tokio::select! {
        slot = agent.unauthenticated.enter_in_turn(connection.clone()) => Ok(slot),
        () = connection.until_cut() => Err(std::io::ErrorKind::ConnectionAborted.into()),
    }
}

fn too_late() -> std::io::Error {
    std::io::Error::other(format!("did not authenticate within {} s", AUTHENTICATE.as_secs()))
}

/// Answers one connection's requests. It runs inside the session's loop, so nothing in it may wait.
struct ConnectionHandler {
    agent: Arc<Agent>,
    connection: Connection,
    admission: Admission,
    /// The phase that authentication was granted for.
    asked: Option<PhaseName>,
    authenticated: Arc<Notify>,
    peer: Option<PeerSession>,
    /// The session channel, until it has become the control channel or has asked for anything else. A task empties it
    /// all the while: a full queue would hold up the session for ever, deaf to a cut.
    control: Option<(ChannelId, oneshot::Sender<()>)>,
    /// Requests on it that were refused without giving it up.
    requests: u8,
}

/// Requests that a session channel may make before it becomes the control channel.
const REQUESTS_MAX: u8 = 16;

/// A refusal that offers these methods next; none at all ends it at once.
fn refuse(methods: &[MethodKind]) -> Auth {
    Auth::Reject { proceed_with_methods: Some(MethodSet::from(methods)), partial_success: false }
}

impl ConnectionHandler {
    fn would_accept(&self, user: &str, key: &PublicKey) -> bool {
        let generation = self.admission.generation;
        match PhaseName::from_user(user) {
            Some(PhaseName::Kubernetes) => self.agent.gate.would_log_in(generation, key),
            Some(PhaseName::Attestation) => self.agent.gate.attests_with(generation, key),
            None => false,
        }
    }

    /// The methods that could still let this user in.
    fn methods(&self, user: &str) -> &'static [MethodKind] {
        let here = match PhaseName::from_user(user) {
            Some(PhaseName::Kubernetes) => self.admission.phase == PhaseName::Kubernetes,
            Some(PhaseName::Attestation) => self.agent.gate.attests(self.admission.generation),
            None => false,
        };
        if here { &[MethodKind::PublicKey] } else { &[] }
    }

    fn refused(&self, user: &str, why: &str) -> Auth {
        let user = user.escape_default();
        log::info!("connection from {}: user '{user:.40}' refused: {why}", self.connection.address);
        refuse(self.methods(&user.to_string()))
    }

    /// How loud to be about one more refusal.
    fn refusal_level(&self) -> log::Level {
        self.connection.refused()
    }

    /// Whatever a session channel asks for besides the control channel.
    fn refuse_request(
        &mut self,
        channel: ChannelId,
        session: &mut Session,
        what: &str,
    ) -> Result<(), russh::Error> {
        log::log!(
            self.refusal_level(),
            "connection from {}: {what} refused: only subsystem {CONTROL_SUBSYSTEM} is served",
            self.connection.address
        );
        self.forget_channel(channel);
        session.channel_failure(channel)
    }

    /// A request that is refused and does not mean that the channel will not be the control channel.
    fn tolerate_request(&mut self, channel: ChannelId) {
        self.requests = self.requests.saturating_add(1);
        if self.requests >= REQUESTS_MAX {
            self.forget_channel(channel);
        }
    }

    /// Lets go of a session channel that will not be the control channel.
    fn forget_channel(&mut self, channel: ChannelId) {
        self.control.take_if(|(own, _)| *own == channel);
    }
}

impl Handler for ConnectionHandler {
    type Error = russh::Error;

    async fn authentication_banner(&mut self) -> Result<Option<String>, russh::Error> {
        Ok(Some(self.agent.gate.banner().to_owned()))
    }

    async fn auth_none(&mut self, user: &str) -> Result<Auth, russh::Error> {
        if PhaseName::from_user(user) == Some(PhaseName::Attestation)
            && self.agent.gate.attests_unproven(self.admission.generation)
        {
            self.asked = Some(PhaseName::Attestation);
            return Ok(Auth::Accept);
        }
        if self.methods(user).is_empty() {
            return Ok(self.refused(user, "no such user in this phase"));
        }
        // What every OpenSSH client asks first.
        Ok(refuse(self.methods(user)))
    }

    async fn auth_publickey_offered(
        &mut self,
        user: &str,
        offer: PublicKeyOffer<'_>,
    ) -> Result<Auth, russh::Error> {
        if self.would_accept(user, offer.public_key) {
            return Ok(Auth::Accept);
        }
        Ok(self.refused(user, "not a key of this pod's worker node"))
    }

    async fn auth_publickey(&mut self, user: &str, key: VerifiedPublicKey<'_>) -> Result<Auth, russh::Error> {
        let generation = self.admission.generation;
        let accepted = match PhaseName::from_user(user) {
            Some(PhaseName::Kubernetes) => match self.agent.gate.log_in(generation, key.public_key) {
                Ok(accepted) => accepted,
                Err(error) => {
                    log::error!("refusing the worker node: {error}");
                    false
                }
            },
            Some(PhaseName::Attestation) => self.agent.gate.attests_with(generation, key.public_key),
            None => false,
        };
        if !accepted {
            return Ok(self.refused(user, "not a key of this pod's worker node"));
        }
        self.asked = PhaseName::from_user(user);
        Ok(Auth::Accept)
    }

    async fn auth_succeeded(&mut self, session: &mut Session) -> Result<(), russh::Error> {
        let handle = session.handle();
        let link = |credits: &secure_comms_tunnel::Credits, offers: &Arc<Offers>| {
            PeerLink::new(ForwardOpener { handle: handle.clone(), offers: offers.clone() }, credits.clone())
        };
        self.peer = match self.asked {
            Some(PhaseName::Attestation) => {
                self.agent.join::<Attestation>(&self.connection, self.admission.generation, link)
            }
            Some(PhaseName::Kubernetes) => {
                self.agent.join::<Kubernetes>(&self.connection, self.admission.generation, link)
            }
            None => None,
        };
        self.authenticated.notify_one();
        // The agent has moved on between the authentication and here.
        if self.peer.is_none() { Err(russh::Error::Disconnect) } else { Ok(()) }
    }

    async fn channel_open_session(
        &mut self,
        channel: Channel<Msg>,
        reply: ChannelOpenHandle,
        _: &mut Session,
    ) -> Result<(), russh::Error> {
        let Some(peer) = &mut self.peer else { return Ok(()) };
        // One control channel; a reply that is dropped is a refusal.
        if peer.take_session_channel() {
            let id = channel.id();
            let (receiver, sender) = split(channel);
            self.control = Some((id, peer.control(receiver, sender)));
            reply.accept().await;
        }
        Ok(())
    }

    async fn subsystem_request(
        &mut self,
        id: ChannelId,
        name: &str,
        session: &mut Session,
    ) -> Result<(), russh::Error> {
        let wanted = name == CONTROL_SUBSYSTEM;
        match self.control.take_if(|(own, _)| wanted && *own == id) {
            Some((_, begin)) => {
                session.channel_success(id)?;
                // Its task is gone only if the channel or the connection is.
                let _ = begin.send(());
                Ok(())
            }
            None => self.refuse_request(id, session, "a subsystem"),
        }
    }

    async fn channel_open_direct_tcpip(
        &mut self,
        channel: Channel<Msg>,
        host_to_connect: &str,
        _: u32,
        _: &str,
        originator_port: u32,
        reply: ChannelOpenHandle,
        _: &mut Session,
    ) -> Result<(), russh::Error> {
        if let Some(peer) = &self.peer {
            peer.serve_stream(host_to_connect, originator_port, PeerPending::new(channel, reply));
        }
        Ok(())
    }

    async fn tcpip_forward(
        &mut self,
        address: &str,
        port: &mut u32,
        _: &mut Session,
    ) -> Result<bool, russh::Error> {
        Ok(self.peer.as_ref().is_some_and(|peer| peer.forward(address, *port)))
    }

    async fn cancel_tcpip_forward(
        &mut self,
        address: &str,
        _: u32,
        _: &mut Session,
    ) -> Result<bool, russh::Error> {
        Ok(self.peer.as_ref().is_some_and(|peer| peer.cancel_forward(address)))
    }

    async fn data(&mut self, channel: ChannelId, _: &[u8], _: &mut Session) -> Result<(), russh::Error> {
        self.forget_channel(channel);
        Ok(())
    }

    async fn extended_data(
        &mut self,
        channel: ChannelId,
        _: u32,
        _: &[u8],
        _: &mut Session,
    ) -> Result<(), russh::Error> {
        self.forget_channel(channel);
        Ok(())
    }

    async fn shell_request(&mut self, channel: ChannelId, session: &mut Session) -> Result<(), russh::Error> {
        self.refuse_request(channel, session, "a shell")
    }

    async fn exec_request(
        &mut self,
        channel: ChannelId,
        _: &[u8],
        session: &mut Session,
    ) -> Result<(), russh::Error> {
        self.refuse_request(channel, session, "exec")
    }

    async fn pty_request(
        &mut self,
        channel: ChannelId,
        _: &str,
        _: u32,
        _: u32,
        _: u32,
        _: u32,
        _: &[(Pty, u32)],
        session: &mut Session,
    ) -> Result<(), russh::Error> {
        self.refuse_request(channel, session, "a pty")
    }

    async fn x11_request(
        &mut self,
        channel: ChannelId,
        _: bool,
        _: &str,
        _: &str,
        _: u32,
        session: &mut Session,
    ) -> Result<(), russh::Error> {
        self.refuse_request(channel, session, "X11 forwarding")
    }

    async fn env_request(
        &mut self,
        channel: ChannelId,
        _: &str,
        _: &str,
        session: &mut Session,
    ) -> Result<(), russh::Error> {
        // Clients send their locale unasked and go on without it.
        self.tolerate_request(channel);
        session.channel_failure(channel)
    }

    async fn signal(
        &mut self,
        channel: ChannelId,
        _: russh::Sig,
        _: &mut Session,
    ) -> Result<(), russh::Error> {
        self.tolerate_request(channel);
        Ok(())
    }

    async fn window_change_request(
        &mut self,
        channel: ChannelId,
        _: u32,
        _: u32,
        _: u32,
        _: u32,
        session: &mut Session,
    ) -> Result<(), russh::Error> {
        self.tolerate_request(channel);
        session.channel_failure(channel)
    }

    async fn agent_request(&mut self, channel: ChannelId, _: &mut Session) -> Result<bool, russh::Error> {
        self.tolerate_request(channel);
        log::log!(
            self.refusal_level(),
            "connection from {}: agent forwarding refused",
            self.connection.address
        );
        Ok(false)
    }
}
