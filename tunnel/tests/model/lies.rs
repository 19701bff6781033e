//! One end of a stream against a peer that says and sends anything: the peer's lies are errors, its truths are not, and what
//! it can make an end keep is bounded.

use bytes::Bytes;
use secure_comms_protocol::limits::MESSAGE_MAX;
use secure_comms_tunnel::flow::cost;
use secure_comms_tunnel::session::stream::{Lie, StreamState, Transmit};

/// Numbers of an untrusted peer.
pub(crate) struct Numbers<'a>(pub(crate) &'a [u8]);

impl Numbers<'_> {
    fn next(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }
}

/// What an end must have sent and received, kept without its tricks: all that was ever written.
#[derive(Default)]
struct Expected {
    messages: Vec<usize>,
    has_ended: bool,
    has_closed: bool,
    /// The most that a channel was given: messages, and whether the end.
    passed: usize,
    end_passed: bool,
    /// Messages that were passed to the current channel, and whether the end was.
    on_channel: usize,
    end_on_channel: bool,
    close_on_channel: bool,
    acknowledged: u64,
    received: u64,
    got_eof: bool,
    got_close: bool,
}

impl Expected {
    /// Position after this many messages.
    fn after(&self, messages: usize) -> u64 {
        self.messages[..messages].iter().map(|len| *len as u64).sum()
    }

    /// The number of messages that end at this position or before it.
    fn ended_by(&self, position: u64) -> usize {
        (0..=self.messages.len()).rev().find(|count| self.after(*count) <= position).unwrap_or(0)
    }

    fn sent(&self) -> u64 {
        self.after(self.passed) + u64::from(self.end_passed)
    }

    fn kept(&self) -> u64 {
        let from = if self.got_close { self.messages.len() } else { self.ended_by(self.acknowledged) };
        self.messages[from..].iter().map(|len| u64::from(cost(*len))).sum()
    }

    /// What the end must answer to a position.
    fn judge(&self, received: u64, attaches: bool) -> Result<(), Lie> {
        let sent = self.sent();
        if attaches && received < self.acknowledged {
            return Err(Lie::Before { received, acknowledged: self.acknowledged });
        }
        if received > sent {
            return Err(Lie::Beyond { received, sent });
        }
        let whole = self.after(self.ended_by(received)) == received;
        // After a close nothing is kept, so no message has an inside.
        if received > self.acknowledged
            && !whole
            && received != self.after(self.messages.len()) + 1
            && !self.got_close
        {
            return Err(Lie::Inside(received));
        }
        Ok(())
    }
}

/// Lets the peer do what the bytes say, up to its first lie.
pub(crate) fn exercise(mut numbers: Numbers<'_>) {
    let (mut end, mut expected) = (StreamState::default(), Expected::default());
    while let Some(what) = numbers.next() {
        let Some(number) = numbers.next() else { return };
        if step(&mut end, &mut expected, what, number).is_err() {
            return;
        }
        assert_eq!(end.received(), expected.received);
        assert_eq!(end.kept_cost(), expected.kept(), "it keeps what the peer has, or lost what it has not");
        assert_eq!(end.is_closed_there(), expected.got_close);
        assert_eq!(end.is_over(), expected.got_close && expected.has_closed);
    }
}

fn step(end: &mut StreamState, expected: &mut Expected, what: u8, number: u8) -> Result<(), Lie> {
    // Most moves after the end of file would be lies.
    if expected.got_eof && matches!(what % 10, 7 | 8) && number < 200 {
        return Ok(());
    }
    match what % 10 {
        0 | 1 => {
            let len = match number {
                255 => MESSAGE_MAX,
                number => usize::from(number) * [1, 100][usize::from(what % 10)],
            };
            let data = Bytes::from(vec![number; len]);
            let takes = !expected.has_ended && !expected.has_closed && !expected.got_close && len > 0;
            assert_eq!(end.push(&data), if takes { cost(len) } else { 0 });
            if takes {
                expected.messages.push(len);
            }
        }
        2 => {
            end.end();
            expected.has_ended |= !expected.has_closed;
        }
        3 => {
            end.close();
            expected.has_closed = true;
        }
        4 => {
            for _ in 0..=number % 4 {
                next(end, expected);
            }
        }
        5 | 6 => {
            let attaches = what % 10 == 5;
            let received = guess(expected, number);
            let before = end.kept_cost();
            let heard = if attaches { end.attach(received) } else { end.acknowledge(received) };
            let judged = expected.judge(received, attaches);
            assert_eq!(heard.err(), judged.err(), "received {received}");
            let freed = heard?;
            assert_eq!(u64::from(freed), before - end.kept_cost());
            on_heard(expected, received, attaches);
        }
        7 => {
            let judged = if expected.got_eof { Err(Lie::AfterEof) } else { Ok(()) };
            assert_eq!(end.on_data(number.into()), judged);
            judged?;
            expected.received += u64::from(number);
        }
        8 => {
            let judged = if expected.got_eof { Err(Lie::AfterEof) } else { Ok(()) };
            assert_eq!(end.on_eof(), judged);
            judged?;
            expected.got_eof = true;
            expected.received += 1;
        }
        _ => {
            let before = end.kept_cost();
            assert_eq!(u64::from(end.on_close()), before);
            expected.got_close = true;
        }
    }
    Ok(())
}

/// A position: mostly a true one, so that the moves go on.
fn guess(expected: &Expected, number: u8) -> u64 {
    let lie = u64::from(number % 16);
    match number / 16 {
        0 => expected.sent() + lie,
        1 => expected.acknowledged.saturating_sub(lie),
        2 => expected.acknowledged + lie,
        3 => u64::MAX - lie,
        4 | 5 => expected.sent(),
        _ => expected.after(usize::from(number).min(expected.passed)).max(expected.acknowledged),
    }
}

fn on_heard(expected: &mut Expected, received: u64, attaches: bool) {
    if expected.got_close {
        return;
    }
    expected.acknowledged = expected.acknowledged.max(received);
    let has = expected.ended_by(expected.acknowledged);
    let has_end = expected.acknowledged > expected.after(expected.messages.len());
    if attaches {
        (expected.on_channel, expected.end_on_channel, expected.close_on_channel) = (has, has_end, false);
    }
    // A peer may have received more than this channel was given: from a channel before.
    expected.on_channel = expected.on_channel.max(has);
    expected.end_on_channel |= has_end;
}

fn next(end: &mut StreamState, expected: &mut Expected) {
    let all = !expected.got_close && expected.on_channel == expected.messages.len();
    let wanted = if expected.got_close {
        None
    } else if !all {
        Some(Transmit::Data(Bytes::new()))
    } else if expected.has_ended && !expected.end_on_channel {
        Some(Transmit::Eof)
    } else if expected.has_closed && !expected.close_on_channel {
        Some(Transmit::Close)
    } else {
        None
    };
    assert_eq!(end.all_passed(), wanted.is_none());
    match (end.next_transmit(), wanted) {
        (Some(Transmit::Data(data)), Some(Transmit::Data(_))) => {
            assert_eq!(data.len(), expected.messages[expected.on_channel], "another message");
            expected.on_channel += 1;
            expected.passed = expected.passed.max(expected.on_channel);
        }
        (Some(Transmit::Eof), Some(Transmit::Eof)) => {
            expected.end_on_channel = true;
            expected.end_passed = true;
        }
        (Some(Transmit::Close), Some(Transmit::Close)) => expected.close_on_channel = true,
        (got, wanted) => assert_eq!(got, wanted),
    }
}
