//! What has arrived on a stream and not yet left through its socket.

use std::collections::VecDeque;
use std::io;
use std::io::IoSlice;
use std::sync::{Mutex, PoisonError};

use bytes::{Buf, Bytes};
use tokio::sync::Notify;

use crate::socket::Socket;

/// Messages that go out in one system call.
const BATCH: usize = 16;
/// Room for messages that an empty queue keeps; a flood of small ones takes more for as long as it lasts.
const KEEP: usize = 4 * BATCH;

/// Shared by the two futures of one relay task: never contended, and locked for no await.
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

/// How the incoming half of a stream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// With an EOF: all of it is here.
    Complete,
    /// Without: the other end was reset, or the connection is gone.
    Cut,
}

/// What the queue has for the socket.
pub(crate) enum Next {
    /// Nothing yet.
    Wait,
    /// This much credit has left through the socket; there may be more.
    Wrote(u32),
    /// All of it has left.
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

    /// Marks the end; the first mark counts: a close after an EOF takes nothing back.
    pub(crate) fn end(&self, ending: Ending) {
        self.state().end.get_or_insert(ending);
        self.changed.notify_one();
    }

    /// Waits until something was pushed, or the end marked.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }

    pub(crate) fn ending(&self) -> Option<Ending> {
        self.state().end
    }

    pub(crate) fn bytes(&self) -> usize {
        self.state().bytes
    }

    /// Hands the socket what it takes.
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
        // SSH allows messages without bytes: they cost, and need no system call.
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
    /// Drops what was written; returns what the messages that are gone whole cost.
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
