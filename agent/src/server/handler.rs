//! russh's callbacks for one connection: authentication, channels, forwards. Everything that is not served is refused.

use std::sync::Arc;

use russh::keys::{HashAlg, PublicKey};
use russh::server::{Auth, ChannelOpenHandle, Handler, Msg, PublicKeyOffer, Session, VerifiedPublicKey};
use russh::{Channel, ChannelId, MethodKind, MethodSet, Pty};
use secure_comms_protocol::limits::{CONTROL_SUBSYSTEM, STATUS_SUBSYSTEM};
use secure_comms_protocol::{Opening, PhaseName};
use secure_comms_ssh::channel::split;
use tokio::sync::{Notify, oneshot};

use super::session::{self, PeerActions, Subsystem};
use super::streams::Asked;
use crate::access::policy::Admission;
use crate::agent::Agent;
use crate::connection::Connection;
use crate::peers::link::PeerPending;

/// Answers the requests of one connection. Runs inside the SSH session's loop, so none of its callbacks may wait.
pub(super) struct ConnectionHandler {
    agent: Arc<Agent>,
    connection: Connection,
    /// Generation and phase that the connection was admitted in.
    generation: u64,
    phase: PhaseName,
    /// Phase that authentication was granted for.
    granted: Option<PhaseName>,
    /// Notified when the client has authenticated.
    authenticated: Arc<Notify>,
    peer: Option<Box<dyn PeerActions>>,
    /// The session channel, until it asks for a subsystem or for something else. A task reads it all the
    /// time: a full queue would stall the SSH session, which could not even be cut then.
    control: Option<(ChannelId, oneshot::Sender<Subsystem>)>,
    /// Requests on the session channel that were refused without giving it up.
    requests: u8,
}

/// Requests that a session channel may make before it becomes the control channel.
const REQUESTS_MAX: u8 = 16;

/// A refusal that offers these methods next. Without any, the connection ends at once.
fn refuse(methods: &[MethodKind]) -> Auth {
    Auth::Reject { proceed_with_methods: Some(MethodSet::from(methods)), partial_success: false }
}

impl ConnectionHandler {
    /// Notifies `authenticated` once the client has authenticated.
    pub(super) fn new(
        agent: Arc<Agent>,
        connection: Connection,
        admission: &Admission,
        authenticated: Arc<Notify>,
    ) -> Self {
        Self {
            agent,
            connection,
            generation: admission.generation,
            phase: admission.phase,
            granted: None,
            authenticated,
            peer: None,
            control: None,
            requests: 0,
        }
    }

    fn would_accept(&self, user: &str, key: &PublicKey) -> bool {
        match PhaseName::from_user(user) {
            Some(PhaseName::Kubernetes) => self.agent.policy.allows_login_with(self.generation, key),
            Some(PhaseName::Attestation) => self.agent.policy.allows_attestation_with(self.generation, key),
            None => false,
        }
    }

    /// The methods with which this user could authenticate.
    fn methods(&self, user: &str) -> &'static [MethodKind] {
        let available = match PhaseName::from_user(user) {
            Some(PhaseName::Kubernetes) => self.phase == PhaseName::Kubernetes,
            Some(PhaseName::Attestation) => self.agent.policy.allows_attestation(self.generation),
            None => false,
        };
        if available { &[MethodKind::PublicKey] } else { &[] }
    }

    fn refuse_user(&self, user: &str, reason: &str) -> Auth {
        let user = user.escape_default();
        log::log!(
            self.connection.count_login_refusal(),
            "connection from {}: user '{user:.40}' refused: {reason}",
            self.connection.address
        );
        refuse(self.methods(&user.to_string()))
    }

    /// Refuses a request of a session channel other than for the control channel, and gives the channel up.
    fn refuse_request(
        &mut self,
        channel: ChannelId,
        session: &mut Session,
        what: &str,
    ) -> Result<(), russh::Error> {
        log::log!(
            self.connection.count_refusal(),
            "connection from {}: {what} refused: only subsystem {CONTROL_SUBSYSTEM} is served",
            self.connection.address
        );
        self.forget_channel(channel);
        session.channel_failure(channel)
    }

    /// Counts a refused request after which the channel may still become the control channel.
    fn tolerate_request(&mut self, channel: ChannelId) {
        self.requests = self.requests.saturating_add(1);
        if self.requests >= REQUESTS_MAX {
            self.forget_channel(channel);
        }
    }

    /// Gives up a session channel that will not become the control channel.
    fn forget_channel(&mut self, channel: ChannelId) {
        self.control.take_if(|(own, _)| *own == channel);
    }
}

impl Handler for ConnectionHandler {
    type Error = russh::Error;

    async fn authentication_banner(&mut self) -> Result<Option<String>, russh::Error> {
        Ok(Some(self.agent.policy.banner().text().to_owned()))
    }

    async fn auth_none(&mut self, user: &str) -> Result<Auth, russh::Error> {
        if PhaseName::from_user(user) == Some(PhaseName::Attestation)
            && self.agent.policy.allows_anonymous_attestation(self.generation)
        {
            self.granted = Some(PhaseName::Attestation);
            return Ok(Auth::Accept);
        }
        if self.methods(user).is_empty() {
            return Ok(self.refuse_user(user, "no such user in this phase"));
        }
        // Every OpenSSH client asks this first.
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
        Ok(self.refuse_user(user, "not a key of this pod's worker node"))
    }

    async fn auth_publickey(&mut self, user: &str, key: VerifiedPublicKey<'_>) -> Result<Auth, russh::Error> {
        let accepted = match PhaseName::from_user(user) {
            Some(PhaseName::Kubernetes) => match self.agent.policy.log_in(self.generation, key.public_key) {
                Ok(accepted) => {
                    if accepted {
                        let fingerprint = key.public_key.fingerprint(HashAlg::Sha256);
                        self.connection.set_login_key(fingerprint.to_string());
                    }
                    accepted
                }
                Err(error) => {
                    log::error!("refusing the worker node: {error}");
                    false
                }
            },
            Some(PhaseName::Attestation) => {
                self.agent.policy.allows_attestation_with(self.generation, key.public_key)
            }
            None => false,
        };
        if !accepted {
            return Ok(self.refuse_user(user, "not a key of this pod's worker node"));
        }
        self.granted = PhaseName::from_user(user);
        Ok(Auth::Accept)
    }

    async fn auth_succeeded(&mut self, session: &mut Session) -> Result<(), russh::Error> {
        self.peer = self.granted.and_then(|phase| {
            session::join(phase, &self.agent, &self.connection, self.generation, session.handle())
        });
        self.authenticated.notify_one();
        if self.peer.is_none() {
            self.connection.end("the agent has left the phase of this login; connect again");
        }
        Ok(())
    }

    async fn channel_open_session(
        &mut self,
        channel: Channel<Msg>,
        reply: ChannelOpenHandle,
        _: &mut Session,
    ) -> Result<(), russh::Error> {
        let Some(peer) = &mut self.peer else { return Ok(()) };
        // One session channel a connection; dropping the reply refuses it.
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
        let wanted = match name {
            CONTROL_SUBSYSTEM => Some(Subsystem::Control),
            // An unproven peer learns nothing.
            STATUS_SUBSYSTEM if self.granted == Some(PhaseName::Kubernetes) => Some(Subsystem::Status),
            _ => None,
        };
        let channel = self.control.take_if(|(own, _)| wanted.is_some() && *own == id);
        match wanted.zip(channel) {
            Some((subsystem, (_, begin))) => {
                session.channel_success(id)?;
                // The task has ended only if the channel or the connection has.
                let _ = begin.send(subsystem);
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
        originator_address: &str,
        originator_port: u32,
        reply: ChannelOpenHandle,
        _: &mut Session,
    ) -> Result<(), russh::Error> {
        if let Some(peer) = &self.peer {
            let opening = Opening::from_originator(originator_address);
            let asked = Asked { name: host_to_connect, id: originator_port, opening };
            peer.serve_stream(asked, PeerPending::new(channel, reply));
        }
        Ok(())
    }

    async fn tcpip_forward(
        &mut self,
        address: &str,
        port: &mut u32,
        _: &mut Session,
    ) -> Result<bool, russh::Error> {
        Ok(self.peer.as_ref().is_some_and(|peer| peer.add_forward(address, *port)))
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
        // Clients send their locale by default and work without it.
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
            self.connection.count_refusal(),
            "connection from {}: agent forwarding refused",
            self.connection.address
        );
        Ok(false)
    }
}
