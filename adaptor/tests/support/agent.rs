//! A simulated agent: an SSH server with the agent's profile, scripted by a test.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, OnceLock};

use russh::keys::PublicKey;
use russh::server::{
    Auth, ChannelOpenHandle, Handle, Handler, Msg, PublicKeyOffer, Session as SshSession, VerifiedPublicKey,
};
use russh::{Channel, ChannelId, MethodKind, MethodSet};
use secure_comms_keys::{PodKey, WorkerNodePublic};
use secure_comms_protocol::control::{Empty, KeyProgress, SessionReply};
use secure_comms_protocol::limits::{CreditLimits, PROTOCOL_VERSION, REKEY_BYTES};
use secure_comms_protocol::tag::parse_list;
use secure_comms_protocol::{
    AgentConfig, Control, Hello, Kubernetes, Lane, Opening, PhaseName, SessionId, TunnelName,
};
use secure_comms_ssh::channel::{PendingChannel, split};
use secure_comms_ssh::control::{self, Outbox};
use secure_comms_ssh::guard::{Guard, Guarded, Peer};
use secure_comms_ssh::link::{Opener, SshLink};
use secure_comms_ssh::profile::{self, KeyExchange};
use secure_comms_tunnel::flow::{LaneNumber, Side};
use secure_comms_tunnel::session::{IncomingStream, Session, SessionReceiver, SessionSender};
use secure_comms_tunnel::{Credits, Incoming, Link, OpenError, Outbounds, Stream, outbound};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;

use super::Lines;

/// How the agent treats a connection.
#[derive(Clone, Debug)]
pub struct Mode {
    pub phase: PhaseName,
    pub host: PodKey,
    /// The worker node that it accepts; `None`: any.
    pub worker: Option<WorkerNodePublic>,
    /// Whether it sends a hello.
    pub hello: bool,
    /// Whether it disconnects instead of answering an authentication.
    pub hangs_up: bool,
    /// What it says that it runs with, other than that its defaults.
    pub config: Option<AgentConfig>,
    /// The digest of init-data in its hello.
    pub init_data: Option<String>,
    /// Of the control protocol.
    pub version: u32,
    /// The lanes that it lets in.
    pub lanes: &'static [Lane],
}

impl Mode {
    pub fn attestation() -> Self {
        let host = PodKey::generate().unwrap();
        Self {
            phase: PhaseName::Attestation,
            host,
            worker: None,
            hello: true,
            hangs_up: false,
            config: None,
            init_data: None,
            version: PROTOCOL_VERSION,
            lanes: &Lane::ALL,
        }
    }

    pub fn kubernetes(host: PodKey, worker: WorkerNodePublic) -> Self {
        Self {
            phase: PhaseName::Kubernetes,
            host,
            worker: Some(worker),
            hello: true,
            hangs_up: false,
            config: None,
            init_data: None,
            version: PROTOCOL_VERSION,
            lanes: &Lane::ALL,
        }
    }

    /// What it says that it runs with.
    pub fn config(&self) -> Option<AgentConfig> {
        let worker = self.worker.filter(|_| self.phase == PhaseName::Kubernetes)?;
        Some(self.config.clone().unwrap_or_else(|| AgentConfig {
            pod_id: None,
            worker_nodes: vec![worker.to_string()],
            inbounds: vec!["BOTH_PHASES:KBS:8080".into()],
            outbounds: vec!["KUBERNETES_PHASE:KATAAGENT:/run/kata-containers/agent.sock".into()],
            user_data: "none".into(),
        }))
    }
}

pub struct Live {
    pub guard: Guard,
    pub handle: Option<Handle>,
    pub outbox: Outbox,
    pub credits: Credits,
    pub lane: Arc<OnceLock<Lane>>,
}

/// Opens the agent's channels.
#[derive(Clone)]
pub struct ForwardOpener(Handle);

impl std::fmt::Debug for ForwardOpener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ForwardOpener")
    }
}

impl Opener for ForwardOpener {
    type Message = Msg;

    fn open(
        &self,
        name: &TunnelName,
        id: u32,
        opening: Opening,
    ) -> impl Future<Output = Result<Channel<Msg>, russh::Error>> + Send + 'static {
        let (handle, name) = (self.0.clone(), name.to_string());
        async move { handle.channel_open_forwarded_tcpip(name, 1, opening.to_string(), id).await }
    }
}

pub type AgentSession = Session<SshLink<ForwardOpener>>;
pub type Opened =
    Result<Stream<SessionReceiver<SshLink<ForwardOpener>>, SessionSender<SshLink<ForwardOpener>>>, OpenError>;

/// A stream that the agent opens as soon as it has heard a bye, before it ends the connection.
struct AtBye {
    name: TunnelName,
    opened: oneshot::Sender<Opened>,
}

/// The agent; `seen` records what it observes.
#[derive(Clone)]
pub struct Agent {
    pub address: SocketAddr,
    pub seen: Lines,
    /// One for each future connection; the last one is kept.
    modes: Arc<Mutex<VecDeque<Mode>>>,
    live: Arc<Mutex<Vec<Live>>>,
    session: Arc<Mutex<Option<AgentSession>>>,
    at_bye: Arc<Mutex<Option<AtBye>>>,
    /// Target of its KATAAGENT outbound.
    kata: SocketAddr,
}

impl Agent {
    pub async fn start(mode: Mode) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let agent = Self {
            address: listener.local_addr().unwrap(),
            seen: Lines::default(),
            modes: Arc::new(Mutex::new([mode].into())),
            live: Arc::default(),
            session: Arc::default(),
            at_bye: Arc::default(),
            kata: super::echo().await,
        };
        let serving = agent.clone();
        tokio::spawn(async move {
            loop {
                let (socket, _) = listener.accept().await.unwrap();
                tokio::spawn(serving.clone().serve(socket));
            }
        });
        agent
    }

    pub fn become_(&self, mode: Mode) {
        self.script([mode]);
    }

    /// Each future connection gets the next of these modes, and all further ones get the last.
    pub fn script(&self, modes: impl Into<VecDeque<Mode>>) {
        *self.modes.lock().unwrap() = modes.into();
    }

    fn next_mode(&self) -> Mode {
        let mut modes = self.modes.lock().unwrap();
        if modes.len() > 1 { modes.pop_front().unwrap() } else { modes[0].clone() }
    }

    /// Enters the Kubernetes phase as an agent does.
    pub fn upgrade(&self, mode: Mode) {
        self.become_(mode);
        self.say(&Control::Upgrade(Empty {}));
    }

    pub fn keys(&self, attempt: u64, error: &str) {
        self.say(&Control::Keys(KeyProgress { attempt, error: Some(error.into()) }));
    }

    pub fn say(&self, message: &Control) {
        self.live.lock().unwrap().iter().for_each(|live| live.outbox.send(message.clone()));
    }

    /// Waits until the newest connection has passed a bye on.
    pub async fn said_bye(&self) {
        let outbox = self.live.lock().unwrap().last().unwrap().outbox.clone();
        outbox.said_bye().await;
    }

    /// Breaks every connection.
    pub fn cut(&self) {
        self.live.lock().unwrap().drain(..).for_each(|live| live.guard.cut());
    }

    /// Breaks the connections of a lane.
    pub fn cut_lane(&self, lane: Lane) {
        let live = self.live.lock().unwrap();
        live.iter().filter(|live| live.lane.get() == Some(&lane)).for_each(|live| live.guard.cut());
    }

    /// Loses its session, as a restart does, and every connection.
    pub fn restart(&self) {
        if let Some(session) = self.session.lock().unwrap().take() {
            session.end("restart");
        }
        self.cut();
    }

    /// Ends its session, as for another adaptor.
    pub fn end_session(&self, reason: &str) {
        let session = self.session.lock().unwrap().take().unwrap();
        self.live.lock().unwrap().iter().for_each(|live| live.outbox.bye_session(reason));
        tokio::spawn(async move {
            session.without_lanes().await;
            session.end("said bye");
        });
    }

    /// Opens a stream as soon as a connection of its session hears a bye, while the bye's sender waits for the end.
    pub fn open_at_bye(&self, name: TunnelName) -> oneshot::Receiver<Opened> {
        let (opened, result) = oneshot::channel();
        *self.at_bye.lock().unwrap() = Some(AtBye { name, opened });
        result
    }

    pub fn session(&self) -> AgentSession {
        self.session.lock().unwrap().clone().unwrap()
    }

    /// What the hello of a connection asks for.
    fn join(&self, hello: &Hello, joining: &Joining) {
        let Some(lane) = hello.lane.as_deref().and_then(Lane::from_name) else { return };
        let Joining { mode, outbox, link, joined, lane: of, .. } = joining;
        if mode.version < 2 || mode.phase != PhaseName::Kubernetes {
            return;
        }
        let mut current = self.session.lock().unwrap();
        let named = |session: &&AgentSession| Some(session.id().to_string()) == hello.session;
        let (session, resumed) = match current.as_ref().filter(named) {
            Some(session) => (session.clone(), true),
            None if lane == Lane::Main => {
                let id = SessionId::from_random(rand_bits());
                let credit = hello.credit.unwrap();
                let session = Session::new(Side::Agent, CreditLimits::KUBERNETES, id, credit);
                if let Some(old) = current.replace(session.clone()) {
                    old.end("a new session");
                }
                (session, false)
            }
            None => return outbox.bye("the main lane comes first"),
        };
        if !mode.lanes.contains(&lane) {
            return outbox.bye("no such lane");
        }
        self.cut_lane(lane);
        of.set(lane).unwrap();
        let number = session.connect(lane, link.get().unwrap().clone());
        outbox.join(session.clone(), number);
        self.seen.push(format!("lane {lane} {}", if resumed { "resumed" } else { "new" }));
        outbox.send(Control::Session(SessionReply { id: session.id().to_string(), resumed }));
        joined.set((session, number)).unwrap();
    }

    /// The newest connection, with its flow control.
    pub fn newest(&self) -> (Handle, Credits) {
        let live = self.live.lock().unwrap();
        let live = live.last().unwrap();
        (live.handle.clone().unwrap(), live.credits.clone())
    }

    async fn serve(self, socket: TcpStream) {
        let mode = self.next_mode();
        self.seen.push("connection");
        let (socket, guard) = Guarded::new(socket, Peer::Client);
        guard.set_read_ahead_limit(CreditLimits::KUBERNETES.held_max());
        let config = profile::server(mode.phase, (*mode.host.ssh()).clone(), REKEY_BYTES, KeyExchange::Any);
        let kata = self.kata;
        let outbounds =
            parse_list(&format!("KUBERNETES_PHASE:KATAAGENT:{kata},KUBERNETES_PHASE:DATA:{kata}")).unwrap();
        let handler = Peer_ {
            agent: self.clone(),
            mode,
            guard,
            credits: Credits::new(Side::Agent, CreditLimits::KUBERNETES),
            outbox: Outbox::default(),
            outbounds: Arc::new(Outbounds::new(&outbounds)),
            control: None,
            link: Arc::default(),
            joined: Arc::default(),
            lane: Arc::default(),
        };
        let credits = handler.credits.clone();
        if let Ok(session) = russh::server::run_stream(Arc::new(config), socket, handler).await {
            drop(session.await);
        }
        credits.end();
        self.seen.push("gone");
    }
}

struct Peer_ {
    agent: Agent,
    mode: Mode,
    guard: Guard,
    credits: Credits,
    outbox: Outbox,
    outbounds: Arc<Outbounds<Kubernetes>>,
    control: Option<Channel<Msg>>,
    link: Arc<OnceLock<SshLink<ForwardOpener>>>,
    joined: Joined,
    lane: Arc<OnceLock<Lane>>,
}

type Joined = Arc<OnceLock<(AgentSession, LaneNumber)>>;

/// What a connection needs to join a session.
struct Joining {
    mode: Mode,
    outbox: Outbox,
    link: Arc<OnceLock<SshLink<ForwardOpener>>>,
    joined: Joined,
    lane: Arc<OnceLock<Lane>>,
}

fn rand_bits() -> u128 {
    use std::hash::{BuildHasher, Hasher, RandomState};
    let word = || u128::from(RandomState::new().build_hasher().finish());
    word() << 64 | word()
}

impl Peer_ {
    fn answer(&self, user: &str, how: &str, accept: bool) -> Result<Auth, russh::Error> {
        self.agent.seen.push(format!("auth {user} {how}"));
        if self.mode.hangs_up {
            return Err(russh::Error::Disconnect);
        }
        if accept {
            return Ok(Auth::Accept);
        }
        let here = PhaseName::from_user(user) == Some(self.mode.phase);
        let methods: &[MethodKind] = if here { &[MethodKind::PublicKey] } else { &[] };
        Ok(Auth::Reject { proceed_with_methods: Some(MethodSet::from(methods)), partial_success: false })
    }

    fn knows(&self, user: &str, key: &PublicKey) -> bool {
        let worker =
            self.mode.worker.is_some_and(|worker| WorkerNodePublic::from_ssh(key).unwrap() == worker);
        worker && PhaseName::from_user(user) == Some(self.mode.phase)
    }
}

impl Handler for Peer_ {
    type Error = russh::Error;

    async fn authentication_banner(&mut self) -> Result<Option<String>, russh::Error> {
        self.agent.seen.push("service");
        Ok(Some(format!("Secure Comms agent in the {} phase\r\n", self.mode.phase)))
    }

    async fn auth_none(&mut self, user: &str) -> Result<Auth, russh::Error> {
        let open = self.mode.worker.is_none() && self.mode.phase == PhaseName::Attestation;
        self.answer(user, "none", open && PhaseName::from_user(user) == Some(PhaseName::Attestation))
    }

    async fn auth_publickey_offered(
        &mut self,
        user: &str,
        offer: PublicKeyOffer<'_>,
    ) -> Result<Auth, russh::Error> {
        self.answer(user, "offers a key", self.knows(user, offer.public_key))
    }

    async fn auth_publickey(&mut self, user: &str, key: VerifiedPublicKey<'_>) -> Result<Auth, russh::Error> {
        self.answer(user, "proves a key", self.knows(user, key.public_key))
    }

    async fn auth_succeeded(&mut self, session: &mut SshSession) -> Result<(), russh::Error> {
        let handle = Some(session.handle());
        let link = SshLink::new(ForwardOpener(session.handle()), self.credits.clone());
        self.link.set(link).unwrap();
        let (guard, outbox, credits) = (self.guard.clone(), self.outbox.clone(), self.credits.clone());
        let lane = self.lane.clone();
        self.agent.live.lock().unwrap().push(Live { guard, handle, outbox, credits, lane });
        Ok(())
    }

    async fn channel_open_session(
        &mut self,
        channel: Channel<Msg>,
        reply: ChannelOpenHandle,
        _: &mut SshSession,
    ) -> Result<(), russh::Error> {
        self.control = Some(channel);
        reply.accept().await;
        Ok(())
    }

    async fn subsystem_request(
        &mut self,
        id: ChannelId,
        name: &str,
        session: &mut SshSession,
    ) -> Result<(), russh::Error> {
        assert_eq!(name, "secure-comms");
        session.channel_success(id)?;
        let (mut receiver, sender) = split(self.control.take().unwrap());
        if self.mode.hello {
            self.outbox.send(Control::Hello(Hello {
                version: self.mode.version,
                credit: Some(self.credits.initial()),
                phase: Some(self.mode.phase),
                instance: Some("cafe".into()),
                init_data: self.mode.init_data.clone(),
                inbounds: vec!["KBS".into()],
                outbounds: vec!["KATAAGENT".into()],
                config: self.mode.config(),
                ..Hello::default()
            }));
        }
        let (outbox, credits, guard, agent) =
            (self.outbox.clone(), self.credits.clone(), self.guard.clone(), self.agent.clone());
        let joining = Joining {
            mode: self.mode.clone(),
            outbox: self.outbox.clone(),
            link: self.link.clone(),
            joined: self.joined.clone(),
            lane: self.lane.clone(),
        };
        let seen = agent.seen.clone();
        tokio::spawn(async move {
            let heard = |message| match message {
                Control::Hello(hello) => {
                    let pod = hello.pod_id.clone().unwrap_or_default();
                    seen.push(format!("hello {pod} out {:?}", hello.outbounds));
                    agent.join(&hello, &joining);
                }
                Control::Streams(streams) => {
                    let (session, number) = joining.joined.get().unwrap();
                    session.peer_knows(&streams.known, *number);
                }
                _ => {}
            };
            let end = control::run(&mut receiver, &sender, &credits, &outbox, heard).await;
            seen.push(format!("control ended: {end}"));
            if let (control::ControlEnd::Bye(bye), Some((session, _))) = (&end, joining.joined.get())
                && bye.ends_session
            {
                session.end(&bye.reason);
            }
            let at_bye = agent.at_bye.lock().unwrap().take();
            if let (Some(AtBye { name, opened }), Some((session, _))) = (at_bye, joining.joined.get()) {
                assert!(opened.send(session.link().open(&name).await).is_ok());
            }
            guard.cut();
        });
        Ok(())
    }

    async fn channel_open_direct_tcpip(
        &mut self,
        channel: Channel<Msg>,
        host: &str,
        _: u32,
        originator: &str,
        id: u32,
        reply: ChannelOpenHandle,
        _: &mut SshSession,
    ) -> Result<(), russh::Error> {
        let opening = Opening::from_originator(originator);
        let pending = PendingChannel::new(channel, reply);
        if opening == Opening::New {
            self.agent.seen.push(format!("opens {host} in {}", self.mode.phase));
        } else {
            let lane = self.lane.get().map(|lane| format!(" on lane {lane}")).unwrap_or_default();
            self.agent.seen.push(format!("{originator}: {host}{lane}"));
        }
        if let Some((session, number)) = self.joined.get() {
            let incoming = session.incoming(*number, &host.parse().unwrap(), id, opening, pending);
            let IncomingStream::New(stream) = incoming else { return Ok(()) };
            let admitted = self.outbounds.permit(host).and_then(|permit| permit.admit(session.credits()));
            tokio::spawn(async move {
                match admitted {
                    Ok(admitted) => outbound::serve(admitted, id, stream).await,
                    Err(refusal) => stream.refuse(refusal).await,
                }
            });
            return Ok(());
        }
        let admitted = self.outbounds.permit(host).and_then(|permit| permit.admit(&self.credits));
        tokio::spawn(async move {
            match admitted {
                Ok(admitted) => outbound::serve(admitted, id, pending).await,
                Err(refusal) => pending.refuse(refusal).await,
            }
        });
        Ok(())
    }

    async fn tcpip_forward(
        &mut self,
        address: &str,
        port: &mut u32,
        _: &mut SshSession,
    ) -> Result<bool, russh::Error> {
        self.agent.seen.push(format!("forward {address}:{port}"));
        Ok(address != "refused")
    }
}
