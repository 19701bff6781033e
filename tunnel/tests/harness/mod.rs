//! A link in memory: two ends joined by channels, and tasks that carry credit like the control channel.
#![allow(dead_code, reason = "each test binary uses a part")]

pub(crate) mod lanes;

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use secure_comms_protocol::limits::CreditLimits;
use secure_comms_protocol::{Phase, Refusal, RefusalKind, TunnelName};
use secure_comms_tunnel::flow::{LaneNumber, PeerFlow, Side, StreamError, cost};
use secure_comms_tunnel::intercept::{Interceptor, PassThrough};
use secure_comms_tunnel::link::Gone;
use secure_comms_tunnel::relay::RelayError;
use secure_comms_tunnel::{
    Account, Credits, Event, Flow, Incoming, Link, OpenError, Outbounds, Receiver, Sender, Socket, Stream,
    outbound, relay, relay_through,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

/// Limits without growth, so that a window keeps its initial size.
pub(crate) const FIXED: CreditLimits = CreditLimits {
    initial: 32 * 1024,
    stream_soft_max: 32 * 1024,
    stream_max: 32 * 1024,
    growth_pool: 0,
    streams: 64,
    opener_streams: 64,
    reserved: 0,
};

/// Far more than any kernel buffer between two local sockets, in bytes.
pub(crate) const BULK: usize = 16 * 1024 * 1024;
/// More than a local socket pair holds in its kernel buffers, far less than [`BULK`], in bytes.
pub(crate) const KERNEL: u64 = 8 * 1024 * 1024;

/// State of what one end has sent on one stream.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Meter {
    /// Credit left.
    pub(crate) available: i64,
    /// Smallest credit seen.
    pub(crate) least: i64,
    pub(crate) bytes: u64,
    pub(crate) messages: u64,
}

#[derive(Debug)]
struct Wire {
    dead: watch::Sender<bool>,
    initial: i64,
    meters: Mutex<HashMap<(bool, u32), Meter>>,
}

impl Wire {
    fn meter(&self, from: Side, id: u32, change: impl FnOnce(&mut Meter)) -> Meter {
        let fresh = Meter { available: self.initial, least: self.initial, ..Meter::default() };
        let mut meters = self.meters.lock().unwrap();
        let meter = meters.entry((from == Side::Adaptor, id)).or_insert(fresh);
        change(meter);
        meter.least = meter.least.min(meter.available);
        *meter
    }
}

/// A connection between two ends.
pub(crate) struct Connection {
    pub(crate) adaptor: MemLink,
    pub(crate) agent: MemLink,
    wire: Arc<Wire>,
    asks: Option<mpsc::UnboundedReceiver<Ask>>,
}

/// One end of a connection; as a link it opens streams to the other end.
#[derive(Clone, Debug)]
pub(crate) struct MemLink {
    pub(crate) credits: Credits,
    side: Side,
    wire: Arc<Wire>,
    asks: mpsc::UnboundedSender<Ask>,
}

#[derive(Debug)]
pub(crate) struct MemSender {
    events: mpsc::Sender<Event>,
    from: Side,
    id: u32,
    wire: Arc<Wire>,
}

#[derive(Debug)]
pub(crate) struct MemReceiver {
    events: mpsc::Receiver<Event>,
    dead: watch::Receiver<bool>,
}

/// The other end of a stream, driven by the test.
pub(crate) struct Raw {
    pub(crate) sender: MemSender,
    pub(crate) receiver: MemReceiver,
    pub(crate) flow: Flow,
}

impl Raw {
    pub(crate) async fn send(&self, data: impl Into<Bytes>) {
        self.sender.send(data.into()).await.unwrap();
    }

    /// Receives data until another event arrives; returns both.
    pub(crate) async fn receive(&mut self) -> (Vec<u8>, Option<Event>) {
        let mut all = Vec::new();
        loop {
            match self.receiver.recv().await {
                Some(Event::Data(data)) => all.extend_from_slice(&data),
                other => return (all, other),
            }
        }
    }
}

#[derive(Debug)]
pub(crate) struct Ask {
    pub(crate) name: String,
    pub(crate) id: u32,
    pub(crate) incoming: MemIncoming,
}

#[derive(Debug)]
pub(crate) struct MemIncoming {
    halves: (MemReceiver, MemSender),
    answer: oneshot::Sender<Result<(), Refusal>>,
}

pub(crate) type Relay = JoinHandle<Result<(), RelayError>>;

impl Connection {
    /// Makes a connection with credits.
    pub(crate) fn new(limits: CreditLimits) -> Self {
        let connection = Self::silent(limits);
        connection.set_peer_mode(PeerFlow::Credits(limits.initial));
        connection
    }

    /// Makes a connection without credits.
    pub(crate) fn plain(limits: CreditLimits) -> Self {
        let connection = Self::silent(limits);
        connection.set_peer_mode(PeerFlow::WindowOnly);
        connection
    }

    /// Makes a connection before any hello.
    pub(crate) fn silent(limits: CreditLimits) -> Self {
        Self::silent_charged_to(limits, &Account::unlimited())
    }

    /// As [`new`](Self::new), with the agent's windows on this account.
    pub(crate) fn charged_to(limits: CreditLimits, account: &Account) -> Self {
        let connection = Self::silent_charged_to(limits, account);
        connection.set_peer_mode(PeerFlow::Credits(limits.initial));
        connection
    }

    fn silent_charged_to(limits: CreditLimits, account: &Account) -> Self {
        let wire = Arc::new(Wire {
            dead: watch::Sender::new(false),
            initial: limits.initial.into(),
            meters: Mutex::default(),
        });
        let (ask, asks) = mpsc::unbounded_channel();
        let end = |side| MemLink {
            credits: match side {
                Side::Adaptor => Credits::new(side, limits),
                Side::Agent => Credits::charged_to(account.clone(), side, limits),
            },
            side,
            wire: wire.clone(),
            asks: ask.clone(),
        };
        let (adaptor, agent) = (end(Side::Adaptor), end(Side::Agent));
        for (from, to) in [(&adaptor, &agent), (&agent, &adaptor)] {
            tokio::spawn(carry(from.credits.clone(), to.credits.clone(), to.side, wire.clone()));
            tokio::spawn(reap(from.credits.clone(), wire.clone()));
        }
        Self { adaptor, agent, wire, asks: Some(asks) }
    }

    fn set_peer_mode(&self, flow: PeerFlow) {
        self.adaptor.credits.set_peer_mode(flow);
        self.agent.credits.set_peer_mode(flow);
    }

    pub(crate) fn kill(&self) {
        self.wire.dead.send_replace(true);
    }

    pub(crate) fn meter(&self, from: Side, id: u32) -> Meter {
        self.wire.meter(from, id, |_| {})
    }

    pub(crate) fn meters(&self) -> Vec<Meter> {
        self.wire.meters.lock().unwrap().values().copied().collect()
    }

    fn halves(&self, id: u32) -> [(MemReceiver, MemSender); 2] {
        halves(&self.wire, id)
    }

    /// Relays between `socket` and a stream of the adaptor; the test holds the agent end.
    pub(crate) async fn raw(&self, socket: Socket) -> (Relay, Raw) {
        self.raw_through(PassThrough, socket).await
    }

    /// Relays as above, with an interceptor.
    pub(crate) async fn raw_through<I: Interceptor>(&self, interceptor: I, socket: Socket) -> (Relay, Raw)
    where
        I::ToServer: 'static,
        I::FromServer: 'static,
    {
        let flow = self.adaptor.credits.open(&tunnel()).await.unwrap();
        let theirs = accept(&self.agent.credits, flow.id()).await.unwrap();
        let [(receiver, sender), raw] = self.halves(flow.id());
        let stream = Stream { receiver, sender, flow };
        let task = tokio::spawn(async move { relay_through(&interceptor, socket, stream).await });
        (task, Raw { receiver: raw.0, sender: raw.1, flow: theirs })
    }

    /// Relays between two sockets, over a stream that the adaptor opened; its id, and both relays.
    pub(crate) async fn join(&self, adaptor: Socket, agent: Socket) -> (u32, Relay, Relay) {
        let flow = self.adaptor.credits.open(&tunnel()).await.unwrap();
        let id = flow.id();
        let theirs = accept(&self.agent.credits, id).await.unwrap();
        let [(receiver, sender), raw] = self.halves(id);
        let near = tokio::spawn(relay(adaptor, Stream { receiver, sender, flow }));
        let far = tokio::spawn(relay(agent, Stream { receiver: raw.0, sender: raw.1, flow: theirs }));
        (id, near, far)
    }

    /// Lets the agent's outbounds serve the streams that the adaptor opens.
    pub(crate) fn serve<P: Phase, I: Interceptor>(&mut self, outbounds: Outbounds<P, I>) {
        let (mut asks, credits) = (self.take_asks(), self.agent.credits.clone());
        tokio::spawn(async move {
            while let Some(Ask { name, id, incoming }) = asks.recv().await {
                let admitted = outbounds.permit(&name).and_then(|permit| permit.admit(&credits));
                tokio::spawn(async move {
                    match admitted {
                        Ok(admitted) => outbound::serve(admitted, id, incoming).await,
                        Err(refusal) => incoming.refuse(refusal).await,
                    }
                });
            }
        });
    }

    /// Streams that the adaptor opens, for the test to answer.
    pub(crate) fn take_asks(&mut self) -> mpsc::UnboundedReceiver<Ask> {
        self.asks.take().unwrap()
    }
}

/// A tunnel of streams whose tunnel does not matter.
pub(crate) fn tunnel() -> TunnelName {
    TunnelName::kbs()
}

/// Registers a stream that the peer opens.
pub(crate) async fn accept(credits: &Credits, id: u32) -> Result<Flow, StreamError> {
    credits.accept(credits.admit(&tunnel())?, id).await
}

fn halves(wire: &Arc<Wire>, id: u32) -> [(MemReceiver, MemSender); 2] {
    let half = |from| {
        // Few, so that the channel itself hardly buffers.
        let (events, received) = mpsc::channel(4);
        let receiver = MemReceiver { events: received, dead: wire.dead.subscribe() };
        (receiver, MemSender { events, from, id, wire: wire.clone() })
    };
    let (at_agent, of_adaptor) = half(Side::Adaptor);
    let (at_adaptor, of_agent) = half(Side::Agent);
    [(at_adaptor, of_adaptor), (at_agent, of_agent)]
}

/// The control channel in one direction.
async fn carry(from: Credits, to: Credits, sender: Side, wire: Arc<Wire>) {
    loop {
        for credit in from.grants(LaneNumber::ALONE).await {
            wire.meter(sender, credit.stream, |meter| meter.available += i64::from(credit.bytes));
            to.granted(credit);
        }
    }
}

/// Closes the connection when its flow control ends, and the reverse.
async fn reap(credits: Credits, wire: Arc<Wire>) {
    let mut dead = wire.dead.subscribe();
    tokio::select! {
        () = credits.gone() => { wire.dead.send_replace(true); }
        _ = dead.wait_for(|dead| *dead) => credits.end(),
    }
}

impl Receiver for MemReceiver {
    async fn recv(&mut self) -> Option<Event> {
        tokio::select! {
            biased;
            _ = self.dead.wait_for(|dead| *dead) => None,
            event = self.events.recv() => event,
        }
    }
}

impl MemSender {
    async fn put(&self, event: Event) -> Result<(), Gone> {
        let mut dead = self.wire.dead.subscribe();
        tokio::select! {
            biased;
            _ = dead.wait_for(|dead| *dead) => Err(Gone),
            sent = self.events.send(event) => sent.map_err(|_| Gone),
        }
    }
}

impl Sender for MemSender {
    async fn send(&self, data: Bytes) -> Result<(), Gone> {
        self.wire.meter(self.from, self.id, |meter| {
            meter.available -= i64::from(cost(data.len()));
            meter.bytes += data.len() as u64;
            meter.messages += 1;
        });
        self.put(Event::Data(data)).await
    }

    async fn eof(&self) -> Result<(), Gone> {
        self.put(Event::Eof).await
    }

    async fn close(&self) -> Result<(), Gone> {
        self.put(Event::Close).await
    }
}

impl Link for MemLink {
    type Receiver = MemReceiver;
    type Sender = MemSender;

    async fn open(&self, name: &TunnelName) -> Result<Stream<MemReceiver, MemSender>, OpenError> {
        let flow = self.credits.open(name).await?;
        let [mine, theirs] = halves(&self.wire, flow.id());
        let (answer, answered) = oneshot::channel();
        let incoming = MemIncoming { halves: theirs, answer };
        self.asks
            .send(Ask { name: name.to_string(), id: flow.id(), incoming })
            .map_err(|_| OpenError::LinkGone)?;
        tokio::select! {
            answer = answered => match answer {
                Ok(Ok(())) => Ok(Stream { receiver: mine.0, sender: mine.1, flow }),
                Ok(Err(refusal)) if refusal.kind == RefusalKind::Shortage => Err(OpenError::Full),
                Ok(Err(refusal)) => Err(OpenError::Refused(refusal.reason)),
                Err(_) => Err(OpenError::LinkGone),
            },
            () = self.credits.gone() => Err(OpenError::LinkGone),
        }
    }

    fn is_gone(&self) -> bool {
        self.credits.is_gone()
    }
}

impl Incoming for MemIncoming {
    type Receiver = MemReceiver;
    type Sender = MemSender;

    async fn accept(self) -> (MemReceiver, MemSender) {
        drop(self.answer.send(Ok(())));
        self.halves
    }

    async fn refuse(self, refusal: Refusal) {
        // A dead connection carries no answer.
        if *self.halves.0.dead.borrow() {
            return;
        }
        drop(self.answer.send(Err(refusal)));
    }
}

/// A connected local socket, as a program uses it.
pub(crate) trait Io: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Io for T {}

/// A TCP connection over loopback: the program's end and ours.
pub(crate) async fn tcp() -> (TcpStream, Socket) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    (client, Socket::tcp(listener.accept().await.unwrap().0).unwrap())
}

/// A unix socket pair: the program's end, and ours.
pub(crate) fn unix() -> (UnixStream, Socket) {
    let (client, ours) = UnixStream::pair().unwrap();
    (client, ours.into())
}

/// Both kinds.
pub(crate) async fn both_kinds() -> Vec<(Box<dyn Io>, Socket)> {
    let (tcp, tcp_socket) = tcp().await;
    let (unix, unix_socket) = unix();
    vec![(Box::new(tcp), tcp_socket), (Box::new(unix), unix_socket)]
}

/// Timeout of every wait, much longer than any success.
pub(crate) async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(120), future).await.expect("it should have happened by now")
}

/// Yields until `state` has stayed the same for many rounds of the event loop, so that every task is idle.
pub(crate) async fn quiet<T: PartialEq>(mut state: impl FnMut() -> T) {
    let (mut last, mut same) = (state(), 0);
    while same < 2000 {
        tokio::task::yield_now().await;
        let now = state();
        same = if now == last { same + 1 } else { 0 };
        last = now;
    }
}

/// Byte `at` of the pattern `seed`, without a period that could hide a lost or doubled block.
fn pattern(seed: u64, at: u64) -> u8 {
    let mixed = (at ^ (seed << 40)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    u8::try_from(mixed >> 56).unwrap()
}

fn chunk(seed: u64, from: u64, len: usize) -> Vec<u8> {
    (from..).take(len).map(|at| pattern(seed, at)).collect()
}

/// Writes `len` bytes of a pattern, in writes of `step` bytes.
pub(crate) async fn write_pattern(to: &mut (impl AsyncWrite + Unpin), seed: u64, len: usize, step: usize) {
    let mut at = 0;
    while at < len {
        let step = step.min(len - at);
        to.write_all(&chunk(seed, at as u64, step)).await.unwrap();
        at += step;
    }
}

/// Reads and checks exactly `len` bytes of a pattern.
pub(crate) async fn check_pattern(from: &mut (impl AsyncRead + Unpin), seed: u64, len: usize) {
    let (mut buffer, mut at) = (vec![0; 64 * 1024], 0);
    while at < len {
        let room = buffer.len().min(len - at);
        let got = from.read(&mut buffer[..room]).await.unwrap();
        assert_ne!(got, 0, "an end after {at} bytes of {len}");
        assert!(buffer[..got] == chunk(seed, at as u64, got), "other bytes than sent near {at}");
        at += got;
    }
}

/// Reads and checks the end of a stream.
pub(crate) async fn check_end(from: &mut (impl AsyncRead + Unpin)) {
    assert_eq!(from.read(&mut [0; 16]).await.unwrap(), 0, "more than was sent");
}

/// Ends the process of a test under paused time, where no timer can bound it.
pub(crate) struct Watchdog(std::sync::mpsc::Sender<()>);

impl Watchdog {
    pub(crate) fn new() -> Self {
        let (alive, watch) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            if watch.recv_timeout(Duration::from_secs(120)) == Err(std::sync::mpsc::RecvTimeoutError::Timeout)
            {
                eprintln!("a test hangs");
                std::process::abort();
            }
        });
        Self(alive)
    }
}
