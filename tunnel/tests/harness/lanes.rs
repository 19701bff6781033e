//! Connections in memory for sessions: what one end sends arrives after a delay, in order, until the connection is cut.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use secure_comms_protocol::limits::{CreditLimits, KEEPALIVE};
use secure_comms_protocol::{Lane, Opening, Refusal, RefusalKind, SessionId, TunnelName};
use secure_comms_tunnel::flow::{LaneNumber, Side};
use secure_comms_tunnel::link::Gone;
use secure_comms_tunnel::session::{ChannelError, Channels, IncomingStream, Session};
use secure_comms_tunnel::{Event, Incoming, Receiver, Sender, Socket, Stream, relay};
use tokio::net::UnixStream;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::{Instant, interval, sleep, sleep_until};

/// From one end to the other.
pub(crate) const LATENCY: Duration = Duration::from_millis(20);

type Parcel = Box<dyn FnOnce() + Send>;

/// One connection. Each of its halves is used by one end.
#[derive(Debug)]
pub(crate) struct Wire {
    /// Whether it has ended, as each end sees it.
    dead: [watch::Sender<bool>; 2],
    count: Arc<Count>,
    latency: Duration,
    pipes: [mpsc::UnboundedSender<(Instant, DebugParcel)>; 2],
}

/// Messages of all connections, in both directions, and where the connection that carries one is cut.
#[derive(Debug)]
pub(crate) struct Count {
    sent: AtomicUsize,
    arrived: AtomicUsize,
    /// As the message with this number is sent. It is lost.
    pub(crate) cut_sent: AtomicUsize,
    /// Right after the message with this number has arrived, before the tasks at that end have seen it.
    pub(crate) cut_arrived: AtomicUsize,
}

impl Default for Count {
    fn default() -> Self {
        let never = || AtomicUsize::new(usize::MAX);
        let (sent, arrived) = (AtomicUsize::new(0), AtomicUsize::new(0));
        Self { sent, arrived, cut_sent: never(), cut_arrived: never() }
    }
}

struct DebugParcel(Parcel);

impl std::fmt::Debug for DebugParcel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Parcel")
    }
}

impl Wire {
    fn new(count: Arc<Count>, latency: Duration) -> Arc<Self> {
        let dead = [(); 2].map(|()| watch::Sender::new(false));
        let pipes = [1, 0].map(|to: usize| {
            let (parcels, mut arriving) = mpsc::unbounded_channel::<(Instant, DebugParcel)>();
            let (dead, count) = (dead.clone(), count.clone());
            tokio::spawn(async move {
                let mut is_dead = dead[to].subscribe();
                while let Some((when, parcel)) = arriving.recv().await {
                    tokio::select! {
                        biased;
                        _ = is_dead.wait_for(|dead| *dead) => return,
                        () = sleep_until(when) => (parcel.0)(),
                    }
                    if count.arrived.fetch_add(1, SeqCst) + 1 == count.cut_arrived.load(SeqCst) {
                        for dead in &dead {
                            dead.send_replace(true);
                        }
                    }
                }
            });
            parcels
        });
        Arc::new(Self { dead, count, latency, pipes })
    }

    /// Ends it for both ends, with what is under way.
    pub(crate) fn cut(&self) {
        [Side::Adaptor, Side::Agent].into_iter().for_each(|side| self.cut_for(side));
    }

    /// Ends it for one end; the other does not notice.
    pub(crate) fn cut_for(&self, side: Side) {
        self.dead[index(side)].send_replace(true);
    }

    pub(crate) fn is_dead(&self, side: Side) -> bool {
        *self.dead[index(side)].borrow()
    }

    pub(crate) async fn death(&self, side: Side) {
        drop(self.dead[index(side)].subscribe().wait_for(|dead| *dead).await);
    }

    fn put(&self, from: Side, parcel: impl FnOnce() + Send + 'static) {
        if self.count.sent.fetch_add(1, SeqCst) + 1 == self.count.cut_sent.load(SeqCst) {
            // This message is lost, and all that are under way, in both directions.
            self.cut();
        }
        if self.is_dead(from) {
            return;
        }
        let pipe = &self.pipes[index(from)];
        // A pipe that has ended belongs to a connection that is dead.
        drop(pipe.send((Instant::now() + self.latency, DebugParcel(Box::new(parcel)))));
    }
}

fn index(side: Side) -> usize {
    usize::from(side == Side::Agent)
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
            // As russh: an end that has sent CLOSE gets nothing more.
            if other.has_closed.load(SeqCst) {
                return;
            }
            drop(to.send(event));
            if is_close {
                // Its library answers at once.
                other.send(Event::Close);
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
    side: Side,
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
        (end, LaneReceiver { events, wire: wire.clone(), side: other(side) })
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
            () = self.wire.death(self.side) => None,
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
        if self.0.wire.is_dead(self.0.side) {
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
        let (wire, side) = (self.wire.clone(), self.side);
        async move {
            tokio::select! {
                biased;
                answer = answered => match answer {
                    Ok(Ok(())) => Ok(ours),
                    Ok(Err(refusal)) if refusal.kind == RefusalKind::Shortage => Err(ChannelError::Full),
                    Ok(Err(refusal)) => Err(ChannelError::Refused(refusal.reason)),
                    // A channel that is dropped without an answer has one in SSH: never.
                    Err(_) => {
                        wire.death(side).await;
                        Err(ChannelError::Gone)
                    }
                },
                () = wire.death(side) => Err(ChannelError::Gone),
            }
        }
    }

    fn is_gone(&self) -> bool {
        self.wire.is_dead(self.side)
    }

    async fn gone(&self) {
        self.wire.death(self.side).await;
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
    pub(crate) count: Arc<Count>,
    connections: AtomicUsize,
    /// Of the connections that are made from now on.
    pub(crate) latency: Mutex<Duration>,
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
            count: Arc::default(),
            connections: AtomicUsize::new(0),
            latency: Mutex::new(LATENCY),
            servers: Servers { accepted, connecting },
        };
        (Arc::new(sessions), servers)
    }

    /// Messages that were sent on all connections.
    pub(crate) fn sent(&self) -> usize {
        self.count.sent.load(SeqCst)
    }

    /// Connections that were made, of all lanes.
    pub(crate) fn connections(&self) -> usize {
        self.connections.load(SeqCst)
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
        self.replace(lane, Duration::ZERO);
    }

    /// Connects a lane; the connection that had it still delivers for some time.
    pub(crate) fn replace(self: &Arc<Self>, lane: Lane, old_lives: Duration) {
        let wire = Wire::new(self.count.clone(), *self.latency.lock().unwrap());
        self.connections.fetch_add(1, SeqCst);
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
                let old = old.clone();
                tokio::spawn(async move {
                    sleep(old_lives).await;
                    old.cut();
                });
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
            tokio::spawn(self.clone().ping(side, number, wire.clone()));
        }
        if is_first {
            return;
        }
        let (known, agent) = (self.adaptor.known(), self.agent.clone());
        wire.put(Side::Adaptor, move || agent.peer_knows(&known, numbers.1));
        let adaptor = self.adaptor.clone();
        tokio::spawn(async move { adaptor.resume(lane, numbers.0).await });
    }

    /// Lets the streams of lane `data` go on over the main one, as the adaptor does when it can't connect the lane.
    pub(crate) async fn fall_back(&self) -> usize {
        let main = self.lanes.lock().unwrap().iter().find(|(of, ..)| *of == Lane::Main).map(|lane| lane.2);
        self.adaptor.resume(Lane::Data, main.unwrap()).await
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
                () = wire.death(side) => return,
                positions = session.positions(number) => positions,
                _ = unsaid.tick() => session.unsaid_positions(number),
            };
            for said in positions {
                let to = self.session(other(side)).clone();
                wire.put(side, move || to.on_position(said).unwrap());
            }
        }
    }

    /// Pings when the session asks for it, one at a time.
    async fn ping(self: Arc<Self>, side: Side, number: LaneNumber, wire: Arc<Wire>) {
        let (session, probe) = (self.session(side).clone(), Arc::new(Notify::new()));
        session.probe_with(number, probe.clone());
        loop {
            tokio::select! {
                () = wire.death(side) => return,
                () = probe.notified() => {}
            }
            let (pong, ponged) = oneshot::channel();
            session.pinged(number);
            let back = wire.clone();
            // The task that waits for the pong may have ended with its connection.
            wire.put(side, move || back.put(other(side), move || pong.send(()).unwrap_or_default()));
            tokio::select! {
                () = wire.death(side) => return,
                answered = ponged => if answered.is_err() { return },
            }
            session.ponged(number);
        }
    }

    /// Connects a lane again whenever its connection has ended, after `pause`. Not when the connection was replaced.
    pub(crate) async fn keep_connected(self: Arc<Self>, lane: Lane, pause: Duration) {
        let is_dead = || self.wire(lane).is_none_or(|wire| wire.is_dead(Side::Adaptor));
        loop {
            if let Some(wire) = self.wire(lane) {
                wire.death(Side::Adaptor).await;
            }
            if is_dead() {
                sleep(pause).await;
            }
            if is_dead() {
                self.connect(lane);
            }
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
