//! The control channel of a connection: credits, liveness, and the other control messages.

use std::collections::VecDeque;
use std::fmt::Debug;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use secure_comms_protocol::Control;
use secure_comms_protocol::control::{Bye, ControlError, Lines, StreamPosition};
use secure_comms_protocol::limits::{KEEPALIVE, MESSAGE_COST_MIN, MESSAGE_MAX, SILENCE};
use secure_comms_tunnel::flow::{LaneNumber, PeerFlow};
use secure_comms_tunnel::link::Gone;
use secure_comms_tunnel::session::{Channels, Session};
use secure_comms_tunnel::{Credits, Event, Receiver, Sender};
use tokio::sync::Notify;
use tokio::time::{Instant, interval, sleep_until};

/// Messages that may wait to be sent. If a peer causes more answers than it reads, the oldest are dropped.
const OUTBOX: usize = 64;

/// How a control channel ended.
#[derive(Debug, PartialEq, Eq)]
pub enum ControlEnd {
    /// The peer closed it, or its connection is gone.
    Closed,
    /// The peer sent `bye`.
    Bye(Bye),
    /// The peer sent bytes that are not a control message.
    Malformed(ControlError),
    /// The peer announced credits too late, or grants less than a message costs, so that its streams would never move.
    BadCredit,
    /// The peer said a position that can't be so, and its session has ended; with the reason.
    Lie(String),
    /// The peer has not answered a ping for [`SILENCE`]. It is frozen or unreachable, or keeps a rekey pending (D3).
    Silent,
}

impl std::fmt::Display for ControlEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Closed => f.write_str("the control channel was closed"),
            Self::Bye(bye) => write!(f, "the peer said bye: {}", bye.reason.escape_default()),
            Self::Malformed(error) => write!(f, "{error}"),
            Self::Lie(reason) => f.write_str(reason),
            Self::BadCredit => {
                f.write_str("the peer's hello came too late, or grants less credit than a message costs")
            }
            Self::Silent => write!(f, "the peer answered no ping for {} s", SILENCE.as_secs()),
        }
    }
}

/// Queue of the messages to the peer.
#[derive(Clone, Debug, Default)]
pub struct Outbox(Arc<OutboxState>);

/// The flow control of a session, as the control channel of one of its connections needs it.
pub trait SessionControl: Debug + Send + Sync {
    /// Takes a position that the peer has said.
    ///
    /// # Errors
    /// It can't be so, and the session has ended; with the reason.
    fn on_position(&self, said: StreamPosition) -> Result<(), String>;
    /// Waits for positions to say on the connection. Cancellation safe.
    fn positions(&self) -> Pin<Box<dyn Future<Output = Vec<StreamPosition>> + Send + '_>>;
    /// Positions that are due although no credit is given back.
    fn unsaid_positions(&self) -> Vec<StreamPosition>;
    /// A ping is about to be sent on the connection.
    fn pinged(&self);
    /// The ping was answered, after this time.
    fn ponged(&self, took: Duration);
}

/// A connection of a session.
#[derive(Debug)]
struct Joined<C: Channels> {
    session: Session<C>,
    number: LaneNumber,
}

impl<C: Channels> SessionControl for Joined<C> {
    fn on_position(&self, said: StreamPosition) -> Result<(), String> {
        self.session.on_position(said)
    }

    fn positions(&self) -> Pin<Box<dyn Future<Output = Vec<StreamPosition>> + Send + '_>> {
        Box::pin(self.session.positions(self.number))
    }

    fn unsaid_positions(&self) -> Vec<StreamPosition> {
        self.session.unsaid_positions(self.number)
    }

    fn pinged(&self) {
        self.session.pinged(self.number);
    }

    fn ponged(&self, took: Duration) {
        self.session.credits().round_trip(took);
        self.session.ponged(self.number);
    }
}

#[derive(Debug, Default)]
struct OutboxState {
    messages: Mutex<VecDeque<Control>>,
    /// The session that the connection belongs to, once that is known.
    session: OnceLock<Box<dyn SessionControl>>,
    joined: Notify,
    waiting: Notify,
    said_bye: Notify,
    probe: Arc<Notify>,
}

impl Outbox {
    /// Queues a message. The oldest message is dropped if the queue is full.
    pub fn send(&self, message: Control) {
        let mut messages = self.0.messages.lock().unwrap_or_else(PoisonError::into_inner);
        if messages.len() >= OUTBOX {
            messages.pop_front();
        }
        messages.push_back(message);
        drop(messages);
        self.0.waiting.notify_one();
    }

    /// Queues a message that may wait, such as a line of a log, unless half of the queue is taken; whether it was queued.
    pub fn send_if_room(&self, message: Control) -> bool {
        let has_room = self.0.messages.lock().unwrap_or_else(PoisonError::into_inner).len() < OUTBOX / 2;
        if has_room {
            self.send(message);
        }
        has_room
    }

    /// Queues a `bye` that ends the connection alone.
    pub fn bye(&self, reason: &str) {
        self.send(Control::Bye(Bye { reason: reason.to_owned(), ends_session: false }));
    }

    /// Queues a `bye` that ends the session.
    pub fn bye_session(&self, reason: &str) {
        self.send(Control::Bye(Bye { reason: reason.to_owned(), ends_session: true }));
    }

    /// Makes the control channel carry the positions of a session: this connection is its lane of that number. Only the first
    /// call has an effect.
    pub fn join<C: Channels>(&self, session: Session<C>, number: LaneNumber) {
        session.probe_with(number, self.0.probe.clone());
        self.0.session.get_or_init(|| Box::new(Joined { session, number }));
        self.0.joined.notify_one();
    }

    fn session(&self) -> Option<&dyn SessionControl> {
        self.0.session.get().map(AsRef::as_ref)
    }

    /// Waits for positions of the session to say. Only one task may wait. Cancellation safe.
    async fn positions(&self) -> Vec<StreamPosition> {
        loop {
            if let Some(session) = self.session() {
                return session.positions().await;
            }
            self.0.joined.notified().await;
        }
    }

    /// Requests a ping before the next regular one. No ping is sent while one is unanswered.
    pub fn probe(&self) {
        self.0.probe.notify_one();
    }

    /// Waits until a `bye`, and all messages before it, were passed to the session. Cancellation safe.
    pub async fn said_bye(&self) {
        self.0.said_bye.notified().await;
    }

    /// Waits for messages and appends them to `lines`; returns whether one was a `bye`.
    async fn take(&self, lines: &mut Vec<u8>) -> bool {
        loop {
            let messages =
                std::mem::take(&mut *self.0.messages.lock().unwrap_or_else(PoisonError::into_inner));
            if !messages.is_empty() {
                messages.iter().for_each(|message| message.write_line(lines));
                return messages.iter().any(|message| matches!(message, Control::Bye(_)));
            }
            self.0.waiting.notified().await;
        }
    }
}

/// Liveness of the peer, by pings.
#[derive(Debug, Default)]
struct Pings {
    /// Time of the oldest unanswered ping.
    waiting: Option<Instant>,
    /// Whether the peer's hello announced credits. A person at `ssh -s` answers no pings.
    enabled: bool,
    sent: u64,
    answered: u64,
}

/// Runs the control channel until it ends. Sends the messages of `outbox` and the credit that `credits` give back,
/// answers pings, and calls `each` for the messages that are not flow control.
///
/// Reading and writing are two futures, so that one continues while the other waits for the session. The session may
/// wait for us to read (D1), so a pending write must never block reading.
///
/// Dropping the future loses the messages that were taken from `outbox` and not sent; the channel can't be run again.
pub async fn run<R: Receiver, S: Sender>(
    receiver: &mut R,
    sender: &S,
    credits: &Credits,
    outbox: &Outbox,
    each: impl FnMut(Control),
) -> ControlEnd {
    let pings = Mutex::new(Pings::default());
    let mut reading = pin!(read(receiver, credits, outbox, &pings, each));
    tokio::select! {
        end = &mut reading => end,
        // What arrived before the end counts, a bye above all. The channel ends after it.
        Gone = write(sender, credits, outbox) => reading.await,
        () = probe(outbox, &pings) => ControlEnd::Silent,
    }
}

async fn read<R: Receiver>(
    receiver: &mut R,
    credits: &Credits,
    outbox: &Outbox,
    pings: &Mutex<Pings>,
    mut each: impl FnMut(Control),
) -> ControlEnd {
    let mut lines = Lines::default();
    let mut end = None;
    loop {
        let data = match receiver.recv().await {
            Some(Event::Data(data)) => data,
            // `ssh -s < /dev/null` still reads.
            Some(Event::Eof) => continue,
            Some(Event::Close) | None => return ControlEnd::Closed,
        };
        let fed = lines.feed(&data, |message| {
            if let Some(message_end) = on_message(&message, credits, outbox, pings) {
                end = Some(message_end);
            }
            if is_for_caller(&message) {
                each(message);
            }
        });
        if let Err(error) = fed {
            return ControlEnd::Malformed(error);
        }
        if let Some(end) = end {
            return end;
        }
    }
}

/// Whether the caller of [`run`] handles the message; flow control, liveness and `bye` end here.
fn is_for_caller(message: &Control) -> bool {
    match message {
        Control::Hello(_)
        | Control::Keys(_)
        | Control::Upgrade(_)
        | Control::Log(_)
        | Control::Session(_)
        | Control::Streams(_)
        | Control::Lane(_) => true,
        Control::Credit(_) | Control::Position(_) | Control::Ping(_) | Control::Pong(_) | Control::Bye(_) => {
            false
        }
    }
}

/// Handles flow control and liveness; returns an end if the message ends the channel.
fn on_message(
    message: &Control,
    credits: &Credits,
    outbox: &Outbox,
    pings: &Mutex<Pings>,
) -> Option<ControlEnd> {
    match message {
        Control::Credit(credit) => credits.granted(*credit),
        Control::Ping(number) => outbox.send(Control::Pong(*number)),
        Control::Pong(number) => {
            if let Some(took) = lock(pings).pong(*number) {
                credits.round_trip(took);
                if let Some(session) = outbox.session() {
                    session.ponged(took);
                }
            }
        }
        Control::Bye(message) => return Some(ControlEnd::Bye(message.clone())),
        Control::Hello(hello) => return on_hello(hello.credit, credits, outbox, pings),
        Control::Keys(_)
        | Control::Upgrade(_)
        | Control::Log(_)
        | Control::Session(_)
        | Control::Streams(_)
        | Control::Lane(_) => {}
        Control::Position(said) => {
            return outbox.session()?.on_position(*said).err().map(ControlEnd::Lie);
        }
    }
    None
}

/// Sets the peer's flow control from the `credit` of its hello, and starts pings if it has one.
fn on_hello(
    credit: Option<u32>,
    credits: &Credits,
    outbox: &Outbox,
    pings: &Mutex<Pings>,
) -> Option<ControlEnd> {
    let peer = credit.map_or(PeerFlow::WindowOnly, PeerFlow::Credits);
    credits.set_peer_mode(peer);
    // A person at the other end of `ssh -s` announces no credit, and answers no pings.
    let credit = credit?;
    {
        // The first ping at once: windows grow by the measured round trip.
        let mut pings = lock(pings);
        pings.enabled = true;
        if let Some(number) = pings.tick().0 {
            outbox.send(Control::Ping(number));
        }
    }
    (credit < MESSAGE_COST_MIN || !credits.peer_mode_is(peer)).then_some(ControlEnd::BadCredit)
}

async fn write<S: Sender>(sender: &S, credits: &Credits, outbox: &Outbox) -> Gone {
    let mut lines = Vec::new();
    let (mut unsaid, mut said_bye) = (interval(KEEPALIVE), false);
    loop {
        let positions = tokio::select! {
            positions = outbox.positions() => positions,
            bye = outbox.take(&mut lines) => {
                said_bye = bye;
                Vec::new()
            }
            grants = credits.grants(LaneNumber::ALONE) => {
                grants.into_iter().for_each(|credit| Control::Credit(credit).write_line(&mut lines));
                Vec::new()
            }
            _ = unsaid.tick() => outbox.session().map(SessionControl::unsaid_positions).unwrap_or_default(),
        };
        positions.into_iter().for_each(|said| Control::Position(said).write_line(&mut lines));
        let mut batch = Bytes::from(std::mem::take(&mut lines));
        while !batch.is_empty() {
            let part = batch.split_to(batch.len().min(MESSAGE_MAX));
            if sender.send(part).await.is_err() {
                return Gone;
            }
        }
        if std::mem::take(&mut said_bye) {
            outbox.0.said_bye.notify_one();
        }
    }
}

/// Sends pings; returns once one was unanswered for [`SILENCE`].
async fn probe(outbox: &Outbox, pings: &Mutex<Pings>) {
    let mut ticks = interval(KEEPALIVE);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = outbox.0.probe.notified() => {}
        }
        let (ping, waiting) = lock(pings).tick();
        if let Some(number) = ping {
            if let Some(session) = outbox.session() {
                session.pinged();
            }
            outbox.send(Control::Ping(number));
        }
        if waiting.is_some_and(|since| since.elapsed() + KEEPALIVE > SILENCE) {
            // One more interval for the answer, then check again.
            sleep_until(Instant::now() + KEEPALIVE).await;
            if lock(pings).waiting.is_some_and(|since| since.elapsed() >= SILENCE) {
                return;
            }
        }
    }
}

impl Pings {
    /// Number of the ping to send now, if one is due; otherwise the time of the unanswered one.
    fn tick(&mut self) -> (Option<u64>, Option<Instant>) {
        if !self.enabled || self.waiting.is_some() {
            return (None, self.waiting);
        }
        self.sent += 1;
        self.waiting = Some(Instant::now());
        (Some(self.sent), None)
    }

    /// Time from the ping to this pong, if it answers the latest ping.
    fn pong(&mut self, number: u64) -> Option<Duration> {
        if number != self.sent || number <= self.answered {
            return None;
        }
        self.answered = number;
        self.waiting.take().map(|since| since.elapsed())
    }
}

fn lock(pings: &Mutex<Pings>) -> std::sync::MutexGuard<'_, Pings> {
    pings.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_wait_leaves_half_of_the_queue_to_the_rest() {
        let outbox = Outbox::default();
        outbox.send(Control::Ping(0));
        let queued = (1..1000).filter(|number| outbox.send_if_room(Control::Ping(*number))).count();
        assert_eq!(queued, OUTBOX / 2 - 1);
        for number in 0..OUTBOX as u64 / 2 {
            outbox.send(Control::Pong(number));
        }
        let messages = outbox.0.messages.lock().unwrap();
        assert_eq!(messages.front(), Some(&Control::Ping(0)), "nothing was dropped");
    }
}
