//! What both directions of one connection know: our replies that wait, what the connection was for, and who ended it.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use secure_comms_protocol::limits::{REPLIES_MAX, REPLIES_WITH_TEXT_MAX};
use tokio::sync::{Notify, OwnedSemaphorePermit};

use super::budget::Budget;
use super::reply::RequestRefusal;
use super::requests::Seen;

/// The client does not read our refusals.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "refusing requests: {REPLIES_MAX} refusals wait, and the client takes none; see the log of the runtime"
)]
pub(super) struct RepliesUnread;

/// One connection of a runtime, which is a stream of the tunnel.
#[derive(Debug)]
pub(super) struct Conversation {
    state: Mutex<State>,
    added: Notify,
    budget: Budget,
}

#[derive(Debug, Default)]
struct State {
    /// Each with its room.
    replies: VecDeque<(Bytes, OwnedSemaphorePermit)>,
    seen: Seen,
    client_ended: bool,
    server_ended: bool,
}

impl State {
    /// Whether a pod lives by this connection: a runtime makes one, and never another.
    fn is_a_pods(&self) -> bool {
        self.seen.sandbox && !self.seen.destroyed
    }
}

impl Conversation {
    /// A new conversation, within the budget of its SSH connection.
    pub(super) fn within(budget: Budget) -> Self {
        Self { state: Mutex::default(), added: Notify::new(), budget }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses the request of this stream: the client hears why, and so does the log.
    pub(super) fn refuse(&self, stream: u32, refusal: &RequestRefusal) -> Result<(), RepliesUnread> {
        log::warn!("tunnel KATAAGENT: refusing the request of ttrpc stream {stream}: {refusal}");
        let mut state = self.state();
        let waiting = state.replies.len();
        if waiting >= REPLIES_MAX {
            return Err(RepliesUnread);
        }
        // A burst of faulty calls must not end the others: thousands of refusals may wait, a few of them with their texts.
        let is_short = waiting >= REPLIES_WITH_TEXT_MAX || !self.budget.allows_text();
        let room = self.budget.reply().ok_or(RepliesUnread)?;
        let reply = if is_short { refusal.short_reply(stream) } else { refusal.reply(stream) };
        state.replies.push_back((reply, room));
        drop(state);
        self.added.notify_one();
        Ok(())
    }

    pub(super) fn has_replies(&self) -> bool {
        !self.state().replies.is_empty()
    }

    pub(super) fn next_reply(&self) -> Option<Bytes> {
        self.state().replies.pop_front().map(|(reply, _room)| reply)
    }

    /// Waits for a reply. Cancellation safe.
    pub(super) async fn reply_added(&self) {
        self.added.notified().await;
    }

    pub(super) fn saw(&self, seen: Seen) {
        self.state().seen = seen;
    }

    /// What a fault costs now.
    pub(super) fn cost(&self) -> Option<&'static str> {
        self.state().is_a_pods().then_some(LOST)
    }

    pub(super) fn client_ended(&self) {
        let mut state = self.state();
        state.client_ended = true;
        if state.is_a_pods() && !state.server_ended {
            log::warn!(
                "tunnel KATAAGENT: the runtime closed its connection without DestroySandbox; {LOST}, see the log of the \
                 runtime"
            );
        }
    }

    pub(super) fn server_ended(&self) {
        let mut state = self.state();
        state.server_ended = true;
        if state.client_ended {
            return;
        }
        if state.is_a_pods() {
            log::warn!(
                "tunnel KATAAGENT: the kata agent closed the connection; {LOST}, see its log in the VM"
            );
        } else if state.seen.sandbox {
            log::info!("tunnel KATAAGENT: the kata agent closed the connection after DestroySandbox");
        } else {
            log::info!("tunnel KATAAGENT: the kata agent closed a connection");
        }
    }
}

/// What the end of a pod's connection costs: the runtime never makes another.
const LOST: &str = "a runtime connection was lost: the pod will end";
