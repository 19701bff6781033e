//! Deadlines of KBS streams: for the first byte, and for a pause after it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use secure_comms_protocol::{RefusalReason, TunnelName};
use secure_comms_tunnel::link::Gone;
use secure_comms_tunnel::session::{SessionReceiver, SessionSender};
use secure_comms_tunnel::{Event, Link, OpenError, Receiver, Sender, Stream};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, timeout_at};

use super::link::{PeerLink, PeerReceiver, PeerSender};

/// Timeouts of the KBS streams of an attempt, and who is notified of a missed deadline.
#[derive(Clone, Debug)]
pub(crate) struct KbsDeadlines {
    /// Longest time from the open to the first byte.
    pub(crate) first_byte: Duration,
    /// Longest pause after that, in both directions.
    pub(crate) pause: Duration,
    /// Notified when a stream missed its first byte.
    pub(crate) silent: Arc<Notify>,
    /// Set when a stream was closed for a pause.
    pub(crate) paused: Arc<AtomicBool>,
    /// How far the streams have come.
    pub(crate) first: Arc<watch::Sender<FirstByte>>,
}

/// The first byte of an attempt's streams.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum FirstByte {
    /// No stream was opened.
    #[default]
    Unasked,
    /// The first stream was opened then.
    Asked(Instant),
    /// A stream has brought a byte.
    Arrived,
}

impl KbsDeadlines {
    /// Waits until the peer has brought no byte for this long since it was asked. Never returns once it has brought one.
    pub(crate) async fn silent_for(&self, limit: Duration) {
        let mut first = self.first.subscribe();
        loop {
            let now = *first.borrow_and_update();
            let due = match now {
                FirstByte::Asked(at) => at + limit,
                FirstByte::Arrived => return std::future::pending().await,
                // Nothing to wait for but the change.
                FirstByte::Unasked => {
                    if first.changed().await.is_err() {
                        return std::future::pending().await;
                    }
                    continue;
                }
            };
            if timeout_at(due, first.changed()).await.is_err() {
                return;
            }
        }
    }
}

/// The deadline of a stream; both halves move it.
type SharedDeadline = Arc<watch::Sender<Deadline>>;

#[derive(Clone, Copy, Debug)]
enum Deadline {
    FirstByte(Instant),
    NextByte(Instant),
}

impl Deadline {
    fn at(self) -> Instant {
        match self {
            Self::FirstByte(at) | Self::NextByte(at) => at,
        }
    }
}

/// Waits until the deadline has passed without being moved.
async fn deadline_elapsed(deadline: &SharedDeadline) -> Deadline {
    let mut changes = deadline.subscribe();
    loop {
        let due = *changes.borrow_and_update();
        // It can't be closed: the receiver holds a sender too.
        if timeout_at(due.at(), changes.changed()).await.is_err() {
            return due;
        }
    }
}

/// A stream without deadlines.
pub(super) fn unlimited<R: Into<AnyReceiver>, S: Into<AnySender>>(
    Stream { receiver, sender, flow }: Stream<R, S>,
) -> Stream<DeadlineReceiver, DeadlineSender> {
    Stream {
        receiver: DeadlineReceiver { receiver: receiver.into(), deadlines: None },
        sender: DeadlineSender { sender: sender.into(), pause: None },
        flow,
    }
}

/// Opens a stream with deadlines. The time that the open takes counts.
pub(super) async fn open_with_deadlines(
    link: &PeerLink,
    name: &TunnelName,
    deadlines: &KbsDeadlines,
) -> Result<Stream<DeadlineReceiver, DeadlineSender>, OpenError> {
    let now = Instant::now();
    deadlines.first.send_if_modified(|first| {
        let fresh = *first == FirstByte::Unasked;
        if fresh {
            *first = FirstByte::Asked(now);
        }
        fresh
    });
    let first = now + deadlines.first_byte;
    let Stream { receiver, sender, flow } = match timeout_at(first, link.open(name)).await {
        // Refused, so that the guest tries again and the time goes on: a peer that has no place, try after try, is as silent as one
        // that does not answer.
        Ok(Err(OpenError::Full)) => {
            return Err(OpenError::Refused(RefusalReason::TooManyStreams.to_string()));
        }
        Ok(opened) => opened?,
        Err(_) => {
            deadlines.silent.notify_one();
            return Err(OpenError::Refused("the attestation peer does not answer".into()));
        }
    };
    let deadline = Arc::new(watch::Sender::new(Deadline::FirstByte(first)));
    Ok(Stream {
        receiver: DeadlineReceiver {
            receiver: receiver.into(),
            deadlines: Some((deadline.clone(), deadlines.clone())),
        },
        sender: DeadlineSender { sender: sender.into(), pause: Some((deadline, deadlines.pause)) },
        flow,
    })
}

/// Receives on a stream: one type, so that the relay exists once in the program.
#[derive(Debug)]
pub(crate) enum AnyReceiver {
    /// Of one connection.
    Peer(PeerReceiver),
    /// Of a session.
    Session(SessionReceiver<PeerLink>),
}

impl From<PeerReceiver> for AnyReceiver {
    fn from(receiver: PeerReceiver) -> Self {
        Self::Peer(receiver)
    }
}

impl From<SessionReceiver<PeerLink>> for AnyReceiver {
    fn from(receiver: SessionReceiver<PeerLink>) -> Self {
        Self::Session(receiver)
    }
}

impl Receiver for AnyReceiver {
    async fn recv(&mut self) -> Option<Event> {
        match self {
            Self::Peer(receiver) => receiver.recv().await,
            Self::Session(receiver) => receiver.recv().await,
        }
    }
}

/// Sends on a stream.
#[derive(Debug)]
pub(crate) enum AnySender {
    /// Of one connection.
    Peer(PeerSender),
    /// Of a session.
    Session(SessionSender<PeerLink>),
}

impl From<PeerSender> for AnySender {
    fn from(sender: PeerSender) -> Self {
        Self::Peer(sender)
    }
}

impl From<SessionSender<PeerLink>> for AnySender {
    fn from(sender: SessionSender<PeerLink>) -> Self {
        Self::Session(sender)
    }
}

impl Sender for AnySender {
    async fn send(&self, data: Bytes) -> Result<(), Gone> {
        match self {
            Self::Peer(sender) => sender.send(data).await,
            Self::Session(sender) => sender.send(data).await,
        }
    }

    async fn eof(&self) -> Result<(), Gone> {
        match self {
            Self::Peer(sender) => sender.eof().await,
            Self::Session(sender) => sender.eof().await,
        }
    }

    async fn close(&self) -> Result<(), Gone> {
        match self {
            Self::Peer(sender) => sender.close().await,
            Self::Session(sender) => sender.close().await,
        }
    }
}

/// Receives on a stream, and closes it when a deadline passes. The peer is to blame for a missing first byte. A later
/// pause may also be the guest's: it finds a closed connection then, and asks again or fails at once.
#[derive(Debug)]
pub(crate) struct DeadlineReceiver {
    receiver: AnyReceiver,
    deadlines: Option<(SharedDeadline, KbsDeadlines)>,
}

impl Receiver for DeadlineReceiver {
    async fn recv(&mut self) -> Option<Event> {
        let Some((deadline, limits)) = &self.deadlines else { return self.receiver.recv().await };
        tokio::select! {
            biased;
            event = self.receiver.recv() => {
                let had_bytes = matches!(*deadline.borrow(), Deadline::NextByte(_));
                if !had_bytes && matches!(event, Some(Event::Data(_))) {
                    limits.first.send_replace(FirstByte::Arrived);
                }
                deadline.send_replace(Deadline::NextByte(Instant::now() + limits.pause));
                event
            }
            due = deadline_elapsed(deadline) => {
                match due {
                    Deadline::FirstByte(_) => limits.silent.notify_one(),
                    Deadline::NextByte(_) => limits.paused.store(true, Ordering::Relaxed),
                }
                Some(Event::Close)
            }
        }
    }
}

/// Sends on a stream. Sent data ends a pause, but does not count as the first byte.
#[derive(Debug)]
pub(crate) struct DeadlineSender {
    sender: AnySender,
    pause: Option<(SharedDeadline, Duration)>,
}

impl Sender for DeadlineSender {
    async fn send(&self, data: Bytes) -> Result<(), Gone> {
        if let Some((deadline, pause)) = &self.pause {
            deadline.send_if_modified(|due| match due {
                Deadline::FirstByte(_) => false,
                Deadline::NextByte(at) => {
                    *at = Instant::now() + *pause;
                    true
                }
            });
        }
        self.sender.send(data).await
    }

    async fn eof(&self) -> Result<(), Gone> {
        self.sender.eof().await
    }

    async fn close(&self) -> Result<(), Gone> {
        self.sender.close().await
    }
}
