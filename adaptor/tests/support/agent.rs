//! A simulated agent: an SSH server with the agent's profile, scripted by a test.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use russh::keys::PublicKey;
use russh::server::{
    Auth, ChannelOpenHandle, Handle, Handler, Msg, PublicKeyOffer, Session, VerifiedPublicKey,
};
use russh::{Channel, ChannelId, MethodKind, MethodSet};
use secure_comms_keys::{PodKey, WorkerNodePublic};
use secure_comms_protocol::control::{Empty, KeyProgress};
use secure_comms_protocol::limits::{CreditLimits, REKEY_BYTES};
use secure_comms_protocol::tag::parse_list;
use secure_comms_protocol::{Control, Hello, Kubernetes, PhaseName};
use secure_comms_ssh::channel::{PendingChannel, split};
use secure_comms_ssh::control::{self, Outbox};
use secure_comms_ssh::guard::{Guard, Guarded, Peer};
use secure_comms_ssh::profile;
use secure_comms_tunnel::flow::Side;
use secure_comms_tunnel::{Credits, Incoming, Outbounds, outbound};
use tokio::net::{TcpListener, TcpStream};

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
    /// The digest of init-data in its hello.
    pub init_data: Option<String>,
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
            init_data: None,
        }
    }

    pub fn kubernetes(host: PodKey, worker: WorkerNodePublic) -> Self {
        Self {
            phase: PhaseName::Kubernetes,
            host,
            worker: Some(worker),
            hello: true,
            hangs_up: false,
            init_data: None,
        }
    }
}

pub struct Live {
    pub guard: Guard,
    pub handle: Option<Handle>,
    pub outbox: Outbox,
    pub credits: Credits,
}

/// The agent; `seen` records what it observes.
#[derive(Clone)]
pub struct Agent {
    pub address: SocketAddr,
    pub seen: Lines,
    /// One for each future connection; the last one is kept.
    modes: Arc<Mutex<VecDeque<Mode>>>,
    live: Arc<Mutex<Vec<Live>>>,
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

    /// Breaks every connection.
    pub fn cut(&self) {
        self.live.lock().unwrap().drain(..).for_each(|live| live.guard.cut());
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
        let config = profile::server(mode.phase, (*mode.host.ssh()).clone(), REKEY_BYTES);
        let outbounds = parse_list(&format!("KUBERNETES_PHASE:KATAAGENT:{}", self.kata)).unwrap();
        let handler = Peer_ {
            agent: self.clone(),
            mode,
            guard,
            credits: Credits::new(Side::Agent, CreditLimits::KUBERNETES),
            outbox: Outbox::default(),
            outbounds: Arc::new(Outbounds::new(&outbounds)),
            control: None,
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

    async fn auth_succeeded(&mut self, session: &mut Session) -> Result<(), russh::Error> {
        let handle = Some(session.handle());
        let (guard, outbox, credits) = (self.guard.clone(), self.outbox.clone(), self.credits.clone());
        self.agent.live.lock().unwrap().push(Live { guard, handle, outbox, credits });
        Ok(())
    }

    async fn channel_open_session(
        &mut self,
        channel: Channel<Msg>,
        reply: ChannelOpenHandle,
        _: &mut Session,
    ) -> Result<(), russh::Error> {
        self.control = Some(channel);
        reply.accept().await;
        Ok(())
    }

    async fn subsystem_request(
        &mut self,
        id: ChannelId,
        name: &str,
        session: &mut Session,
    ) -> Result<(), russh::Error> {
        assert_eq!(name, "secure-comms");
        session.channel_success(id)?;
        let (mut receiver, sender) = split(self.control.take().unwrap());
        if self.mode.hello {
            self.outbox.send(Control::Hello(Hello {
                version: 1,
                credit: Some(self.credits.initial()),
                phase: Some(self.mode.phase),
                instance: Some("cafe".into()),
                init_data: self.mode.init_data.clone(),
                inbounds: vec!["KBS".into()],
                outbounds: vec!["KATAAGENT".into()],
                ..Hello::default()
            }));
        }
        let (outbox, credits, guard, seen) =
            (self.outbox.clone(), self.credits.clone(), self.guard.clone(), self.agent.seen.clone());
        tokio::spawn(async move {
            let heard = |message| {
                if let Control::Hello(hello) = message {
                    seen.push(format!(
                        "hello {} out {:?}",
                        hello.pod_id.unwrap_or_default(),
                        hello.outbounds
                    ));
                }
            };
            let end = control::run(&mut receiver, &sender, &credits, &outbox, heard).await;
            seen.push(format!("control ended: {end}"));
            guard.cut();
        });
        Ok(())
    }

    async fn channel_open_direct_tcpip(
        &mut self,
        channel: Channel<Msg>,
        host: &str,
        _: u32,
        _: &str,
        id: u32,
        reply: ChannelOpenHandle,
        _: &mut Session,
    ) -> Result<(), russh::Error> {
        self.agent.seen.push(format!("opens {host} in {}", self.mode.phase));
        let (permit, credits) = (self.outbounds.permit(host), self.credits.clone());
        let pending = PendingChannel::new(channel, reply);
        tokio::spawn(async move {
            match permit {
                Ok(permit) => outbound::serve(permit, &credits, id, pending).await,
                Err(refusal) => pending.refuse(refusal).await,
            }
        });
        Ok(())
    }

    async fn tcpip_forward(
        &mut self,
        address: &str,
        port: &mut u32,
        _: &mut Session,
    ) -> Result<bool, russh::Error> {
        self.agent.seen.push(format!("forward {address}:{port}"));
        Ok(address != "refused")
    }
}
