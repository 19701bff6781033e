//! Connections of sessions by hand: those of an adaptor to the real agent, and those of an agent to the real adaptor.

use std::sync::Arc;

use anyhow::{Context, Result, anyhow, ensure};
use secure_comms_protocol::control::{KnownStreams, SessionReply};
use secure_comms_protocol::limits::{CreditLimits, PROTOCOL_VERSION};
use secure_comms_protocol::{Control, Hello, Opening, Position};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Mutex, mpsc};
use tokio::task::AbortHandle;
use tokio::time::timeout;

use super::attacked_agent::AttackedAgent;
use super::raw::{Key, Offer, Opened, Raw, RawPeer};
use crate::harness::process::Child;
use crate::harness::scene::{PATIENCE, Scene, SceneOptions, client, endpoint};

/// Credit that we grant each new stream, and that the other end does, in bytes.
pub const CREDIT: u32 = CreditLimits::KUBERNETES.initial;

/// The hello of an adaptor for this pod, for a lane of this session.
#[must_use]
pub fn adaptor_hello(pod: &str, lane: Option<&str>, session: Option<&str>) -> Hello {
    Hello {
        version: PROTOCOL_VERSION,
        credit: Some(CREDIT),
        pod_id: Some(pod.to_owned()),
        lane: lane.map(ToOwned::to_owned),
        session: session.map(ToOwned::to_owned),
        inbounds: vec!["KATAAGENT".to_owned(), "VMSERVICE".to_owned()],
        outbounds: vec!["NODESERVICE".to_owned()],
        ..Hello::default()
    }
}

impl AttackedAgent {
    /// A lane of this session, with the worker node's key; the answer is not waited for.
    ///
    /// # Errors
    /// If the login is refused.
    pub async fn lane(&self, lane: &str, session: Option<&str>) -> Result<RawPeer> {
        RawPeer::greet(self.node().await?, adaptor_hello(&self.scene.pod, Some(lane), session)).await
    }

    /// As [`Self::lane`], with another key.
    ///
    /// # Errors
    /// If the login is refused.
    pub async fn lane_with(&self, key: &Key, lane: &str, session: Option<&str>) -> Result<RawPeer> {
        let mut raw = Raw::secured(self.scene.ssh, Offer::default()).await?;
        raw.ask_to_authenticate().await?;
        let login = key.login("kubernetes", raw.session());
        ensure!(raw.authenticate(&login).await?, "the key is refused");
        RawPeer::greet(raw, adaptor_hello(&self.scene.pod, Some(lane), session)).await
    }

    /// A new session: its main lane and its id.
    ///
    /// # Errors
    /// If the agent begins none.
    pub async fn session(&self) -> Result<(RawPeer, String)> {
        let peer = self.lane("main", None).await?;
        let reply = peer.session().await?;
        ensure!(!reply.resumed, "a new session is resumed");
        Ok((peer, reply.id))
    }

    /// A lane of a session that goes on, with the streams that we know and an offer of this tunnel.
    ///
    /// # Errors
    /// If the agent does not resume it.
    pub async fn resumed_with(
        &self,
        lane: &str,
        session: &str,
        known: &[u32],
        offer: &str,
    ) -> Result<RawPeer> {
        let peer = RawPeer::client(self.node().await?).await?;
        // First, as an adaptor does: the agent asks for its streams again once it knows ours.
        peer.offer(offer).await?;
        peer.say(Control::Hello(adaptor_hello(&self.scene.pod, Some(lane), Some(session)))).await?;
        peer.goes_on_with(session, known).await?;
        Ok(peer)
    }

    /// A lane of a session that goes on, with the streams that we know.
    ///
    /// # Errors
    /// If the agent does not resume it.
    pub async fn resumed(&self, lane: &str, session: &str, known: &[u32]) -> Result<RawPeer> {
        let peer = self.lane(lane, Some(session)).await?;
        peer.goes_on_with(session, known).await?;
        Ok(peer)
    }

    /// Checks that the agent is the same process, and that a session by hand and one of the real adaptor work.
    ///
    /// # Errors
    /// If it is not.
    pub async fn serves_sessions(&self) -> Result<()> {
        self.agent.rss_kib().with_context(|| self.agent.log())?;
        let (peer, _) = self.session().await?;
        Echo::open(&peer, 1).await?.echoes(&peer, b"the next session").await?;
        self.serves_the_adaptor().await
    }

    /// Checks that the real adaptor's tunnels carry data.
    ///
    /// # Errors
    /// If they do not.
    pub async fn serves_the_adaptor(&self) -> Result<()> {
        let adaptor = self.scene.adaptor()?;
        self.carries(&adaptor).await.with_context(|| format!("{}\n{}", self.agent.log(), adaptor.log()))
    }
}

impl RawPeer {
    /// Waits for the agent's answer to our lane.
    ///
    /// # Errors
    /// If the connection ends before.
    pub async fn session(&self) -> Result<SessionReply> {
        let is_reply = |message: &Control| match message {
            Control::Session(reply) => Some(reply.clone()),
            _ => None,
        };
        self.hears("the session", is_reply).await
    }

    async fn goes_on_with(&self, session: &str, known: &[u32]) -> Result<()> {
        let reply = self.session().await?;
        ensure!(reply.resumed && reply.id == session, "not resumed: {reply:?}");
        self.streams(known).await
    }

    /// Whether the other end has ended the session of this connection.
    #[must_use]
    pub fn session_is_ended(&self) -> bool {
        let ends = |message: &Control| matches!(message, Control::Bye(bye) if bye.ends_session);
        self.seen(|seen| seen.controls.iter().any(ends))
    }

    /// Says which streams we know.
    ///
    /// # Errors
    /// If the connection has ended.
    pub async fn streams(&self, known: &[u32]) -> Result<()> {
        self.say(Control::Streams(KnownStreams { known: known.to_vec() })).await
    }
}

/// A stream to a server that echoes, as an adaptor by hand has it: both ends know its every byte.
#[derive(Clone, Debug)]
pub struct Echo {
    /// Stream id.
    pub stream: u32,
    /// Channel that carries it now.
    pub channel: Opened,
    /// Messages on this channel that are no bytes of the stream.
    skip: usize,
    /// Bytes that this channel had brought before the current message.
    taken: usize,
    /// Bytes that came, on all channels.
    pub received: u64,
    /// Bytes that were sent.
    pub sent: u64,
    /// Credit that we granted.
    pub granted: u64,
}

/// First word of the simulator's protocol: echo.
const ECHO: [u8; 8] = [1, 0, 0, 0, 0, 0, 0, 0];
/// Tunnel that leads to the simulator.
const TUNNEL: &str = "VMSERVICE";

/// First words of the simulator's protocol for `count` bytes of the pattern of a seed.
#[must_use]
pub fn source(count: u32) -> Vec<u8> {
    [&[2, 0, 0, 0], count.to_be_bytes().as_slice(), &[0; 8]].concat()
}

/// First word of the simulator's protocol for a server that never reads.
pub const STALL: [u8; 8] = [4, 0, 0, 0, 0, 0, 0, 0];

impl Echo {
    /// Opens the stream on any lane.
    ///
    /// # Errors
    /// If it is refused.
    pub async fn open(peer: &RawPeer, stream: u32) -> Result<Self> {
        let channel = peer.open(TUNNEL, stream, Opening::New).await?;
        peer.data(channel, ECHO).await?;
        let sent = ECHO.len() as u64;
        Ok(Self { stream, channel, skip: 0, taken: 0, received: 0, sent, granted: CREDIT.into() })
    }

    /// Sends a message, checks that it comes back, and acknowledges it.
    ///
    /// # Errors
    /// If it does not come back.
    pub async fn echoes(&mut self, peer: &RawPeer, message: &[u8]) -> Result<()> {
        self.sends(peer, message).await?;
        self.receives(peer, message).await?;
        peer.position(self.stream, self.position()).await
    }

    /// Sends a message.
    ///
    /// # Errors
    /// If the connection has ended.
    pub async fn sends(&mut self, peer: &RawPeer, message: &[u8]) -> Result<()> {
        self.sent += message.len() as u64;
        peer.data(self.channel, message).await
    }

    /// Waits for these bytes, and for no others. The next position grants their cost again.
    ///
    /// # Errors
    /// If they do not come.
    pub async fn receives(&mut self, peer: &RawPeer, bytes: &[u8]) -> Result<()> {
        let all = peer.bytes(self.channel, self.skip, self.taken + bytes.len()).await?;
        let new = all.get(self.taken..).unwrap_or_default();
        ensure!(
            new == bytes,
            "stream {}: {:?} instead of {:?}",
            self.stream,
            new.escape_ascii().to_string(),
            bytes.escape_ascii().to_string()
        );
        self.taken += bytes.len();
        self.received += bytes.len() as u64;
        self.granted += (bytes.len() as u64).max(512);
        Ok(())
    }

    /// How far we have come.
    #[must_use]
    pub fn position(&self) -> Position {
        Position { received: self.received, granted: self.granted }
    }

    /// Asks for a channel on which the stream goes on; for [`Self::goes_on`].
    ///
    /// # Errors
    /// If the connection has ended.
    pub async fn ask_to_go_on(&self, peer: &RawPeer) -> Result<u32> {
        peer.ask(TUNNEL, self.stream, Opening::Resume(self.position())).await
    }

    /// Waits for that channel, and for the agent's position: everything that we sent has arrived.
    ///
    /// # Errors
    /// If it is refused, or the agent's position is another.
    pub async fn goes_on(&mut self, peer: &RawPeer, asked: u32) -> Result<()> {
        let answer = peer.answer(asked).await?;
        self.channel = answer.map_err(|refusal| anyhow!("stream {}: {refusal}", self.stream))?;
        let position = peer.first_position(self.channel).await?;
        ensure!(position.received == self.sent, "stream {}: {position:?} of {} sent", self.stream, self.sent);
        (self.skip, self.taken) = (1, 0);
        Ok(())
    }

    /// Lets the stream go on over another connection.
    ///
    /// # Errors
    /// As the two before.
    pub async fn resume(&mut self, peer: &RawPeer) -> Result<()> {
        let asked = self.ask_to_go_on(peer).await?;
        self.goes_on(peer, asked).await
    }
}

/// An agent by hand, which holds the pod's key and says the hello of the real one, with the real adaptor connected to it.
#[derive(Debug)]
pub struct ForgedAgent {
    /// The scene around the adaptor.
    pub scene: Scene,
    /// The adaptor under attack.
    pub adaptor: Child,
    arrived: Mutex<Arrivals>,
    accepting: AbortHandle,
}

#[derive(Debug)]
struct Arrivals {
    coming: mpsc::UnboundedReceiver<Arrival>,
    waiting: Vec<Arrival>,
}

/// A connection of the adaptor, and its hello.
type Arrival = (RawPeer, Hello);

impl Drop for ForgedAgent {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl ForgedAgent {
    /// Starts the adaptor. `edit` may change what the agent says in its hello.
    ///
    /// # Errors
    /// If it can't be set up.
    pub async fn new(edit: impl FnOnce(&mut Hello)) -> Result<Self> {
        let mut scene = Scene::new(SceneOptions { user_data: true, ..SceneOptions::default() }).await?;
        scene.deadline = 250;
        scene.write_user_data().await?;
        let mut real = AttackedAgent::start(scene).await?;
        // Without a pod id: it is no adaptor, and the agent does not wait for it.
        let mut hello = RawPeer::client(real.node().await?).await?.hello().await?;
        real.agent.kill9().await?;
        let scene = real.scene;
        edit(&mut hello);
        let key = Key::from_openssh(&scene.pod_key().context("the pod has no key")?)?;
        let listener = TcpListener::bind(scene.ssh).await?;
        let mut command = scene.adaptor_command(&[scene.ssh])?;
        command.env("SECURE_COMMS_LOG", "debug");
        let adaptor = Child::spawn("adaptor", command)?;
        let (arrives, coming) = mpsc::unbounded_channel();
        let accepting = tokio::spawn(accept_all(listener, key, hello, arrives)).abort_handle();
        let arrived = Mutex::new(Arrivals { coming, waiting: Vec::new() });
        Ok(Self { scene, adaptor, arrived, accepting })
    }

    /// Waits for the adaptor's connection of a lane (none: one that names no lane), after both hellos.
    ///
    /// # Errors
    /// If it does not come.
    pub async fn next(&self, lane: Option<&str>) -> Result<Arrival> {
        let Arrivals { coming, waiting } = &mut *self.arrived.lock().await;
        let search = async {
            loop {
                // One that has ended since was given up by the adaptor.
                waiting.retain(|(peer, _)| peer.seen(|seen| seen.end.is_none()));
                if let Some(at) = waiting.iter().position(|(_, hello)| hello.lane.as_deref() == lane) {
                    return Some(waiting.remove(at));
                }
                waiting.push(coming.recv().await?);
            }
        };
        let found = timeout(PATIENCE, search).await.ok().flatten();
        found.with_context(|| format!("the adaptor connects no lane {lane:?}\n{}", self.adaptor.log()))
    }

    /// Waits for the adaptor's main lane, and begins a session; returns the hello.
    ///
    /// # Errors
    /// If the lane does not come.
    pub async fn session(&self, id: &str) -> Result<Arrival> {
        let (peer, hello) = self.next(Some("main")).await?;
        peer.say(Control::Session(SessionReply { id: id.to_owned(), resumed: false })).await?;
        Ok((peer, hello))
    }

    /// Waits for the adaptor's connection of a lane, and goes on with the session that it names; returns the streams that the
    /// adaptor knows.
    ///
    /// # Errors
    /// If the lane does not come, or names no session.
    pub async fn resumed(&self, lane: &str) -> Result<(RawPeer, Vec<u32>)> {
        let (peer, hello) = self.next(Some(lane)).await?;
        let id = hello.session.context("the hello names no session")?;
        peer.say(Control::Session(SessionReply { id, resumed: true })).await?;
        let known = |message: &Control| match message {
            Control::Streams(streams) => Some(streams.known.clone()),
            _ => None,
        };
        let known = peer.hears("the streams that go on", known).await?;
        Ok((peer, known))
    }

    /// Checks that the adaptor is the same process, and that a client of the kata agent is served in a session that begins
    /// now.
    ///
    /// # Errors
    /// If it is not.
    pub async fn serves_the_next_session(&self, id: &str) -> Result<()> {
        let (peer, hello) = self.session(id).await.with_context(|| self.adaptor.log())?;
        ensure!(
            hello.session.is_none(),
            "it wants to go on with {:?}\n{}",
            hello.session,
            self.adaptor.log()
        );
        let mut client = client(endpoint(&self.adaptor, "KATAAGENT").await?).await?;
        client.write_all(b"ping").await?;
        let served = async {
            let channel = peer.accept(&peer.asked(|asked| asked.tunnel == "KATAAGENT").await?).await?;
            ensure!(peer.messages(channel, 1).await?.concat() == b"ping", "another client is served");
            peer.data(channel, b"pong").await
        };
        let answered = async {
            let mut answer = [0; 4];
            client.read_exact(&mut answer).await?;
            ensure!(&answer == b"pong", "{answer:?}");
            Ok(())
        };
        tokio::try_join!(served, answered).with_context(|| self.adaptor.log())?;
        Ok(())
    }
}

/// Gives each connection the agent's hello, and passes it on once the adaptor has said its own. Never returns.
async fn accept_all(listener: TcpListener, key: Key, hello: Hello, arrives: mpsc::UnboundedSender<Arrival>) {
    let key = Arc::new(key);
    loop {
        let Ok((socket, _)) = listener.accept().await else { continue };
        let (key, hello, arrives) = (Arc::clone(&key), hello.clone(), arrives.clone());
        tokio::spawn(async move {
            // The adaptor gives up some of its connections.
            if let Ok(arrival) = welcome(socket, &key, hello).await {
                // The receiver is gone at the end of the test.
                drop(arrives.send(arrival));
            }
        });
    }
}

async fn welcome(socket: TcpStream, key: &Key, ours: Hello) -> Result<Arrival> {
    let mut raw = Raw::server(socket)?;
    raw.welcome(key).await?;
    let peer = RawPeer::server(raw).await?;
    peer.say(Control::Hello(ours)).await?;
    let theirs = peer.hello().await?;
    Ok((peer, theirs))
}
