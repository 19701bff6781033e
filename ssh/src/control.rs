//! The control channel of a connection: credits, liveness, and what the two ends tell each other.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use secure_comms_protocol::Control;
use secure_comms_protocol::control::{Bye, ControlError, Lines};
use secure_comms_protocol::limits::{KEEPALIVE, MESSAGE_COST_MIN, MESSAGE_MAX, SILENCE};
use secure_comms_tunnel::flow::PeerFlow;
use secure_comms_tunnel::link::Gone;
use secure_comms_tunnel::{Credits, Event, Receiver, Sender};
use tokio::sync::Notify;
use tokio::time::{Instant, interval, sleep_until};

/// Messages that may wait to be sent; a peer that makes us answer more than it reads loses the oldest.
const OUTBOX: usize = 64;

/// Why a control channel ended.
#[derive(Debug, PartialEq, Eq)]
pub enum ControlEnd {
    /// The peer closed it, or its connection is gone.
    Closed,
    /// The peer said why it ends the connection.
    Bye(String),
    /// The peer sent something that is no control message.
    Malformed(ControlError),
    /// The peer speaks credits and said so too late, or grants less than a message costs: its streams would never move.
    BadCredit,
    /// The peer has not answered a ping for [`SILENCE`]: it is frozen, cut off, or keeps a rekey pending (D3).
    Silent,
}

impl std::fmt::Display for ControlEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Closed => f.write_str("the control channel was closed"),
            Self::Bye(reason) => write!(f, "the peer said bye: {}", reason.escape_default()),
            Self::Malformed(error) => write!(f, "{error}"),
            Self::BadCredit => {
                f.write_str("the peer's hello came too late, or grants less credit than a message costs")
            }
            Self::Silent => write!(f, "the peer answered no ping for {} s", SILENCE.as_secs()),
        }
    }
}

/// Where messages to the peer go in.
#[derive(Clone, Debug, Default)]
pub struct Outbox(Arc<OutboxState>);

#[derive(Debug, Default)]
struct OutboxState {
    messages: Mutex<VecDeque<Control>>,
    waiting: Notify,
    said_bye: Notify,
    probe: Notify,
}

impl Outbox {
    /// Queues a message.
    pub fn send(&self, message: Control) {
        let mut messages = self.0.messages.lock().unwrap_or_else(PoisonError::into_inner);
        if messages.len() >= OUTBOX {
            messages.pop_front();
        }
        messages.push_back(message);
        drop(messages);
        self.0.waiting.notify_one();
    }

    /// Queues a `bye`.
    pub fn bye(&self, reason: &str) {
        self.send(Control::Bye(Bye { reason: reason.to_owned() }));
    }

    /// Sends a ping soon, not only when it is time for one; none while one is unanswered.
    pub fn probe(&self) {
        self.0.probe.notify_one();
    }

    /// Waits until a `bye` is on its way, with all that came before it.
    pub async fn said_bye(&self) {
        self.0.said_bye.notified().await;
    }

    /// Takes what is there; whether a `bye` was among it.
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

/// Liveness, as the pings see it.
#[derive(Debug, Default)]
struct Pings {
    /// When the oldest unanswered ping went out; none before the peer's hello: `ssh -s` answers none.
    waiting: Option<Instant>,
    enabled: bool,
    sent: u64,
    answered: u64,
}

/// Runs the control channel until it ends: sends what is in `outbox` and what `credits` give back, answers pings,
/// and calls `each` for the messages that are not flow control.
///
/// Reading and writing are two futures: while one waits for the session, the other goes on. The session may wait
/// for us to read, so we must never wait to write first.
pub async fn run<R: Receiver, S: Sender>(
    receiver: &mut R,
    sender: &S,
    credits: &Credits,
    outbox: &Outbox,
    each: impl FnMut(Control),
) -> ControlEnd {
    let pings = Mutex::new(Pings::default());
    tokio::select! {
        end = read(receiver, credits, outbox, &pings, each) => end,
        Gone = write(sender, credits, outbox) => ControlEnd::Closed,
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
            // `ssh -s < /dev/null` still wants to read.
            Some(Event::Eof) => continue,
            Some(Event::Close) | None => return ControlEnd::Closed,
        };
        let fed = lines.feed(&data, |message| match message {
            Control::Credit(credit) => credits.granted(credit),
            Control::Ping(number) => outbox.send(Control::Pong(number)),
            Control::Pong(number) => {
                lock(pings).pong(number).into_iter().for_each(|took| credits.round_trip(took))
            }
            Control::Bye(message) => end = Some(ControlEnd::Bye(message.reason)),
            Control::Hello(hello) => {
                let peer = hello.credit.map_or(PeerFlow::WindowOnly, PeerFlow::Credits);
                credits.set_peer_mode(peer);
                if hello.credit.is_some_and(|credit| credit < MESSAGE_COST_MIN || !credits.peer_mode_is(peer))
                {
                    end = Some(ControlEnd::BadCredit);
                }
                // A person at the other end of `ssh -s` answers none.
                if hello.credit.is_some() {
                    // The first at once: how far away the peer is decides how windows grow.
                    let mut pings = lock(pings);
                    pings.enabled = true;
                    pings.tick().0.into_iter().for_each(|number| outbox.send(Control::Ping(number)));
                }
                each(Control::Hello(hello));
            }
            other => each(other),
        });
        if let Err(error) = fed {
            return ControlEnd::Malformed(error);
        }
        if let Some(end) = end {
            return end;
        }
    }
}

async fn write<S: Sender>(sender: &S, credits: &Credits, outbox: &Outbox) -> Gone {
    let mut lines = Vec::new();
    loop {
        let bye = tokio::select! {
            bye = outbox.take(&mut lines) => bye,
            grants = credits.grants() => {
                grants.into_iter().for_each(|credit| Control::Credit(credit).write_line(&mut lines));
                false
            }
        };
        let mut batch = Bytes::from(std::mem::take(&mut lines));
        while !batch.is_empty() {
            let part = batch.split_to(batch.len().min(MESSAGE_MAX));
            if sender.send(part).await.is_err() {
                return Gone;
            }
        }
        if bye {
            outbox.0.said_bye.notify_one();
        }
    }
}

/// Sends pings; ends once one has gone unanswered for too long.
async fn probe(outbox: &Outbox, pings: &Mutex<Pings>) {
    let mut ticks = interval(KEEPALIVE);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = outbox.0.probe.notified() => {}
        }
        let (ping, waiting) = lock(pings).tick();
        if let Some(number) = ping {
            outbox.send(Control::Ping(number));
        }
        if waiting.is_some_and(|since| since.elapsed() + KEEPALIVE > SILENCE) {
            // One more interval for the answer, then look again.
            sleep_until(Instant::now() + KEEPALIVE).await;
            if lock(pings).waiting.is_some_and(|since| since.elapsed() >= SILENCE) {
                return;
            }
        }
    }
}

impl Pings {
    fn tick(&mut self) -> (Option<u64>, Option<Instant>) {
        if !self.enabled || self.waiting.is_some() {
            return (None, self.waiting);
        }
        self.sent += 1;
        self.waiting = Some(Instant::now());
        (Some(self.sent), None)
    }

    /// How long the answer took, if it is the one that was waited for.
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
