//! What russh calls during a connection: the host key check, the banner, the agent's streams, the end.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use russh::client::{self, ChannelOpenHandle, DisconnectReason, Handle, Handler, Msg};
use russh::keys::{HashAlg, PublicKeyOrCertificate};
use russh::{Channel, ChannelId, ChannelOpenFailure};
use secure_comms_protocol::{Opening, PhaseName, Refusal, RefusalKind, RefusalReason, TunnelName};
use secure_comms_ssh::channel::PendingChannel;
use secure_comms_ssh::link::{Opener, SshLink};
use secure_comms_tunnel::flow::{LaneNumber, Side};
use secure_comms_tunnel::outbound::{self, Admitted};
use secure_comms_tunnel::session::{IncomingStream, Session};
use secure_comms_tunnel::{Account, Credits, Incoming, Outbounds};
use tokio::sync::watch;

use super::error::{ConnectError, cause};
use super::phase::ClientPhase;
use crate::text::quote;
use crate::throttle::Throttle;
use crate::transport::kbs_filter::KbsFilter;

/// Refusals of one connection that are logged as warnings; the rest are logged as debug lines.
const REFUSAL_WARNINGS_MAX: u32 = 16;
/// Those of all connections: a stranger that is cut may come back at once.
static REFUSAL_WARNINGS: Mutex<Throttle> = Mutex::new(Throttle::new(64));

/// How a connection ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum TransportEnd {
    /// The agent offers no authentication method for this user.
    Refused,
    /// The agent disconnected, with this reason.
    Disconnected(String),
    /// The connection broke, for this reason.
    Broken(String),
}

/// State that a connection and its handler share.
pub(super) struct Shared<P: ClientPhase> {
    /// Address of the agent.
    address: SocketAddr,
    host: P::Host,
    outbounds: Arc<Outbounds<P, KbsFilter>>,
    pub(super) credits: Credits,
    /// The tunnel names that the agent was asked to forward.
    pub(super) requested: Mutex<HashSet<TunnelName>>,
    refusals: AtomicU32,
    banner: Mutex<Option<String>>,
    pub(super) wrong_key: Mutex<Option<String>>,
    end: watch::Sender<Option<TransportEnd>>,
    /// How the agent's streams are served. Those that come earlier wait.
    serving: watch::Sender<Option<Serving<P>>>,
}

/// How the agent's streams on a connection are served.
#[derive(Clone)]
pub(super) enum Serving<P: ClientPhase> {
    /// They end with the connection.
    Alone,
    /// In a session, in which the connection has this number.
    InSession(Session<AgentLink<P>>, LaneNumber),
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<P: ClientPhase> Shared<P> {
    pub(super) fn new(
        address: SocketAddr,
        host: P::Host,
        outbounds: Arc<Outbounds<P, KbsFilter>>,
        account: Account,
    ) -> Arc<Self> {
        Arc::new(Self {
            address,
            host,
            outbounds,
            credits: Credits::charged_to(account, Side::Adaptor, P::CREDIT),
            requested: Mutex::default(),
            refusals: AtomicU32::new(0),
            banner: Mutex::default(),
            wrong_key: Mutex::default(),
            end: watch::Sender::new(None),
            // An agent in the Attestation phase has nothing to prove.
            serving: watch::Sender::new((P::NAME == PhaseName::Attestation).then_some(Serving::<P>::Alone)),
        })
    }

    /// Ends the connection's streams. Only the first reason is kept: later ones follow from it.
    pub(super) fn end(&self, reason: TransportEnd) {
        self.end.send_if_modified(|end| {
            let first = end.is_none();
            end.get_or_insert(reason);
            first
        });
        self.credits.end();
    }

    /// Serves the agent's streams from now on, and those that wait.
    pub(super) fn serve_streams(&self, how: Serving<P>) {
        self.serving.send_replace(Some(how));
    }

    /// Waits until the agent's streams are served; none if the connection ends before.
    async fn serving(&self) -> Option<Serving<P>> {
        let mut serving = self.serving.subscribe();
        tokio::select! {
            serving = serving.wait_for(Option::is_some) => serving.ok().and_then(|serving| serving.clone()),
            () = self.credits.gone() => None,
        }
    }

    /// Why the agent disconnected, if it did.
    pub(super) fn disconnected(&self) -> Option<String> {
        match &*self.end.borrow() {
            Some(TransportEnd::Disconnected(why)) => Some(format!("the agent disconnected: {why}")),
            _ => None,
        }
    }

    pub(super) async fn ended(&self) -> TransportEnd {
        let mut end = self.end.subscribe();
        let end = end.wait_for(Option::is_some).await.ok().and_then(|end| end.clone());
        end.unwrap_or_else(|| TransportEnd::Broken("the connection is gone".into()))
    }

    /// Logs a refusal. Throttled, because the agent may be a stranger that wants to fill the log.
    fn log_refusal(&self, event: &str, what: &str) {
        let what = quote(what);
        let few = self.refusals.fetch_add(1, Ordering::Relaxed) < REFUSAL_WARNINGS_MAX;
        match few.then(|| lock(&REFUSAL_WARNINGS).allow()).flatten() {
            None => tracing::debug!("{event}: {what}"),
            Some(0) => tracing::warn!("{event}: {what}"),
            Some(left_out) => tracing::warn!("{event}: {what} ({left_out} more were left out)"),
        }
    }

    /// Logs that we refuse a stream. Of a shortage the agent's inbound says that its clients wait, and it asks often.
    fn log_refused_stream(&self, refusal: &Refusal) {
        match refusal.kind {
            RefusalKind::Shortage => tracing::debug!("refused the agent: {}", quote(&refusal.reason)),
            RefusalKind::Prohibited | RefusalKind::ConnectFailed => {
                self.log_refusal("refused the agent", &refusal.reason);
            }
        }
    }

    pub(super) fn refused(&self) -> ConnectError {
        ConnectError::Refused { phase: P::NAME, banner: lock(&self.banner).clone() }
    }

    /// Admits a stream of the agent: with a permit, and a place among the streams of the connection or session.
    fn admit(&self, name: &str, streams: &Credits) -> Result<Admitted<P, KbsFilter>, Refusal> {
        let refusal = |reason| Refusal::new(name, P::NAME, &reason);
        if !name.parse().is_ok_and(|name| lock(&self.requested).contains(&name)) {
            return Err(refusal(RefusalReason::NotRequested));
        }
        let mut permit = self.outbounds.permit(name)?;
        if let Some(filter) = permit.interceptor_mut() {
            filter.set_peer(self.address);
        }
        permit.admit(streams)
    }

    /// Serves a stream of the agent in a task of its own, because the caller is russh's session loop.
    fn serve_stream(self: Arc<Self>, name: &str, id: u32, opening: Opening, pending: PendingChannel<Msg>) {
        // Also in a session: its place on the connection limits those that wait.
        match self.admit(name, &self.credits) {
            Ok(admitted) => {
                let name = name.to_owned();
                tokio::spawn(async move {
                    match self.serving().await {
                        None => {}
                        Some(Serving::Alone) => outbound::serve(admitted, id, pending).await,
                        Some(Serving::InSession(session, number)) => {
                            drop(admitted);
                            self.serve_in_session(&session, number, (&name, id, opening), pending).await;
                        }
                    }
                });
            }
            Err(refusal) => {
                self.log_refused_stream(&refusal);
                tokio::spawn(pending.refuse(refusal));
            }
        }
    }

    /// Serves a new stream, and lets one that the session knows go on.
    async fn serve_in_session(
        &self,
        session: &Session<AgentLink<P>>,
        number: LaneNumber,
        (name, id, opening): (&str, u32, Opening),
        pending: PendingChannel<Msg>,
    ) {
        // It was admitted, so it is a name.
        let Ok(tunnel) = name.parse() else { return };
        let IncomingStream::New(stream) = session.incoming(number, &tunnel, id, opening, pending) else {
            return;
        };
        match self.admit(name, session.credits()) {
            Ok(admitted) => outbound::serve(admitted, id, stream).await,
            Err(refusal) => {
                self.log_refused_stream(&refusal);
                stream.refuse(refusal).await;
            }
        }
    }
}

/// Opens `direct-tcpip` channels. The host is the tunnel's name; the agent ignores the port.
pub(crate) struct DirectOpener<P: ClientPhase>(Arc<Handle<Callbacks<P>>>);

impl<P: ClientPhase> DirectOpener<P> {
    pub(super) fn new(handle: &Arc<Handle<Callbacks<P>>>) -> Self {
        Self(Arc::clone(handle))
    }
}

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
        opening: Opening,
    ) -> impl Future<Output = Result<Channel<Msg>, russh::Error>> + Send + 'static {
        let (handle, name) = (Arc::clone(&self.0), name.to_string());
        async move { handle.channel_open_direct_tcpip(name, 1, opening.to_string(), id).await }
    }
}

/// Opens streams to an agent's outbounds in a phase, or the channels of a session.
pub(crate) type AgentLink<P> = SshLink<DirectOpener<P>>;

/// The callbacks of russh. They run in its session loop and must not block.
pub(super) struct Callbacks<P: ClientPhase>(pub(super) Arc<Shared<P>>);

impl<P: ClientPhase> Drop for Callbacks<P> {
    fn drop(&mut self) {
        // russh does not call `disconnected` if closing the socket fails.
        self.0.end(TransportEnd::Broken("the connection was closed".into()));
    }
}

impl<P: ClientPhase> Callbacks<P> {
    async fn refuse(&self, reply: ChannelOpenHandle, what: &str) -> Result<(), russh::Error> {
        let what = format!("a channel of type {what}: only forwarded-tcpip is served");
        self.0.log_refusal("refused the agent", &what);
        reply.reject(ChannelOpenFailure::AdministrativelyProhibited).await;
        Ok(())
    }
}

impl<P: ClientPhase> Handler for Callbacks<P> {
    type Error = russh::Error;

    async fn auth_banner(&mut self, banner: &str, _: &mut client::Session) -> Result<(), russh::Error> {
        // Only the first one is kept: a stranger could send any number.
        lock(&self.0.banner).get_or_insert_with(|| quote(banner.trim()));
        Ok(())
    }

    async fn check_server_key(&mut self, shown: &PublicKeyOrCertificate) -> Result<bool, russh::Error> {
        let fingerprint = match shown {
            PublicKeyOrCertificate::PublicKey { key, .. } if P::trusts(&self.0.host, key) => return Ok(true),
            PublicKeyOrCertificate::PublicKey { key, .. } => key.fingerprint(HashAlg::Sha256).to_string(),
            PublicKeyOrCertificate::Certificate(_) => "a certificate".to_owned(),
        };
        *lock(&self.0.wrong_key) = Some(fingerprint);
        Ok(false)
    }

    async fn kex_done(
        &mut self,
        _: Option<&[u8]>,
        _: &russh::Names,
        _: &mut client::Session,
    ) -> Result<(), russh::Error> {
        tracing::debug!("{}: new session keys", P::NAME.user());
        Ok(())
    }

    async fn server_channel_open_forwarded_tcpip(
        &mut self,
        channel: Channel<Msg>,
        connected_address: &str,
        _: u32,
        originator_address: &str,
        originator_port: u32,
        reply: ChannelOpenHandle,
        _: &mut client::Session,
    ) -> Result<(), russh::Error> {
        let (opening, pending) =
            (Opening::from_originator(originator_address), PendingChannel::new(channel, reply));
        self.0.clone().serve_stream(connected_address, originator_port, opening, pending);
        Ok(())
    }

    // russh's defaults for the following callbacks accept.

    async fn server_channel_open_session(
        &mut self,
        _: Channel<Msg>,
        reply: ChannelOpenHandle,
        _: &mut client::Session,
    ) -> Result<(), russh::Error> {
        self.refuse(reply, "session").await
    }

    async fn server_channel_open_direct_tcpip(
        &mut self,
        _: Channel<Msg>,
        _: &str,
        _: u32,
        _: &str,
        _: u32,
        reply: ChannelOpenHandle,
        _: &mut client::Session,
    ) -> Result<(), russh::Error> {
        self.refuse(reply, "direct-tcpip").await
    }

    async fn server_channel_open_direct_streamlocal(
        &mut self,
        _: Channel<Msg>,
        _: &str,
        reply: ChannelOpenHandle,
        _: &mut client::Session,
    ) -> Result<(), russh::Error> {
        self.refuse(reply, "direct-streamlocal").await
    }

    async fn server_channel_open_forwarded_streamlocal(
        &mut self,
        _: Channel<Msg>,
        _: &str,
        reply: ChannelOpenHandle,
        _: &mut client::Session,
    ) -> Result<(), russh::Error> {
        self.refuse(reply, "forwarded-streamlocal").await
    }

    async fn server_channel_open_agent_forward(
        &mut self,
        _: Channel<Msg>,
        reply: ChannelOpenHandle,
        _: &mut client::Session,
    ) -> Result<(), russh::Error> {
        self.refuse(reply, "agent").await
    }

    async fn server_channel_open_x11(
        &mut self,
        _: Channel<Msg>,
        _: &str,
        _: u32,
        reply: ChannelOpenHandle,
        _: &mut client::Session,
    ) -> Result<(), russh::Error> {
        self.refuse(reply, "x11").await
    }

    async fn should_accept_unknown_server_channel(&mut self, _: ChannelId, _: &str) -> bool {
        false
    }

    async fn server_channel_open_unknown(
        &mut self,
        _: Channel<Msg>,
        reply: ChannelOpenHandle,
        _: &mut client::Session,
    ) -> Result<(), russh::Error> {
        self.refuse(reply, "unknown").await
    }

    async fn channel_open_failure(
        &mut self,
        _: ChannelId,
        reason: ChannelOpenFailure,
        description: &str,
        _: &str,
        _: &mut client::Session,
    ) -> Result<(), russh::Error> {
        // The agent's description names the tunnel, the phase and the cause.
        match reason {
            // The inbound says it, if it lasts.
            ChannelOpenFailure::ResourceShortage => {
                tracing::debug!("the agent refused a stream: {}", quote(description));
            }
            _ => self.0.log_refusal("the agent refused a stream", description),
        }
        Ok(())
    }

    async fn disconnected(&mut self, reason: DisconnectReason<russh::Error>) -> Result<(), russh::Error> {
        match reason {
            DisconnectReason::ReceivedDisconnect(info) => {
                self.0.end(TransportEnd::Disconnected(quote(&info.message)));
                Ok(())
            }
            DisconnectReason::Error(error) => {
                self.0.end(match &error {
                    russh::Error::NoAuthMethod => TransportEnd::Refused,
                    other => TransportEnd::Broken(cause(other)),
                });
                Err(error)
            }
        }
    }
}
