//! Outbounds: the servers that streams of the other end may reach, by name.

use std::collections::HashMap;
use std::io;
use std::marker::PhantomData;
use std::time::Duration;

use secure_comms_protocol::limits::{OUTBOUND_CONNECT, TCP_CONNECT};
use secure_comms_protocol::tag::Host;
use secure_comms_protocol::{OutboundTag, Phase, Target, TunnelName};
use tokio::net::{TcpStream, UnixStream, lookup_host};
use tokio::time::{Instant, sleep_until, timeout, timeout_at};

use crate::backoff::Backoff;
use crate::flow::{Credits, Flow, StreamError};
use crate::inbound::report;
use crate::intercept::{Interceptor, PassThrough};
use crate::link::{Incoming, Refusal, RefusalKind, Stream};
use crate::relay::{relay, relay_through};
use crate::socket::Socket;

/// The outbounds of one phase, one of which may have an interceptor. What is not in here can't be dialled.
#[derive(Clone, Debug)]
pub struct Outbounds<P, I = PassThrough> {
    servers: HashMap<TunnelName, Server>,
    intercepted: Option<(TunnelName, I)>,
    phase: PhantomData<P>,
}

#[derive(Clone, Debug)]
struct Server {
    target: Target,
    patience: Duration,
}

/// The leave to dial one server, from [`Outbounds::permit`].
#[derive(Debug)]
pub struct Permit {
    name: TunnelName,
    server: Server,
}

/// Why a server was not reached.
#[derive(Debug, thiserror::Error)]
#[error("connecting to {target}: {source}")]
pub struct ConnectError {
    target: Target,
    source: io::Error,
}

impl<P: Phase> Outbounds<P> {
    /// Those of `tags` that exist in the phase.
    pub fn new<'a>(tags: impl IntoIterator<Item = &'a OutboundTag>) -> Self {
        let servers = tags
            .into_iter()
            .filter(|tag| tag.phases.includes(P::NAME))
            .map(|tag| (tag.name.clone(), Server { target: tag.target.clone(), patience: Duration::ZERO }))
            .collect();
        Self { servers, intercepted: None, phase: PhantomData }
    }
}

impl<P: Phase, I: Interceptor> Outbounds<P, I> {
    /// Puts an interceptor before the server of this name, whatever its target; it takes the place of another one.
    pub fn with_interceptor<J: Interceptor>(self, name: TunnelName, interceptor: J) -> Outbounds<P, J> {
        Outbounds { servers: self.servers, intercepted: Some((name, interceptor)), phase: PhantomData }
    }

    /// Lets one server come up later than its clients: connecting is tried for this long.
    pub fn with_connect_timeout(mut self, name: &TunnelName, patience: Duration) -> Self {
        if let Some(server) = self.servers.get_mut(name) {
            server.patience = patience;
        }
        self
    }

    /// Their names, for `hello`.
    pub fn names(&self) -> Vec<String> {
        self.servers.keys().map(ToString::to_string).collect()
    }

    /// The leave to dial the server that the other end names.
    ///
    /// # Errors
    /// The name is not one, or not an outbound of this phase.
    pub fn permit(&self, asked: &str) -> Result<Permit, Refusal> {
        let refused = |cause: &str| Refusal::new(RefusalKind::Prohibited, asked, P::NAME, cause);
        let name: TunnelName = asked.parse().map_err(|_| refused("not a tunnel name"))?;
        let server =
            self.servers.get(&name).ok_or_else(|| refused("no outbound of this name in this phase"))?;
        Ok(Permit { name, server: server.clone() })
    }
}

impl Permit {
    /// Connects to the server.
    ///
    /// # Errors
    /// It can't be reached within [`OUTBOUND_CONNECT`], or within its patience.
    pub async fn connect(&self) -> Result<Socket, ConnectError> {
        let Server { target, patience } = &self.server;
        let start = Instant::now();
        let end = start + OUTBOUND_CONNECT.max(*patience);
        let mut backoff = Backoff::default();
        loop {
            let limit = end.min(Instant::now() + OUTBOUND_CONNECT);
            let result = timeout_at(limit, dial(target)).await;
            let source = match result.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
                Ok(socket) => return Ok(socket),
                Err(error) => error,
            };
            // A unix server whose backlog is full is there, and busy; unix sockets don't wait for it.
            let last = if source.kind() == io::ErrorKind::WouldBlock { end } else { start + *patience };
            let next = Instant::now() + backoff.next_pause();
            if next >= last {
                return Err(ConnectError { target: target.clone(), source });
            }
            sleep_until(next).await;
        }
    }
}

async fn dial(target: &Target) -> io::Result<Socket> {
    match target {
        Target::Unix(path) => Ok(UnixStream::connect(path).await?.into()),
        Target::Tcp { host: Host::Ip(ip), port } => Socket::tcp(TcpStream::connect((*ip, *port)).await?),
        Target::Tcp { host: Host::Name(name), port } => {
            let mut failed = io::Error::new(io::ErrorKind::NotFound, "the host name has no address");
            // Each for a while only: the first may be unreachable and the next not.
            for address in lookup_host((name.as_str(), *port)).await? {
                match timeout(TCP_CONNECT, TcpStream::connect(address)).await {
                    Ok(Ok(stream)) => return Socket::tcp(stream),
                    Ok(Err(error)) => failed = error,
                    Err(_) => failed = io::ErrorKind::TimedOut.into(),
                }
            }
            Err(failed)
        }
    }
}

/// Answers a stream that the other end asks for: the permit, the server, the confirmation, then the relay.
pub async fn serve<P: Phase, I: Interceptor>(
    outbounds: &Outbounds<P, I>,
    credits: &Credits,
    asked: &str,
    id: u32,
    incoming: impl Incoming,
) {
    match prepare(outbounds, credits, asked, id).await {
        Ok((permit, socket, flow)) => {
            let (receiver, sender) = incoming.accept().await;
            let stream = Stream { receiver, sender, flow };
            let result = match &outbounds.intercepted {
                Some((name, interceptor)) if *name == permit.name => {
                    relay_through(interceptor, socket, stream).await
                }
                _ => relay(socket, stream).await,
            };
            report(&permit.name, result);
        }
        Err(refusal) => {
            log::warn!("refusing a stream: {}", refusal.reason);
            incoming.refuse(refusal).await;
        }
    }
}

async fn prepare<P: Phase, I: Interceptor>(
    outbounds: &Outbounds<P, I>,
    credits: &Credits,
    asked: &str,
    id: u32,
) -> Result<(Permit, Socket, Flow), Refusal> {
    let permit = outbounds.permit(asked)?;
    let refused = |kind, cause: &dyn std::fmt::Display| Refusal::new(kind, asked, P::NAME, cause);
    // Registered before the confirmation goes out: credit for it may come right after.
    let flow = credits.accept(id).await.map_err(|error| match error {
        StreamError::TooMany => refused(RefusalKind::Shortage, &error),
        StreamError::BadId(_) | StreamError::Gone => refused(RefusalKind::Prohibited, &error),
    })?;
    let connected = tokio::select! {
        connected = permit.connect() => connected,
        () = credits.gone() => return Err(refused(RefusalKind::ConnectFailed, &StreamError::Gone)),
    };
    let socket = connected.map_err(|error| refused(RefusalKind::ConnectFailed, &error))?;
    Ok((permit, socket, flow))
}
