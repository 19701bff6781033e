//! Somebody in the network between the two ends: an SSH client that obeys nobody.
//!
//! [`Stranger`] speaks through russh's client and takes whatever it gets; [`raw`] sends any packet at all.

pub mod raw;

use std::io::ErrorKind;
use std::net::{Shutdown, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use russh::client::{self, ChannelOpenHandle, DisconnectReason, Handle, Handler, Msg, Session};
use russh::keys::{HashAlg, PrivateKey, PrivateKeyWithHashAlg, PublicKeyOrCertificate};
use russh::{Channel, ChannelMsg, ChannelStream, ChannelWriteHalf};
use secure_comms_protocol::Control;
use secure_comms_protocol::Hello;
use secure_comms_protocol::control::Lines;
use secure_comms_protocol::limits::{CONTROL_SUBSYSTEM, PROTOCOL_VERSION};
use tokio::io::copy_bidirectional;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::scene::PATIENCE;

/// How long a dripping answer waits between two bytes: each comes well within every limit on silence.
const DRIP: Duration = Duration::from_secs(1);

/// What a stranger does with the streams that the agent opens to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Leaves the channel open unanswered.
    Unanswered,
    /// Refuses it.
    Refuses,
    /// Takes it and says nothing.
    Silent,
    /// Takes it and closes it.
    Closes,
    /// Takes it and sends what is no HTTP.
    Garbage,
    /// Takes it and sends an endless answer, a byte at a time.
    Drips,
    /// Takes it to this server: the real KBS, or one of its own.
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

/// What its handler has seen.
#[derive(Clone, Debug, Default)]
struct Seen {
    banner: String,
    host_key: String,
    gone: bool,
}

impl std::fmt::Debug for Stranger {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stranger").finish_non_exhaustive()
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        // Its session may live on as long as one of its channels does. A socket that is gone can't be shut.
        drop(self.socket.shutdown(Shutdown::Both));
    }
}

impl Stranger {
    /// Connects, up to the point where a user name is asked for.
    ///
    /// # Errors
    /// The agent does not let it come so far.
    pub async fn connect(agent: SocketAddr, answer: Answer) -> Result<Self> {
        let socket = TcpStream::connect(agent).await.context("stranger: connecting")?.into_std()?;
        let own = socket.try_clone().context("stranger: sharing the socket")?;
        let (told, seen) = watch::channel(Seen::default());
        let handler = Permissive { answer, told };
        let config = Arc::new(client::Config { nodelay: true, ..client::Config::default() });
        let session = client::connect_stream(config, TcpStream::from_std(socket)?, handler);
        let handle =
            timeout(PATIENCE, session).await.context("stranger: key exchange")?.context("stranger")?;
        Ok(Self { handle, socket: own, seen, heard: watch::Sender::default(), control: None })
    }

    /// Connects as an attestation peer.
    ///
    /// # Errors
    /// It is refused.
    pub async fn attestation(agent: SocketAddr, answer: Answer) -> Result<Self> {
        let mut stranger = Self::connect(agent, answer).await?;
        if !stranger.handle.authenticate_none("attestation").await?.success() {
            bail!("stranger: user attestation is refused");
        }
        Ok(stranger)
    }

    /// An attestation peer that says it drives `pod` and offers the KBS.
    ///
    /// # Errors
    /// It is refused or cut.
    pub async fn attest(agent: SocketAddr, pod: &str, answer: Answer) -> Result<Self> {
        let mut stranger = Self::attestation(agent, answer).await?;
        stranger.offer("KBS").await?;
        stranger.hello(pod).await?;
        Ok(stranger)
    }

    /// Connects as the worker node that holds this private key.
    ///
    /// # Errors
    /// It is refused.
    pub async fn kubernetes(agent: SocketAddr, key: &Path) -> Result<Self> {
        let mut stranger = Self::connect(agent, Answer::Refuses).await?;
        let pem = std::fs::read_to_string(key).with_context(|| format!("reading {}", key.display()))?;
        let key = PrivateKeyWithHashAlg::new(Arc::new(PrivateKey::from_openssh(pem)?), None);
        if !stranger.handle.authenticate_publickey("kubernetes", key).await?.success() {
            bail!("stranger: user kubernetes is refused");
        }
        Ok(stranger)
    }

    /// The session as russh has it.
    pub fn handle(&mut self) -> &mut Handle<Permissive> {
        &mut self.handle
    }

    /// What the agent said before authentication.
    #[must_use]
    pub fn banner(&self) -> String {
        self.seen.borrow().banner.clone()
    }

    /// The SHA256 fingerprint of the host key that it was shown.
    #[must_use]
    pub fn host_key(&self) -> String {
        self.seen.borrow().host_key.clone()
    }

    /// Opens the control channel.
    ///
    /// # Errors
    /// It is refused.
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

    /// Opens the control channel and says hello.
    ///
    /// # Errors
    /// It is refused or cut.
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
    /// There is none, or the connection is gone.
    pub async fn say(&self, bytes: Vec<u8>) -> Result<()> {
        let control = self.control.as_ref().context("stranger: no control channel")?;
        control.data_bytes(bytes).await.context("stranger: sending a control line")
    }

    /// Offers to serve a tunnel.
    ///
    /// # Errors
    /// The agent does not want it.
    pub async fn offer(&mut self, tunnel: &str) -> Result<()> {
        self.handle.tcpip_forward(tunnel, 1).await.with_context(|| format!("stranger: offering {tunnel}"))?;
        Ok(())
    }

    /// Opens a stream to a tunnel of the agent.
    ///
    /// # Errors
    /// It is refused.
    pub async fn open(&self, tunnel: &str) -> Result<ChannelStream<Msg>> {
        let channel = self.handle.channel_open_direct_tcpip(tunnel, 1, "127.0.0.1", 1).await;
        Ok(channel.with_context(|| format!("stranger: opening {tunnel}"))?.into_stream())
    }

    /// Waits for a control message, past or coming, that `wanted` accepts.
    ///
    /// # Errors
    /// The connection ends without it.
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
                bail!("stranger: {how} before the message waited for; heard {:?}", *self.heard.borrow())
            }
        }
    }

    /// Waits until the agent has ended the connection.
    ///
    /// # Errors
    /// It does not.
    pub async fn ends(&self) -> Result<()> {
        timeout(PATIENCE, self.gone()).await.context("stranger: the connection stays")
    }

    async fn gone(&self) {
        // An error is the end of the handler.
        drop(self.seen.clone().wait_for(|seen| seen.gone).await);
    }
}

/// Takes every host key and every stream.
#[derive(Debug)]
pub struct Permissive {
    answer: Answer,
    told: watch::Sender<Seen>,
}

impl Handler for Permissive {
    type Error = russh::Error;

    async fn auth_banner(&mut self, banner: &str, _: &mut Session) -> Result<(), russh::Error> {
        self.told.send_modify(|seen| seen.banner.push_str(banner));
        Ok(())
    }

    async fn check_server_key(&mut self, key: &PublicKeyOrCertificate) -> Result<bool, russh::Error> {
        if let PublicKeyOrCertificate::PublicKey { key, .. } = key {
            let fingerprint = key.fingerprint(HashAlg::Sha256).to_string();
            self.told.send_modify(|seen| seen.host_key = fingerprint);
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
        // An error is the end of the stream.
        tokio::spawn(serve(self.answer, channel, reply));
        Ok(())
    }

    async fn disconnected(&mut self, _: DisconnectReason<russh::Error>) -> Result<(), russh::Error> {
        self.told.send_modify(|seen| seen.gone = true);
        Ok(())
    }
}

async fn serve(answer: Answer, channel: Channel<Msg>, reply: ChannelOpenHandle) -> Result<()> {
    let server = match answer {
        // A reply that is dropped is a refusal.
        Answer::Refuses => return Ok(()),
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

/// A stream that was reset has ended too.
fn finished(copied: std::io::Result<()>) -> Result<()> {
    match copied {
        Err(error) if error.kind() != ErrorKind::ConnectionReset => Err(error.into()),
        _ => Ok(()),
    }
}
