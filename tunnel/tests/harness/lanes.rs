//! Connections in memory for sessions: what one end sends arrives after a delay, in order, until the connection is cut.

use std::future::pending;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use secure_comms_protocol::limits::{CreditLimits, KEEPALIVE};
use secure_comms_protocol::{Lane, Opening, Refusal, SessionId, TunnelName};
use secure_comms_tunnel::flow::{LaneNumber, Side};
use secure_comms_tunnel::link::Gone;
use secure_comms_tunnel::session::{ChannelError, Channels, IncomingStream, Session};
use secure_comms_tunnel::{Event, Incoming, Receiver, Sender, Socket, Stream, relay};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, interval, sleep, sleep_until};

/// From one end to the other.
pub(crate) const LATENCY: Duration = Duration::from_millis(20);

type Parcel = Box<dyn FnOnce() + Send>;

/// One connection. Each of its halves is used by one end.
#[derive(Debug)]
pub(crate) struct Wire {
    dead: watch::Sender<bool>,
    /// Messages that were sent, of both directions.
    sent: Arc<AtomicUsize>,
    /// The connection is cut when this many were sent.
    cut_at: Arc<AtomicUsize>,
    pipes: [mpsc::UnboundedSender<(Instant, DebugParcel)>; 2],
}

struct DebugParcel(Parcel);

impl std::fmt::Debug for DebugParcel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Parcel")
    }
}

impl Wire {
    fn new(sent: Arc<AtomicUsize>, cut_at: Arc<AtomicUsize>) -> Arc<Self> {
        let dead = watch::Sender::new(false);
        let pipes = [(); 2].map(|()| {
            let (parcels, mut arriving) = mpsc::unbounded_channel::<(Instant, DebugParcel)>();
            let mut is_dead = dead.subscribe();
            tokio::spawn(async move {
                while let Some((when, parcel)) = arriving.recv().await {
                    tokio::select! {
                        biased;
                        _ = is_dead.wait_for(|dead| *dead) => return,
                        () = sleep_until(when) => (parcel.0)(),
                    }
                }
            });
            parcels
        });
        Arc::new(Self { dead, sent, cut_at, pipes })
    }

    pub(crate) fn cut(&self) {
        self.dead.send_replace(true);
    }

    pub(crate) fn is_dead(&self) -> bool {
        *self.dead.borrow()
    }

    pub(crate) async fn death(&self) {
        drop(self.dead.subscribe().wait_for(|dead| *dead).await);
    }

    fn put(&self, from: Side, parcel: impl FnOnce() + Send + 'static) {
        if self.sent.fetch_add(1, SeqCst) + 1 == self.cut_at.load(SeqCst) {
            // This message is lost, and all that are under way, in both directions.
            self.cut();
        }
        let pipe = &self.pipes[usize::from(from == Side::Agent)];
        // A pipe that has ended belongs to a connection that is dead.
        drop(pipe.send((Instant::now() + LATENCY, DebugParcel(Box::new(parcel)))));
    }
}

fn other(side: Side) -> Side {
    if side == Side::Adaptor { Side::Agent } else { Side::Adaptor }
}

/// One end of a connection, which opens channels.
#[derive(Clone, Debug)]
pub(crate) struct MemChannels {
    wire: Arc<Wire>,
    side: Side,
    asks: mpsc::UnboundedSender<Ask>,
}

#[derive(Debug)]
struct Ask {
    name: TunnelName,
    id: u32,
    opening: Opening,
    pending: MemPending,
}

/// One end of one channel.
#[derive(Debug)]
struct End {
    wire: Arc<Wire>,
    side: Side,
    /// Where what this end sends arrives.
    to: mpsc::UnboundedSender<Event>,
    /// CLOSE was sent.
    has_closed: AtomicBool,
    /// The other end of the channel.
    other: Mutex<Option<Arc<End>>>,
}

impl End {
    fn send(&self, event: Event) {
        let Some(other) = self.other.lock().unwrap().clone() else { return };
        let is_close = event == Event::Close;
        if self.has_closed.load(SeqCst) || is_close && self.has_closed.swap(true, SeqCst) {
            return;
        }
        let to = self.to.clone();
        self.wire.put(self.side, move || {
            drop(to.send(event));
            if is_close {
                // The library of the other end answers at once.
                other.send(Event::Close);
                *other.other.lock().unwrap() = None;
            }
        });
    }
}

#[derive(Debug)]
pub(crate) struct LaneSender(Arc<End>);

#[derive(Debug)]
pub(crate) struct LaneReceiver {
    events: mpsc::UnboundedReceiver<Event>,
    wire: Arc<Wire>,
}

fn channel(wire: &Arc<Wire>, from: Side) -> [(LaneReceiver, LaneSender); 2] {
    let half = |side| {
        let (to, events) = mpsc::unbounded_channel();
        let end = Arc::new(End {
            wire: wire.clone(),
            side,
            to,
            has_closed: AtomicBool::new(false),
            other: Mutex::new(None),
        });
        (end, LaneReceiver { events, wire: wire.clone() })
    };
    let ((ours, at_theirs), (theirs, at_ours)) = (half(from), half(other(from)));
    *ours.other.lock().unwrap() = Some(theirs.clone());
    *theirs.other.lock().unwrap() = Some(ours.clone());
    [(at_ours, LaneSender(ours)), (at_theirs, LaneSender(theirs))]
}

impl Receiver for LaneReceiver {
    async fn recv(&mut self) -> Option<Event> {
        tokio::select! {
            biased;
            event = self.events.recv() => event,
            () = self.wire.death() => None,
        }
    }
}

impl Sender for LaneSender {
    async fn send(&self, data: Bytes) -> Result<(), Gone> {
        self.put(Event::Data(data))
    }

    async fn eof(&self) -> Result<(), Gone> {
        self.put(Event::Eof)
    }

    async fn close(&self) -> Result<(), Gone> {
        self.put(Event::Close)
    }
}

impl LaneSender {
    fn put(&self, event: Event) -> Result<(), Gone> {
        if self.0.wire.is_dead() {
            return Err(Gone);
        }
        self.0.send(event);
        Ok(())
    }
}

#[derive(Debug)]
pub(crate) struct MemPending {
    halves: (LaneReceiver, LaneSender),
    answer: oneshot::Sender<Result<(), Refusal>>,
}

impl MemPending {
    fn answer(answer: oneshot::Sender<Result<(), Refusal>>, end: &End, with: Result<(), Refusal>) {
        end.wire.put(end.side, move || drop(answer.send(with)));
    }
}

impl Incoming for MemPending {
    type Receiver = LaneReceiver;
    type Sender = LaneSender;

    async fn accept(self) -> (LaneReceiver, LaneSender) {
        Self::answer(self.answer, &self.halves.1.0, Ok(()));
        self.halves
    }

    async fn refuse(self, refusal: Refusal) {
        Self::answer(self.answer, &self.halves.1.0, Err(refusal));
    }
}

impl Channels for MemChannels {
    type Receiver = LaneReceiver;
    type Sender = LaneSender;
    type Pending = MemPending;

    fn open_channel(
        &self,
        name: &TunnelName,
        id: u32,
        opening: Opening,
    ) -> impl Future<Output = Result<(LaneReceiver, LaneSender), ChannelError>> + Send + 'static {
        let [ours, halves] = channel(&self.wire, self.side);
        let (answer, answered) = oneshot::channel();
        let ask = Ask { name: name.clone(), id, opening, pending: MemPending { halves, answer } };
        let asks = self.asks.clone();
        self.wire.put(self.side, move || drop(asks.send(ask)));
        let wire = self.wire.clone();
        async move {
            tokio::select! {
                biased;
                answer = answered => match answer {
                    Ok(Ok(())) => Ok(ours),
                    Ok(Err(refusal)) => Err(ChannelError::Refused(refusal.reason)),
                    // A channel that is dropped without an answer has one in SSH: never.
                    Err(_) => {
                        wire.death().await;
                        Err(ChannelError::Gone)
                    }
                },
                () = wire.death() => Err(ChannelError::Gone),
            }
        }
    }

    fn is_gone(&self) -> bool {
        self.wire.is_dead()
    }

    async fn gone(&self) {
        self.wire.death().await;
    }
}

/// What serves a new stream: connects its near end, and the time that takes.
#[derive(Clone)]
pub(crate) struct Servers {
    /// The servers' ends of the connections, with their tunnels.
    pub(crate) accepted: mpsc::UnboundedSender<(TunnelName, UnixStream)>,
    pub(crate) connecting: Duration,
}

/// Both ends of a session, and the connections between them.
pub(crate) struct Sessions {
    pub(crate) adaptor: Session<MemChannels>,
    pub(crate) agent: Session<MemChannels>,
    lanes: Mutex<Vec<(Lane, Arc<Wire>, LaneNumber)>>,
    sent: Arc<AtomicUsize>,
    pub(crate) cut_at: Arc<AtomicUsize>,
    servers: Servers,
}

impl Sessions {
    /// A session without connections, and the servers' ends of the streams that are accepted.
    pub(crate) fn new(
        limits: CreditLimits,
        connecting: Duration,
    ) -> (Arc<Self>, mpsc::UnboundedReceiver<(TunnelName, UnixStream)>) {
        let new = |side| Session::new(side, limits, SessionId::from_random(7), limits.initial);
        let (accepted, servers) = mpsc::unbounded_channel();
        let sessions = Self {
            adaptor: new(Side::Adaptor),
            agent: new(Side::Agent),
            lanes: Mutex::default(),
            sent: Arc::default(),
            cut_at: Arc::new(AtomicUsize::new(usize::MAX)),
            servers: Servers { accepted, connecting },
        };
        (Arc::new(sessions), servers)
    }

    /// Messages that were sent on all connections.
    pub(crate) fn sent(&self) -> usize {
        self.sent.load(SeqCst)
    }

    /// The connection of a lane now.
    pub(crate) fn wire(&self, lane: Lane) -> Option<Arc<Wire>> {
        self.lanes.lock().unwrap().iter().find(|(of, ..)| *of == lane).map(|(_, wire, _)| wire.clone())
    }

    /// The number of a lane's connection now, which is the same at both ends.
    pub(crate) fn number(&self, lane: Lane) -> Option<LaneNumber> {
        self.lanes.lock().unwrap().iter().find(|(of, ..)| *of == lane).map(|(.., number)| *number)
    }

    /// Connects a lane, as adaptor and agent do: the connection that had the lane is cut.
    pub(crate) fn connect(self: &Arc<Self>, lane: Lane) {
        let wire = Wire::new(self.sent.clone(), self.cut_at.clone());
        let mut lanes = self.lanes.lock().unwrap();
        let is_first = lanes.is_empty();
        let (adaptor_asks, at_adaptor) = mpsc::unbounded_channel();
        let (agent_asks, at_agent) = mpsc::unbounded_channel();
        // What an end asks for arrives at the other.
        let adaptor = MemChannels { wire: wire.clone(), side: Side::Adaptor, asks: agent_asks };
        let agent = MemChannels { wire: wire.clone(), side: Side::Agent, asks: adaptor_asks };
        let numbers = (self.adaptor.connect(lane, adaptor), self.agent.connect(lane, agent));
        lanes.retain(|(of, old, number)| {
            let stays = *of != lane;
            if !stays {
                self.adaptor.disconnect(*number);
                old.cut();
            }
            stays
        });
        lanes.push((lane, wire.clone(), numbers.0));
        drop(lanes);
        for (side, number, asks) in
            [(Side::Adaptor, numbers.0, at_adaptor), (Side::Agent, numbers.1, at_agent)]
        {
            tokio::spawn(self.clone().serve(side, number, asks));
            tokio::spawn(self.clone().say_positions(side, number, wire.clone()));
        }
        if is_first {
            return;
        }
        let (known, agent) = (self.adaptor.known(), self.agent.clone());
        wire.put(Side::Adaptor, move || agent.peer_knows(&known, numbers.1));
        let adaptor = self.adaptor.clone();
        tokio::spawn(async move { adaptor.resume(lane, numbers.0).await });
    }

    pub(crate) fn session(&self, side: Side) -> &Session<MemChannels> {
        if side == Side::Adaptor { &self.adaptor } else { &self.agent }
    }

    async fn serve(self: Arc<Self>, side: Side, number: LaneNumber, mut asks: mpsc::UnboundedReceiver<Ask>) {
        while let Some(Ask { name, id, opening, pending }) = asks.recv().await {
            let session = self.session(side);
            let IncomingStream::New(new) = session.incoming(number, &name, id, opening, pending) else {
                continue;
            };
            let (credits, servers) = (session.credits().clone(), self.servers.clone());
            tokio::spawn(async move {
                let flow = credits.accept(credits.admit(&name).unwrap(), id).await.unwrap();
                sleep(servers.connecting).await;
                let (server, socket) = super::unix();
                drop(servers.accepted.send((name, server)));
                let (receiver, sender) = new.accept().await;
                relay(socket, Stream { receiver, sender, flow }).await
            });
        }
    }

    async fn say_positions(self: Arc<Self>, side: Side, number: LaneNumber, wire: Arc<Wire>) {
        let session = self.session(side).clone();
        let mut unsaid = interval(KEEPALIVE);
        loop {
            let positions = tokio::select! {
                () = wire.death() => return,
                positions = session.positions(number) => positions,
                _ = unsaid.tick() => session.unsaid_positions(number),
            };
            for said in positions {
                let to = self.session(other(side)).clone();
                wire.put(side, move || to.on_position(said).unwrap());
            }
        }
    }

    /// Connects a lane again whenever its connection has ended, after `pause`.
    pub(crate) async fn keep_connected(self: Arc<Self>, lane: Lane, pause: Duration) {
        loop {
            match self.wire(lane) {
                Some(wire) => wire.death().await,
                None => pending().await,
            }
            sleep(pause).await;
            self.connect(lane);
        }
    }
}

/// A program's end of a stream of a tunnel that `side` opens.
pub(crate) async fn open(sessions: &Arc<Sessions>, side: Side, name: &TunnelName) -> UnixStream {
    use secure_comms_tunnel::Link;
    let (client, socket): (UnixStream, Socket) = super::unix();
    let stream = sessions.session(side).link().open(name).await.unwrap();
    tokio::spawn(relay(socket, stream));
    client
}
