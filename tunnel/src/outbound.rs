//! Outbounds: the servers that streams of the other end may reach, by name. A server that is not listed here can't be
//! dialled.

use std::collections::HashMap;
use std::io;
use std::marker::PhantomData;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use secure_comms_protocol::limits::OUTBOUND_CONNECT;
use secure_comms_protocol::{OutboundTag, Phase, Refusal, RefusalReason, Target, TunnelName};
use tokio::net::UnixStream;
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep_until, timeout_at};

use crate::backoff::Backoff;
use crate::dial;
use crate::flow::{Credits, Flow, Slot, StreamError};
use crate::intercept::{Interceptor, PassThrough};
use crate::link::{Incoming, Stream};
use crate::names::Resolver;
use crate::relay::{relay, relay_through, report};
use crate::reminder::Reminder;
use crate::socket::Socket;

/// The outbounds of one phase, one of which may have an interceptor.
#[derive(Clone, Debug)]
pub struct Outbounds<P, I = PassThrough> {
    servers: HashMap<TunnelName, Server>,
    intercepted: Option<(TunnelName, I)>,
    phase: PhantomData<P>,
}

#[derive(Clone, Debug)]
struct Server {
    target: Target,
    connect_timeout: Duration,
    /// Has one permit: of several streams that wait for the server, one says so.
    reports: Arc<Semaphore>,
}

/// Proof that the name of a stream was looked up and allowed, from [`Outbounds::permit`]. Only a permit can be dialled.
#[derive(Debug)]
pub struct Permit<P, I = PassThrough> {
    name: TunnelName,
    server: Server,
    interceptor: Option<I>,
    phase: PhantomData<P>,
}

/// A stream with a permit and a place on its connection, from [`Permit::admit`]; [`serve`] serves it. A peer can't have
/// more of them than it may have streams.
#[derive(Debug)]
pub struct Admitted<P, I = PassThrough> {
    permit: Permit<P, I>,
    slot: Slot,
    credits: Credits,
}

/// The server of an outbound could not be reached.
#[derive(Debug, thiserror::Error)]
#[error("connecting to {target}: {cause}")]
pub struct ConnectError {
    target: Target,
    cause: io::Error,
}

impl<P: Phase> Outbounds<P> {
    /// Takes the tags that exist in the phase.
    pub fn new<'a>(tags: impl IntoIterator<Item = &'a OutboundTag>) -> Self {
        let servers = tags
            .into_iter()
            .filter(|tag| tag.phases.includes(P::NAME))
            .map(|tag| {
                let reports = Arc::new(Semaphore::new(1));
                let target = tag.target.clone();
                (tag.name.clone(), Server { target, connect_timeout: Duration::ZERO, reports })
            })
            .collect();
        Self { servers, intercepted: None, phase: PhantomData }
    }
}

impl<P: Phase, I: Interceptor> Outbounds<P, I> {
    /// Sets the interceptor of the tunnel `name`, and removes that of any other tunnel.
    pub fn with_interceptor<J: Interceptor>(self, name: TunnelName, interceptor: J) -> Outbounds<P, J> {
        Outbounds { servers: self.servers, intercepted: Some((name, interceptor)), phase: PhantomData }
    }

    /// Sets how long connecting to the server of `name` is retried, for a server that may start after its clients.
    pub fn with_connect_timeout(mut self, name: &TunnelName, connect_timeout: Duration) -> Self {
        if let Some(server) = self.servers.get_mut(name) {
            server.connect_timeout = connect_timeout;
        }
        self
    }

    /// The outbounds for a new connection, or a new session, whose streams may share limits of the interceptor.
    #[must_use]
    pub fn for_connection(&self) -> Self {
        let intercepted =
            self.intercepted.as_ref().map(|(name, interceptor)| (name.clone(), interceptor.for_connection()));
        Self { servers: self.servers.clone(), intercepted, phase: PhantomData }
    }

    /// Names of the outbounds, for `hello`.
    pub fn names(&self) -> Vec<String> {
        self.servers.keys().map(ToString::to_string).collect()
    }

    /// Looks up the server that the peer names.
    ///
    /// # Errors
    /// The text is not a tunnel name, or the phase has no outbound of this name.
    pub fn permit(&self, name: &str) -> Result<Permit<P, I>, Refusal> {
        let refusal = |reason| Refusal::new(name, P::NAME, &reason);
        let name: TunnelName = name.parse().map_err(|_| refusal(RefusalReason::BadName))?;
        let server = self.servers.get(&name).ok_or_else(|| refusal(RefusalReason::NoOutbound))?;
        let interceptor = match &self.intercepted {
            Some((intercepted, interceptor)) if *intercepted == name => Some(interceptor.clone()),
            _ => None,
        };
        Ok(Permit { name, server: server.clone(), interceptor, phase: PhantomData })
    }
}

impl<P: Phase, I> Permit<P, I> {
    /// Takes the stream's place on its connection.
    ///
    /// # Errors
    /// Too many streams are open.
    pub fn admit(self, credits: &Credits) -> Result<Admitted<P, I>, Refusal> {
        match credits.admit(&self.name) {
            Ok(slot) => Ok(Admitted { permit: self, slot, credits: credits.clone() }),
            Err(error) => Err(Refusal::new(self.name.as_str(), P::NAME, &error.into())),
        }
    }
}

impl<P, I> Permit<P, I> {
    /// Connects to the server, with retries and backoff. The log says what a longer wait is for. Dropping the future stops the
    /// attempt.
    ///
    /// # Errors
    /// The server can't be reached within [`OUTBOUND_CONNECT`], or within its own connect timeout if that is longer.
    pub async fn connect(&self) -> Result<Socket, ConnectError> {
        let Server { target, connect_timeout, reports } = &self.server;
        let end = Instant::now() + OUTBOUND_CONNECT.max(*connect_timeout);
        let fault = Mutex::new("no answer".to_owned());
        let attempts = self.attempts(&fault);
        tokio::pin!(attempts);
        let (mut reminder, mut report) = (Reminder::start(), None);
        let connected = loop {
            tokio::select! {
                connected = &mut attempts => break connected,
                () = reminder.due() => {
                    report = report.or_else(|| reports.try_acquire().ok());
                    if report.is_none() {
                        continue;
                    }
                    let left = end.saturating_duration_since(Instant::now()).as_secs_f32();
                    let fault = fault.lock().unwrap_or_else(PoisonError::into_inner);
                    log::warn!("tunnel {}: waiting for {target}: {fault}; {left:.0} s left", self.name);
                }
            }
        };
        if report.is_some() && connected.is_ok() {
            let waited = reminder.waited().as_secs_f32();
            log::info!("tunnel {}: {target} answered after {waited:.1} s", self.name);
        }
        connected
    }

    /// Keeps the fault of the last attempt in `fault`.
    async fn attempts(&self, fault: &Mutex<String>) -> Result<Socket, ConnectError> {
        let Server { target, connect_timeout, .. } = &self.server;
        let resolver = Resolver::default();
        let start = Instant::now();
        let end = start + OUTBOUND_CONNECT.max(*connect_timeout);
        let mut backoff = Backoff::default();
        loop {
            let limit = end.min(Instant::now() + OUTBOUND_CONNECT);
            let result = timeout_at(limit, dial(&resolver, target)).await;
            let cause = match result.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
                Ok(socket) => return Ok(socket),
                Err(error) => error,
            };
            // WouldBlock: the backlog of a running unix server is full, and a unix connect does not wait for room.
            let last = if cause.kind() == io::ErrorKind::WouldBlock { end } else { start + *connect_timeout };
            let next = Instant::now() + backoff.next_pause();
            if next >= last {
                return Err(ConnectError { target: target.clone(), cause });
            }
            *fault.lock().unwrap_or_else(PoisonError::into_inner) = cause.to_string();
            sleep_until(next).await;
        }
    }
}

impl<P, I> Permit<P, I> {
    /// The interceptor of this stream alone.
    pub fn interceptor_mut(&mut self) -> Option<&mut I> {
        self.interceptor.as_mut()
    }

    /// The server.
    pub fn target(&self) -> &Target {
        &self.server.target
    }

    /// Connects to the server once, and hangs up. The caller limits the time.
    ///
    /// # Errors
    /// The server does not accept the connection.
    pub async fn probe(&self) -> io::Result<()> {
        dial(&Resolver::default(), &self.server.target).await.map(drop)
    }
}

async fn dial(resolver: &Resolver, target: &Target) -> io::Result<Socket> {
    match target {
        Target::Unix(path) => Ok(UnixStream::connect(path).await?.into()),
        Target::Tcp { host, port } => Socket::tcp(dial::connect(resolver, host, *port).await?),
    }
}

/// Serves one stream: connects to the server of `permit`, confirms the stream, and relays until both ends are done.
///
/// `id` is the stream id that the peer chose. A stream that can't be served is refused and logged. Returns when the
/// stream has ended. Dropping the future resets the stream and the connection to the server.
pub async fn serve<P: Phase, I: Interceptor>(admitted: Admitted<P, I>, id: u32, incoming: impl Incoming) {
    let Admitted { permit, slot, credits } = admitted;
    match prepare(slot, &permit, &credits, id).await {
        Ok((socket, flow)) => {
            let (receiver, sender) = incoming.accept().await;
            let stream = Stream { receiver, sender, flow };
            let result = match &permit.interceptor {
                Some(interceptor) => relay_through(interceptor, socket, stream).await,
                None => relay(socket, stream).await,
            };
            report(&permit.name, result);
        }
        Err(refusal) => {
            log::warn!("refusing a stream: {}", refusal.reason);
            incoming.refuse(refusal).await;
        }
    }
}

async fn prepare<P: Phase, I>(
    slot: Slot,
    permit: &Permit<P, I>,
    credits: &Credits,
    id: u32,
) -> Result<(Socket, Flow), Refusal> {
    let refusal = |reason| Refusal::new(permit.name.as_str(), P::NAME, &reason);
    // Registered before the confirmation goes out: credit for the stream may arrive right after it.
    let flow = credits.accept(slot, id).await.map_err(|error| refusal(error.into()))?;
    let connected = tokio::select! {
        connected = permit.connect() => connected.map_err(|error| error.to_string()),
        () = credits.gone() => Err(StreamError::Gone.to_string()),
    };
    let socket = connected.map_err(|error| refusal(RefusalReason::Unreachable(error)))?;
    Ok((socket, flow))
}
