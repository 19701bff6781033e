//! An authenticated connection in either role, whose channels and control messages are the test's: an adaptor or an agent by
//! hand. Nothing is sent that the test does not ask for, except answers to pings and to requests.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use anyhow::{Context, Result, anyhow, bail, ensure};
use secure_comms_protocol::control::Lines;
use secure_comms_protocol::{Control, Hello, Position, StreamPosition};
use tokio::io::AsyncWriteExt;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Mutex, watch};
use tokio::task::AbortHandle;
use tokio::time::timeout;

use super::cipher::Cipher;
use super::packet::{Packet, cut, uint};
use super::{Raw, frame, message, read_packet, seal_body};
use crate::harness::scene::PATIENCE;

/// Window of our channels, in bytes: the other end never waits for more.
const WINDOW: u32 = 1 << 31;
/// Longest message on our channels, in bytes.
const MESSAGE: u32 = 32 * 1024;
/// Our first channel number, above that of the control channel.
const FIRST: u32 = 100;

/// A peer; its connection is cut when it is dropped.
pub struct RawPeer {
    shared: Arc<Shared>,
    /// The other end's number of the control channel.
    control: u32,
    next: AtomicU32,
    reader: AbortHandle,
}

struct Shared {
    is_client: bool,
    is_deaf: AtomicBool,
    out: Mutex<Out>,
    seen: watch::Sender<Seen>,
}

struct Out {
    socket: OwnedWriteHalf,
    cipher: Option<Cipher>,
    sent: u32,
}

/// Everything that came from the other end.
#[derive(Debug, Default)]
pub struct Seen {
    /// Control messages, without pings.
    pub controls: Vec<Control>,
    /// Channels that the other end wants opened.
    pub opens: Vec<Asked>,
    /// Channels by our number.
    pub channels: HashMap<u32, Channel>,
    /// Reason of the connection's end, once it has ended.
    pub end: Option<String>,
}

/// A channel that the other end wants opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    /// The other end's number.
    pub theirs: u32,
    /// Name of the tunnel.
    pub tunnel: String,
    /// Originator address.
    pub originator: String,
    /// Stream id: the originator port.
    pub stream: u32,
}

/// What came on a channel.
#[derive(Clone, Debug, Default)]
pub struct Channel {
    /// The other end's number, or its refusal.
    pub answer: Option<std::result::Result<u32, String>>,
    /// Messages, as they were cut.
    pub messages: Vec<Vec<u8>>,
    /// The end of file has come.
    pub eof: bool,
    /// The close has come.
    pub closed: bool,
}

/// An open channel.
#[derive(Clone, Copy, Debug)]
pub struct Opened {
    /// Our number.
    pub ours: u32,
    /// The other end's number.
    pub theirs: u32,
}

impl std::fmt::Debug for RawPeer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RawPeer").finish_non_exhaustive()
    }
}

impl Drop for RawPeer {
    fn drop(&mut self) {
        // With both halves of the socket: the connection ends.
        self.reader.abort();
    }
}

impl RawPeer {
    /// Opens the control channel of an authenticated connection, as a client.
    ///
    /// # Errors
    /// If the agent refuses it.
    pub async fn client(mut raw: Raw) -> Result<Self> {
        let control = raw.open_control(0).await?;
        Ok(Self::over(raw, control))
    }

    /// Grants the control channel of an authenticated connection, as a server.
    ///
    /// # Errors
    /// If the adaptor does not ask for it.
    pub async fn server(mut raw: Raw) -> Result<Self> {
        let control = raw.grant_control(0, 0).await?;
        Ok(Self::over(raw, control))
    }

    /// Opens the control channel as an adaptor, and says this hello.
    ///
    /// # Errors
    /// If the agent refuses it.
    pub async fn greet(raw: Raw, hello: Hello) -> Result<Self> {
        let peer = Self::client(raw).await?;
        peer.say(Control::Hello(hello)).await?;
        Ok(peer)
    }

    fn over(raw: Raw, control: u32) -> Self {
        let (read, socket) = raw.socket.into_split();
        let shared = Arc::new(Shared {
            is_client: raw.is_client,
            is_deaf: AtomicBool::new(false),
            out: Mutex::new(Out { socket, cipher: raw.out, sent: raw.sent }),
            seen: watch::Sender::default(),
        });
        let reading = Reading { read, incoming: raw.incoming, received: raw.received, control };
        let reader = tokio::spawn(reading.run(Arc::clone(&shared))).abort_handle();
        Self { shared, control, next: AtomicU32::new(FIRST), reader }
    }

    /// Answers no ping from now on.
    pub fn goes_deaf(&self) {
        self.shared.is_deaf.store(true, Ordering::Relaxed);
    }

    /// Looks at what has come.
    pub fn seen<T>(&self, look: impl FnOnce(&Seen) -> T) -> T {
        look(&self.shared.seen.borrow())
    }

    /// Waits until `found` finds something in what has come.
    ///
    /// # Errors
    /// If the connection ends before.
    pub async fn until<T>(&self, what: &str, found: impl Fn(&Seen) -> Option<T>) -> Result<T> {
        let mut changes = self.shared.seen.subscribe();
        let search = async {
            loop {
                {
                    let seen = changes.borrow_and_update();
                    if let Some(found) = found(&seen) {
                        return Ok(found);
                    }
                    if let Some(end) = &seen.end {
                        bail!("the connection ended: {end}; it said {:?}", seen.controls);
                    }
                }
                changes.changed().await?;
            }
        };
        let searched = timeout(PATIENCE, search).await;
        searched
            .unwrap_or_else(|_| Err(anyhow!("it did not come")))
            .with_context(|| format!("waiting for {what}"))
    }

    /// Waits for a control message, past or coming.
    ///
    /// # Errors
    /// If the connection ends before.
    pub async fn hears<T>(&self, what: &str, wanted: impl Fn(&Control) -> Option<T>) -> Result<T> {
        self.until(what, |seen| seen.controls.iter().find_map(&wanted)).await
    }

    /// Waits for the other end's hello.
    ///
    /// # Errors
    /// If the connection ends before.
    pub async fn hello(&self) -> Result<Hello> {
        let is_hello = |message: &Control| match message {
            Control::Hello(hello) => Some(hello.clone()),
            _ => None,
        };
        self.hears("a hello", is_hello).await
    }

    /// Waits for the end of the connection; returns the last `bye`, or else the reason of SSH's disconnect.
    ///
    /// # Errors
    /// If it stays.
    pub async fn ends(&self) -> Result<String> {
        let is_bye = |message: &Control| match message {
            Control::Bye(bye) => Some(bye.reason.clone()),
            _ => None,
        };
        self.until("the end of the connection", |seen| {
            let end = seen.end.clone()?;
            Some(seen.controls.iter().rev().find_map(is_bye).unwrap_or(end))
        })
        .await
    }

    /// Sends a control message.
    ///
    /// # Errors
    /// If the connection has ended.
    pub async fn say(&self, message: Control) -> Result<()> {
        let mut line = Vec::new();
        message.write_line(&mut line);
        self.say_bytes(line).await
    }

    /// Sends bytes on the control channel.
    ///
    /// # Errors
    /// If the connection has ended.
    pub async fn say_bytes(&self, bytes: impl AsRef<[u8]>) -> Result<()> {
        for part in bytes.as_ref().chunks(MESSAGE as usize / 2) {
            self.send(&Packet::data(self.control, part)).await?;
        }
        Ok(())
    }

    /// Says how far we have come with a stream.
    ///
    /// # Errors
    /// If the connection has ended.
    pub async fn position(&self, stream: u32, position: Position) -> Result<()> {
        self.say(Control::Position(StreamPosition::new(stream, position))).await
    }

    /// Sends a packet.
    ///
    /// # Errors
    /// If the connection has ended.
    pub async fn send(&self, packet: &Packet) -> Result<()> {
        self.shared.send(packet).await
    }

    /// Requests that the other end opens the streams of a tunnel to us.
    ///
    /// # Errors
    /// If the connection has ended.
    pub async fn offer(&self, tunnel: &str) -> Result<()> {
        self.send(
            &Packet::new(message::GLOBAL_REQUEST).string("tcpip-forward").byte(0).string(tunnel).uint(1),
        )
        .await
    }

    /// Asks for a channel, and does not wait; returns our number.
    ///
    /// # Errors
    /// If the connection has ended.
    pub async fn ask(&self, tunnel: &str, stream: u32, originator: impl ToString) -> Result<u32> {
        let ours = self.next.fetch_add(1, Ordering::Relaxed);
        let kind = if self.shared.is_client { "direct-tcpip" } else { "forwarded-tcpip" };
        let open = Packet::new(message::CHANNEL_OPEN).string(kind).uint(ours).uint(WINDOW).uint(MESSAGE);
        let open = open.string(tunnel).uint(1).string(originator.to_string()).uint(stream);
        self.send(&open).await?;
        Ok(ours)
    }

    /// Waits for the answer to [`Self::ask`]: the channel, or the refusal's text.
    ///
    /// # Errors
    /// If the connection ends before.
    pub async fn answer(&self, ours: u32) -> Result<std::result::Result<Opened, String>> {
        let answer =
            self.until("the answer to an open", |seen| seen.channels.get(&ours)?.answer.clone()).await?;
        Ok(answer.map(|theirs| Opened { ours, theirs }))
    }

    /// Opens a channel.
    ///
    /// # Errors
    /// If it is refused.
    pub async fn open(&self, tunnel: &str, stream: u32, originator: impl ToString) -> Result<Opened> {
        let asked = self.ask(tunnel, stream, originator).await?;
        self.answer(asked)
            .await?
            .map_err(|refusal| anyhow!("stream {stream} of {tunnel} is refused: {refusal}"))
    }

    /// Asks for a channel that must be refused; returns the refusal's text.
    ///
    /// # Errors
    /// If it is confirmed.
    pub async fn refused(&self, tunnel: &str, stream: u32, originator: impl ToString) -> Result<String> {
        let asked = self.ask(tunnel, stream, originator).await?;
        match self.answer(asked).await? {
            Ok(_) => bail!("stream {stream} of {tunnel} is not refused"),
            Err(refusal) => Ok(refusal),
        }
    }

    /// Waits for a channel that the other end wants opened.
    ///
    /// # Errors
    /// If the connection ends before.
    pub async fn asked(&self, wanted: impl Fn(&Asked) -> bool) -> Result<Asked> {
        self.until("a channel open", |seen| seen.opens.iter().find(|asked| wanted(asked)).cloned()).await
    }

    /// Confirms a channel.
    ///
    /// # Errors
    /// If the connection has ended.
    pub async fn accept(&self, asked: &Asked) -> Result<Opened> {
        let ours = self.next.fetch_add(1, Ordering::Relaxed);
        self.shared.seen.send_modify(|seen| {
            seen.channels.insert(ours, Channel { answer: Some(Ok(asked.theirs)), ..Channel::default() });
        });
        let confirmation = Packet::new(message::CHANNEL_OPEN_CONFIRMATION).uint(asked.theirs).uint(ours);
        self.send(&confirmation.uint(WINDOW).uint(MESSAGE)).await?;
        Ok(Opened { ours, theirs: asked.theirs })
    }

    /// Refuses a channel with code 1.
    ///
    /// # Errors
    /// If the connection has ended.
    pub async fn refuse(&self, asked: &Asked, why: &str) -> Result<()> {
        let failure = Packet::new(message::CHANNEL_OPEN_FAILURE).uint(asked.theirs).uint(1);
        self.send(&failure.string(why).string("")).await
    }

    /// Sends a message.
    ///
    /// # Errors
    /// If the connection has ended.
    pub async fn data(&self, channel: Opened, bytes: impl AsRef<[u8]>) -> Result<()> {
        self.send(&Packet::data(channel.theirs, bytes)).await
    }

    /// Ends our direction.
    ///
    /// # Errors
    /// If the connection has ended.
    pub async fn eof(&self, channel: Opened) -> Result<()> {
        self.send(&Packet::new(message::CHANNEL_EOF).uint(channel.theirs)).await
    }

    /// Closes a channel.
    ///
    /// # Errors
    /// If the connection has ended.
    pub async fn close(&self, channel: Opened) -> Result<()> {
        self.send(&Packet::new(message::CHANNEL_CLOSE).uint(channel.theirs)).await
    }

    /// Waits until a channel has brought `count` messages, and returns them.
    ///
    /// # Errors
    /// If it ends before.
    pub async fn messages(&self, channel: Opened, count: usize) -> Result<Vec<Vec<u8>>> {
        let what = format!("{count} messages");
        let messages = self.until(&what, |seen| {
            let channel = seen.channels.get(&channel.ours)?;
            match channel.messages.get(..count) {
                Some(messages) => Some(Ok(messages.to_vec())),
                None if channel.closed => {
                    Some(Err(anyhow!("it closed after {} messages", channel.messages.len())))
                }
                None => None,
            }
        });
        messages.await?
    }

    /// Waits until a channel has brought `count` bytes after its first `skip` messages; returns all that have come.
    ///
    /// # Errors
    /// If it ends before.
    pub async fn bytes(&self, channel: Opened, skip: usize, count: usize) -> Result<Vec<u8>> {
        let what = format!("{count} bytes");
        let bytes = self.until(&what, |seen| {
            let channel = seen.channels.get(&channel.ours)?;
            let messages = channel.messages.get(skip..).unwrap_or_default();
            match messages.iter().map(Vec::len).sum::<usize>() {
                length if length >= count => Some(Ok(messages.concat())),
                length if channel.closed => Some(Err(anyhow!("it closed after {length} bytes"))),
                _ => None,
            }
        });
        bytes.await?
    }

    /// Waits for the first message of a channel on which a stream goes on: the other end's position.
    ///
    /// # Errors
    /// If it is none.
    pub async fn first_position(&self, channel: Opened) -> Result<Position> {
        let first = self.messages(channel, 1).await?.concat();
        Position::from_bytes(&first).with_context(|| format!("the first message has {} bytes", first.len()))
    }

    /// Waits until the other end has closed a channel.
    ///
    /// # Errors
    /// If the connection ends before.
    pub async fn closes(&self, channel: Opened) -> Result<()> {
        let is_closed = |seen: &Seen| seen.channels.get(&channel.ours)?.closed.then_some(());
        self.until("the close of a channel", is_closed).await
    }

    /// Waits until the other end has answered a request of its own channel: it has taken everything that we sent before.
    ///
    /// # Errors
    /// If the connection ends before.
    pub async fn settles(&self) -> Result<()> {
        let mark = self.next.fetch_add(1, Ordering::Relaxed);
        self.say(Control::Ping(u64::from(mark))).await?;
        self.hears("a pong", |message| (*message == Control::Pong(u64::from(mark))).then_some(())).await
    }

    /// Checks that the connection still serves.
    ///
    /// # Errors
    /// If it has ended.
    pub async fn lives(&self) -> Result<()> {
        self.settles().await?;
        ensure!(self.seen(|seen| seen.end.is_none()), "the connection has ended");
        Ok(())
    }
}

impl Shared {
    async fn send(&self, packet: &Packet) -> Result<()> {
        let mut out = self.out.lock().await;
        let Out { socket, cipher, sent } = &mut *out;
        let body = frame(packet.payload(), cipher.is_some())?;
        let sealed = seal_body(cipher, sent, u32::try_from(body.len())?, body)?;
        socket.write_all(&sealed).await.context("raw peer: sending")
    }
}

struct Reading {
    read: OwnedReadHalf,
    incoming: Option<Cipher>,
    received: u32,
    control: u32,
}

impl Reading {
    async fn run(mut self, shared: Arc<Shared>) {
        let mut lines = Lines::default();
        let end = loop {
            let packet = match read_packet(&mut self.read, &mut self.incoming, &mut self.received).await {
                Ok(packet) => packet,
                Err(error) => break format!("{error:#}"),
            };
            match self.take(&shared, &mut lines, &packet).await {
                Ok(None) => {}
                Ok(Some(end)) => break end,
                Err(error) => break format!("a packet that it should not send: {error:#}"),
            }
        };
        shared.seen.send_modify(|seen| seen.end = Some(end));
    }

    /// Takes a packet; returns the reason of a disconnect.
    async fn take(&self, shared: &Shared, lines: &mut Lines, packet: &[u8]) -> Result<Option<String>> {
        let (&kind, rest) = packet.split_first().context("an empty packet")?;
        let channel = |with: &mut dyn FnMut(&mut Channel)| -> Result<()> {
            let ours = uint(rest, 0)?;
            shared.seen.send_modify(|seen| with(seen.channels.entry(ours).or_default()));
            Ok(())
        };
        match kind {
            message::DISCONNECT => {
                return Ok(Some(String::from_utf8_lossy(cut(rest.get(4..).unwrap_or_default())?.0).into()));
            }
            message::CHANNEL_DATA if uint(rest, 0)? == 0 => {
                let (data, _) = cut(rest.get(4..).unwrap_or_default())?;
                let mut messages = Vec::new();
                lines.feed(data, |message| messages.push(message)).map_err(|error| anyhow!("{error}"))?;
                for message in messages {
                    match message {
                        Control::Ping(number) if !shared.is_deaf.load(Ordering::Relaxed) => {
                            let mut line = Vec::new();
                            Control::Pong(number).write_line(&mut line);
                            shared.send(&Packet::data(self.control, line)).await?;
                        }
                        Control::Ping(_) => {}
                        message => shared.seen.send_modify(|seen| seen.controls.push(message)),
                    }
                }
            }
            message::CHANNEL_DATA => {
                let (data, _) = cut(rest.get(4..).unwrap_or_default())?;
                channel(&mut |channel| channel.messages.push(data.to_vec()))?;
            }
            message::CHANNEL_EOF => channel(&mut |channel| channel.eof = true)?,
            message::CHANNEL_CLOSE => channel(&mut |channel| channel.closed = true)?,
            message::CHANNEL_OPEN_CONFIRMATION => {
                let theirs = uint(rest, 4)?;
                channel(&mut |channel| channel.answer = Some(Ok(theirs)))?;
            }
            message::CHANNEL_OPEN_FAILURE => {
                let text = String::from_utf8_lossy(cut(rest.get(8..).unwrap_or_default())?.0).into_owned();
                channel(&mut |channel| channel.answer = Some(Err(text.clone())))?;
            }
            message::CHANNEL_OPEN => {
                let (_, rest) = cut(rest)?;
                let theirs = uint(rest, 0)?;
                let (tunnel, rest) = cut(rest.get(12..).unwrap_or_default())?;
                let (originator, rest) = cut(rest.get(4..).unwrap_or_default())?;
                let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
                let asked = Asked {
                    theirs,
                    tunnel: text(tunnel),
                    originator: text(originator),
                    stream: uint(rest, 0)?,
                };
                shared.seen.send_modify(|seen| seen.opens.push(asked));
            }
            message::GLOBAL_REQUEST => {
                let (name, rest) = cut(rest)?;
                if rest.first() == Some(&1) {
                    let is_forward = name == b"tcpip-forward";
                    let answer = if is_forward { message::REQUEST_SUCCESS } else { message::REQUEST_FAILURE };
                    shared.send(&Packet::new(answer)).await?;
                }
            }
            _ => {}
        }
        Ok(None)
    }
}
