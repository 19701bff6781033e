//! An SSH client that keeps to no rule: an unproven peer in the network between the two ends.
//!
//! [`Stranger`] uses russh's client and accepts every key and stream; [`raw`](super::raw) sends any packet at all.

use std::io::ErrorKind;
use std::net::{Shutdown, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use russh::client::{self, ChannelOpenHandle, DisconnectReason, Handle, Handler, Msg, Session};
use russh::keys::{HashAlg, PrivateKey, PrivateKeyWithHashAlg, PublicKeyOrCertificate};
use russh::{Channel, ChannelMsg, ChannelOpenFailure, ChannelStream, ChannelWriteHalf};
use secure_comms_protocol::Control;
use secure_comms_protocol::Hello;
use secure_comms_protocol::control::Lines;
use secure_comms_protocol::limits::{CONTROL_SUBSYSTEM, PROTOCOL_VERSION};
use tokio::io::copy_bidirectional;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::harness::scene::PATIENCE;

/// Pause between two bytes of a slow answer: shorter than every limit on silence.
const DRIP: Duration = Duration::from_secs(1);

/// What a stranger does with the streams that the agent opens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Leaves the request to open unanswered.
    Unanswered,
    /// Refuses the stream.
    Refuses,
    /// Says that it has no place for the stream now.
    NoPlace,
    /// Accepts the stream and sends nothing.
    Silent,
    /// Accepts the stream and closes it.
    Closes,
    /// Accepts the stream and sends bytes that are not HTTP.
    Garbage,
    /// Accepts the stream and sends an endless answer, a byte at a time.
    Drips,
    /// Connects the stream to this server: the real KBS, or one of the stranger's.
    Relays(SocketAddr),
}

/// A connection to an agent; cut when dropped.
pub struct Stranger {
    handle: Handle<Permissive>,
    socket: std::net::TcpStream,
    seen: watch::Receiver<Seen>,
    heard: watch::Sender<Vec<Control>>,
    control: Option<ChannelWriteHalf<Msg>>,
}

/// What the handler has seen.
#[derive(Clone, Debug, Default)]
struct Seen {
    banner: String,
    host_key: String,
    gone: bool,
    /// Description of the server's disconnect message.
    reason: Option<String>,
}

impl std::fmt::Debug for Stranger {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stranger").finish_non_exhaustive()
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        // The session exists as long as one of its channels does. Shutting a closed socket fails, and need not succeed.
        drop(self.socket.shutdown(Shutdown::Both));
    }
}

impl Stranger {
    /// Connects, up to the authentication request.
    ///
    /// # Errors
    /// If the agent ends the connection before.
    pub async fn connect(agent: SocketAddr, answer: Answer) -> Result<Self> {
        let socket = TcpStream::connect(agent).await.context("stranger: connecting")?.into_std()?;
        let own = socket.try_clone().context("stranger: sharing the socket")?;
        let (observed, seen) = watch::channel(Seen::default());
        let handler = Permissive { answer, observed };
        let config = Arc::new(client::Config { nodelay: true, ..client::Config::default() });
        let session = client::connect_stream(config, TcpStream::from_std(socket)?, handler);
        let handle =
            timeout(PATIENCE, session).await.context("stranger: key exchange")?.context("stranger")?;
        Ok(Self { handle, socket: own, seen, heard: watch::Sender::default(), control: None })
    }

    /// Connects as an attestation peer.
    ///
    /// # Errors
    /// If it is refused.
    pub async fn attestation(agent: SocketAddr, answer: Answer) -> Result<Self> {
        let mut stranger = Self::connect(agent, answer).await?;
        if !stranger.handle.authenticate_none("attestation").await?.success() {
            bail!("stranger: user attestation is refused");
        }
        Ok(stranger)
    }

    /// Connects as an attestation peer that claims to drive `pod`, and offers the KBS.
    ///
    /// # Errors
    /// If the agent refuses it or ends the connection.
    pub async fn attest(agent: SocketAddr, pod: &str, answer: Answer) -> Result<Self> {
        let mut stranger = Self::attestation(agent, answer).await?;
        stranger.offer("KBS").await?;
        stranger.hello(pod).await?;
        Ok(stranger)
    }

    /// Connects as the worker node that holds this private key.
    ///
    /// # Errors
    /// If it is refused.
    pub async fn kubernetes(agent: SocketAddr, key: &Path) -> Result<Self> {
        let mut stranger = Self::connect(agent, Answer::Refuses).await?;
        let pem = std::fs::read_to_string(key).with_context(|| format!("reading {}", key.display()))?;
        let key = PrivateKeyWithHashAlg::new(Arc::new(PrivateKey::from_openssh(pem)?), None);
        if !stranger.handle.authenticate_publickey("kubernetes", key).await?.success() {
            bail!("stranger: user kubernetes is refused");
        }
        Ok(stranger)
    }

    /// The russh session.
    pub fn handle(&mut self) -> &mut Handle<Permissive> {
        &mut self.handle
    }

    /// Text of the authentication banner.
    #[must_use]
    pub fn banner(&self) -> String {
        self.seen.borrow().banner.clone()
    }

    /// SHA256 fingerprint of the server's host key.
    #[must_use]
    pub fn host_key(&self) -> String {
        self.seen.borrow().host_key.clone()
    }

    /// Reason in the agent's disconnect message, if one has come.
    #[must_use]
    pub fn reason(&self) -> Option<String> {
        self.seen.borrow().reason.clone()
    }

    /// Control messages so far.
    #[must_use]
    pub fn heard(&self) -> Vec<Control> {
        self.heard.borrow().clone()
    }

    /// Opens the control channel.
    ///
    /// # Errors
    /// If it is refused.
    pub async fn open_control(&mut self) -> Result<()> {
        let channel = self.handle.channel_open_session().await?;
        channel.request_subsystem(true, CONTROL_SUBSYSTEM).await?;
        let (mut read, write) = channel.split();
        let heard = self.heard.clone();
        tokio::spawn(async move {
            let mut lines = Lines::default();
            while let Some(message) = read.wait().await {
                let ChannelMsg::Data { data } = message else { continue };
                let fed = lines
                    .feed(&data, |message| heard.send_modify(|all: &mut Vec<Control>| all.push(message)));
                if fed.is_err() {
                    return;
                }
            }
        });
        self.control = Some(write);
        Ok(())
    }

    /// Opens the control channel and sends the hello.
    ///
    /// # Errors
    /// If the agent refuses it or ends the connection.
    pub async fn hello(&mut self, pod: &str) -> Result<()> {
        self.open_control().await?;
        let hello = Hello {
            version: PROTOCOL_VERSION,
            pod_id: Some(pod.to_owned()),
            outbounds: vec!["KBS".to_owned()],
            ..Hello::default()
        };
        let mut line = Vec::new();
        Control::Hello(hello).write_line(&mut line);
        self.say(line).await
    }

    /// Sends bytes on the control channel.
    ///
    /// # Errors
    /// If it is not open, or the connection has ended.
    pub async fn say(&self, bytes: Vec<u8>) -> Result<()> {
        let control = self.control.as_ref().context("stranger: no control channel")?;
        control.data_bytes(bytes).await.context("stranger: sending a control line")
    }

    /// Offers to serve a tunnel.
    ///
    /// # Errors
    /// If the agent refuses the offer.
    pub async fn offer(&mut self, tunnel: &str) -> Result<()> {
        self.handle.tcpip_forward(tunnel, 1).await.with_context(|| format!("stranger: offering {tunnel}"))?;
        Ok(())
    }

    /// Opens a stream to a tunnel of the agent.
    ///
    /// # Errors
    /// If it is refused.
    pub async fn open(&self, tunnel: &str) -> Result<ChannelStream<Msg>> {
        let channel = self.handle.channel_open_direct_tcpip(tunnel, 1, "127.0.0.1", 1).await;
        Ok(channel.with_context(|| format!("stranger: opening {tunnel}"))?.into_stream())
    }

    /// Waits for a control message, past or coming, that `wanted` accepts.
    ///
    /// # Errors
    /// If the connection ends before.
    pub async fn hears(&self, wanted: impl Fn(&Control) -> bool) -> Result<Control> {
        let mut heard = self.heard.subscribe();
        let found = async {
            tokio::select! {
                biased;
                found = heard.wait_for(|all| all.iter().any(&wanted)) => found.ok().and_then(|all| all.iter().find(|m| wanted(m)).cloned()),
                () = self.gone() => None,
            }
        };
        match timeout(PATIENCE, found).await {
            Ok(Some(message)) => Ok(message),
            ended => {
                let how = if ended.is_ok() { "the connection ended" } else { "it took too long" };
                bail!("stranger: {how} before the expected message; received {:?}", *self.heard.borrow())
            }
        }
    }

    /// Waits until the agent has ended the connection.
    ///
    /// # Errors
    /// If it does not.
    pub async fn ends(&self) -> Result<()> {
        timeout(PATIENCE, self.gone()).await.context("stranger: the agent does not end the connection")
    }

    async fn gone(&self) {
        // An error of russh means that the session has ended.
        drop(self.seen.clone().wait_for(|seen| seen.gone).await);
    }
}

/// Accepts every host key and every stream.
#[derive(Debug)]
pub struct Permissive {
    answer: Answer,
    observed: watch::Sender<Seen>,
}

impl Handler for Permissive {
    type Error = russh::Error;

    async fn auth_banner(&mut self, banner: &str, _: &mut Session) -> Result<(), russh::Error> {
        self.observed.send_modify(|seen| seen.banner.push_str(banner));
        Ok(())
    }

    async fn check_server_key(&mut self, key: &PublicKeyOrCertificate) -> Result<bool, russh::Error> {
        if let PublicKeyOrCertificate::PublicKey { key, .. } = key {
            let fingerprint = key.fingerprint(HashAlg::Sha256).to_string();
            self.observed.send_modify(|seen| seen.host_key = fingerprint);
        }
        Ok(true)
    }

    async fn server_channel_open_forwarded_tcpip(
        &mut self,
        channel: Channel<Msg>,
        _: &str,
        _: u32,
        _: &str,
        _: u32,
        reply: ChannelOpenHandle,
        _: &mut Session,
    ) -> Result<(), russh::Error> {
        // An error ends the stream.
        tokio::spawn(serve(self.answer, channel, reply));
        Ok(())
    }

    async fn disconnected(&mut self, reason: DisconnectReason<russh::Error>) -> Result<(), russh::Error> {
        self.observed.send_modify(|seen| {
            seen.gone = true;
            if let DisconnectReason::ReceivedDisconnect(info) = reason {
                seen.reason = Some(info.message);
            }
        });
        Ok(())
    }
}

async fn serve(answer: Answer, channel: Channel<Msg>, reply: ChannelOpenHandle) -> Result<()> {
    let server = match answer {
        // Dropping the reply refuses the stream.
        Answer::Refuses => return Ok(()),
        Answer::NoPlace => {
            reply.reject(ChannelOpenFailure::ResourceShortage).await;
            return Ok(());
        }
        Answer::Unanswered => {
            let _reply = reply;
            let mut channel = channel;
            while channel.wait().await.is_some() {}
            return Ok(());
        }
        Answer::Relays(server) => Some(TcpStream::connect(server).await?),
        _ => None,
    };
    reply.accept().await;
    if let Some(mut server) = server {
        server.set_nodelay(true)?;
        return finished(copy_bidirectional(&mut channel.into_stream(), &mut server).await.map(drop));
    }
    let (mut read, write) = channel.split();
    let swallow = async { while read.wait().await.is_some() {} };
    let answer = async {
        match answer {
            Answer::Closes => write.close().await?,
            Answer::Garbage => {
                write.data_bytes(b"\0\x01\x02 no HTTP at all\r\n\r\n".repeat(100)).await?;
                write.eof().await?;
                write.close().await?;
            }
            Answer::Drips => {
                write.data_bytes(&b"HTTP/1.1 200 OK\r\nx-drip: "[..]).await?;
                loop {
                    tokio::time::sleep(DRIP).await;
                    write.data_bytes(&b"x"[..]).await?;
                }
            }
            _ => std::future::pending().await,
        }
        anyhow::Ok(())
    };
    tokio::select! {
        () = swallow => Ok(()),
        answered = answer => answered,
    }
}

/// A stream that was reset has ended, too.
fn finished(copied: std::io::Result<()>) -> Result<()> {
    match copied {
        Err(error) if error.kind() != ErrorKind::ConnectionReset => Err(error.into()),
        _ => Ok(()),
    }
}
