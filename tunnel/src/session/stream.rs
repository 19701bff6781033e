//! One end of a stream that goes on over other connections, as a state machine: it does no I/O, knows no time and no
//! channel.
//!
//! Its owner passes to the channel what [`StreamState::next_transmit`] returns, and to the state what came from the channel. It
//! calls [`StreamState::attach`] when the stream goes on over a new channel. Positions are those of the protocol: bytes, and
//! one more for the end of file.

use std::collections::VecDeque;
use std::fmt;

use bytes::Bytes;

use crate::flow::cost;

/// Messages shorter than this are kept as copies of their own size: the buffer that they were read into is larger.
const COPY_MAX: usize = 1024;

/// What the channel is to carry next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Transmit {
    /// One message.
    Data(Bytes),
    /// The end of our direction.
    Eof,
    /// The end of the stream.
    Close,
}

/// What a peer says about a stream that can't be so. Its session must end: the two ends don't agree on the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Lie {
    /// It has received more than was sent.
    #[error("it has received {received} bytes of {sent}")]
    Beyond {
        /// What it says.
        received: u64,
        /// What was sent.
        sent: u64,
    },
    /// It has received less than it said before.
    #[error("it has received {received} bytes, and has said {acknowledged} before")]
    Before {
        /// What it says.
        received: u64,
        /// What it said before.
        acknowledged: u64,
    },
    /// Its position is inside a message.
    #[error("it has received {0} bytes, which is inside a message")]
    Inside(u64),
    /// It sent something after its end of file.
    #[error("it sent more after its end of file")]
    AfterEof,
}

/// The state of one end of a stream.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct StreamState {
    /// Position up to which the other end has received.
    acknowledged: u64,
    /// Messages from there on, each as it was or will be sent.
    kept: VecDeque<Bytes>,
    /// Number of kept messages that the current channel has.
    passed: usize,
    /// Position of what the current channel has.
    passed_to: u64,
    /// The largest position that any channel had.
    sent: u64,
    eof: Mark,
    close: Mark,
    received: u64,
    got_eof: bool,
    got_close: bool,
}

/// Something that is said once, after all messages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
enum Mark {
    /// Not yet.
    #[default]
    No,
    /// It waits for the channel.
    Waiting,
    /// The current channel has it.
    Passed,
    /// The other end has it.
    Acknowledged,
}

/// Without what is kept: it is a client's.
impl fmt::Debug for StreamState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StreamState")
            .field("acknowledged", &self.acknowledged)
            .field("kept", &self.kept.len())
            .field("sent", &self.sent)
            .field("received", &self.received)
            .finish_non_exhaustive()
    }
}

impl StreamState {
    /// Appends a message. No effect once our direction has ended; or if the other end takes no more.
    ///
    /// Returns the cost of what is kept from now on, in bytes of credit.
    pub fn push(&mut self, data: &Bytes) -> u32 {
        if self.eof != Mark::No || self.close != Mark::No || self.got_close || data.is_empty() {
            return 0;
        }
        self.kept.push_back(if data.len() < COPY_MAX { Bytes::copy_from_slice(data) } else { data.clone() });
        cost(data.len())
    }

    /// Ends our direction after all messages.
    pub fn end(&mut self) {
        if self.eof == Mark::No && self.close == Mark::No {
            self.eof = Mark::Waiting;
        }
    }

    /// Ends the stream after all messages.
    pub fn close(&mut self) {
        if self.close == Mark::No {
            self.close = Mark::Waiting;
        }
    }

    /// What the current channel is to carry next; it counts as passed from now on. None if the channel has everything.
    pub fn next_transmit(&mut self) -> Option<Transmit> {
        if self.got_close {
            return None;
        }
        if let Some(message) = self.kept.get(self.passed) {
            let message = message.clone();
            self.passed += 1;
            self.passed_to += message.len() as u64;
            self.sent = self.sent.max(self.passed_to);
            return Some(Transmit::Data(message));
        }
        if self.eof == Mark::Waiting {
            self.eof = Mark::Passed;
            self.passed_to += 1;
            self.sent = self.sent.max(self.passed_to);
            return Some(Transmit::Eof);
        }
        if self.close == Mark::Waiting {
            self.close = Mark::Passed;
            return Some(Transmit::Close);
        }
        None
    }

    /// Whether the current channel has everything.
    pub fn all_passed(&self) -> bool {
        self.got_close
            || (self.passed == self.kept.len() && self.eof != Mark::Waiting && self.close != Mark::Waiting)
    }

    /// The other end has received up to this position. One that it has said before has no effect.
    ///
    /// Returns the cost of the messages that are not kept any more, in bytes of credit.
    ///
    /// # Errors
    /// It can't have.
    pub fn acknowledge(&mut self, received: u64) -> Result<u32, Lie> {
        if received > self.sent {
            return Err(Lie::Beyond { received, sent: self.sent });
        }
        if self.got_close {
            // Nothing is kept that it could be about. (Without this, what was given up would be counted byte by byte as
            // ends of file.)
            return Ok(0);
        }
        let mut freed = 0;
        while self.acknowledged < received {
            if let Some(message) = self.kept.front() {
                let end = self.acknowledged + message.len() as u64;
                if end > received {
                    return Err(Lie::Inside(received));
                }
                self.acknowledged = end;
                freed += cost(message.len());
                self.kept.pop_front();
                self.passed = self.passed.saturating_sub(1);
            } else {
                // Only the end of file is left: nothing beyond it was ever sent.
                self.acknowledged += 1;
                self.eof = Mark::Acknowledged;
            }
        }
        self.passed_to = self.passed_to.max(self.acknowledged);
        if self.kept.is_empty() && self.kept.capacity() > 0 {
            // An idle stream holds no memory.
            self.kept = VecDeque::new();
        }
        Ok(freed)
    }

    /// The stream goes on over a new channel, of which the other end says what it has received. Returns what
    /// [`StreamState::acknowledge`] does.
    ///
    /// # Errors
    /// It can't have.
    pub fn attach(&mut self, received: u64) -> Result<u32, Lie> {
        if received < self.acknowledged {
            return Err(Lie::Before { received, acknowledged: self.acknowledged });
        }
        let freed = self.acknowledge(received)?;
        (self.passed, self.passed_to) = (0, self.acknowledged);
        for mark in [&mut self.eof, &mut self.close] {
            if *mark == Mark::Passed {
                *mark = Mark::Waiting;
            }
        }
        Ok(freed)
    }

    /// A message of `len` bytes has come.
    ///
    /// # Errors
    /// The other end had ended its direction.
    pub fn on_data(&mut self, len: usize) -> Result<(), Lie> {
        if self.got_eof {
            return Err(Lie::AfterEof);
        }
        self.received += len as u64;
        Ok(())
    }

    /// The other end has ended its direction.
    ///
    /// # Errors
    /// It had done so before.
    pub fn on_eof(&mut self) -> Result<(), Lie> {
        if self.got_eof {
            return Err(Lie::AfterEof);
        }
        self.got_eof = true;
        self.received += 1;
        Ok(())
    }

    /// The other end has closed the stream, or does not know it any more. It takes no more from us: nothing is kept. Returns
    /// the cost of what was, in bytes of credit.
    pub fn on_close(&mut self) -> u32 {
        self.got_close = true;
        self.passed = 0;
        std::mem::take(&mut self.kept).iter().map(|message| cost(message.len())).sum()
    }

    /// Position up to which we have received.
    pub fn received(&self) -> u64 {
        self.received
    }

    /// Whether the other end has closed the stream.
    pub fn is_closed_there(&self) -> bool {
        self.got_close
    }

    /// Whether both ends have closed the stream.
    pub fn is_over(&self) -> bool {
        self.got_close && self.close != Mark::No
    }

    /// Cost of the messages that are kept, in bytes of credit.
    pub fn kept_cost(&self) -> u64 {
        self.kept.iter().map(|message| u64::from(cost(message.len()))).sum()
    }
}
