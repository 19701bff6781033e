//! Queue of the messages that have arrived on a stream and were not yet written to its socket.

use std::collections::VecDeque;
use std::io;
use std::io::IoSlice;
use std::sync::{Mutex, PoisonError};

use bytes::{Buf, Bytes};
use tokio::sync::Notify;

use crate::socket::Socket;

/// Most messages written in one system call.
const BATCH: usize = 16;
/// Capacity that an empty queue keeps, in messages; a larger capacity is freed.
const KEEP: usize = 4 * BATCH;

/// Shared by two futures of one relay task. The lock is never contended, and not held across an await.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    messages: VecDeque<Message>,
    bytes: usize,
    end: Option<Ending>,
}

#[derive(Debug)]
struct Message {
    data: Bytes,
    cost: u32,
}

/// How the receiving half of a stream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// With an EOF: all bytes have arrived.
    Complete,
    /// Without an EOF: the other end reset the stream, or the connection is gone.
    Cut,
}

/// Result of one write to the socket.
pub(crate) enum Next {
    /// The queue is empty; more may arrive.
    Wait,
    /// The socket took messages of this cost; more may be queued.
    Wrote(u32),
    /// The queue is empty and has ended.
    End(Ending),
}

impl Queue {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn push(&self, data: Bytes, cost: u32) {
        let mut state = self.state();
        state.bytes += data.len();
        state.messages.push_back(Message { data, cost });
        drop(state);
        self.changed.notify_one();
    }

    /// Marks the end. The first mark counts, so a close after an EOF changes nothing.
    pub(crate) fn end(&self, ending: Ending) {
        self.state().end.get_or_insert(ending);
        self.changed.notify_one();
    }

    /// Waits until a message was pushed, or the end marked. Cancellation safe.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }

    pub(crate) fn ending(&self) -> Option<Ending> {
        self.state().end
    }

    pub(crate) fn bytes(&self) -> usize {
        self.state().bytes
    }

    /// Writes as much to the socket as it takes.
    pub(crate) fn write_to(&self, socket: &Socket) -> io::Result<Next> {
        let mut state = self.state();
        if state.messages.is_empty() {
            return Ok(state.end.map_or(Next::Wait, Next::End));
        }
        let mut slices = [IoSlice::new(&[]); BATCH];
        let (mut count, mut offered) = (0, 0);
        for (slice, message) in slices.iter_mut().zip(&state.messages) {
            *slice = IoSlice::new(&message.data);
            count += 1;
            offered += message.data.len();
        }
        // SSH allows messages without bytes. They have a cost, and need no system call.
        let mut wrote = 0;
        if offered > 0 {
            wrote = socket.try_write_vectored(slices.get(..count).unwrap_or_default())?;
            if wrote == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
        }
        let cost = state.advance(wrote);
        Ok(Next::Wrote(cost))
    }
}

impl State {
    /// Removes the written bytes; returns the cost of the messages that were written whole.
    fn advance(&mut self, mut wrote: usize) -> u32 {
        self.bytes -= wrote;
        let mut cost = 0;
        while let Some(front) = self.messages.front_mut() {
            if front.data.len() > wrote {
                front.data.advance(wrote);
                break;
            }
            wrote -= front.data.len();
            cost += front.cost;
            self.messages.pop_front();
        }
        if self.messages.is_empty() && self.messages.capacity() > KEEP {
            self.messages = VecDeque::new();
        }
        cost
    }
}
