//! What stands in the tunnel to the kata agent: `CreateContainer` and `CreateSandbox` are fitted to a pod VM, all else
//! passes as it comes.
//!
//! In the order data passes through: the [`requests`] of a connection are split at their [`frame`]s; the two that are
//! touched get their [`edit`], of protobuf on the [`wire`], and wait for their [`mounts`]; those that can't go on get a
//! [`reply`] of ours. docs/KATA-AGENT.md says what for.

pub mod edit;
pub mod frame;
pub mod mounts;
pub mod reply;
pub mod requests;
pub mod wire;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use secure_comms_protocol::limits::{HELD_BYTES_MAX, HELD_REQUESTS_MAX, REPLIES_MAX};
use secure_comms_tunnel::intercept::{FromServer, InterceptError, Interceptor, ToServer};
use secure_comms_tunnel::netns::Namespace;
use tokio::sync::Notify;
use tokio::task::JoinSet;

use frame::Scanner;
use reply::Refusal;
use requests::{Held, Out, Requests};

/// The client takes no answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "refusing requests: {REPLIES_MAX} refusals wait, and the client takes none; see the log of the runtime"
)]
struct RepliesUnread;

/// The interceptor of the tunnel to the kata agent.
#[derive(Clone, Debug)]
pub struct KataAgent {
    namespace: Option<Arc<str>>,
}

impl KataAgent {
    /// Containers join the network namespace of this name or path; without one they get those of their spec.
    pub fn new(pod_namespace: Option<&str>) -> Self {
        let path = |text| Namespace::new(text).path().to_string_lossy().as_ref().into();
        Self { namespace: pod_namespace.map(path) }
    }
}

impl Interceptor for KataAgent {
    type ToServer = ToKataAgent;
    type FromServer = FromKataAgent;

    fn begin(&self) -> (ToKataAgent, FromKataAgent) {
        let replies = Arc::<Replies>::default();
        let to = ToKataAgent {
            requests: Requests::new(self.namespace.clone()),
            waiting: Waiting::default(),
            replies: replies.clone(),
        };
        (to, FromKataAgent { scanner: Scanner::default(), replies })
    }
}

/// Our answers, from one half to the other.
#[derive(Debug, Default)]
struct Replies {
    waiting: Mutex<VecDeque<Bytes>>,
    came: Notify,
}

impl Replies {
    fn waiting(&self) -> MutexGuard<'_, VecDeque<Bytes>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn refuse(&self, stream: u32, refusal: &Refusal) -> Result<(), RepliesUnread> {
        log::warn!("tunnel KATAAGENT: refusing the request of ttrpc stream {stream}: {refusal}");
        let mut waiting = self.waiting();
        if waiting.len() >= REPLIES_MAX {
            return Err(RepliesUnread);
        }
        waiting.push_back(refusal.reply(stream));
        drop(waiting);
        self.came.notify_one();
        Ok(())
    }
}

/// Requests that wait for their mounts; dropped with the tunnel.
#[derive(Debug, Default)]
struct Waiting {
    tasks: JoinSet<Waited>,
    bytes: usize,
}

#[derive(Debug)]
struct Waited {
    stream: u32,
    bytes: usize,
    result: Result<Bytes, Refusal>,
}

impl Waiting {
    fn hold(&mut self, Held { stream, frame, mounts }: Held) -> Result<(), Refusal> {
        let bytes = frame.len();
        if self.tasks.len() >= HELD_REQUESTS_MAX || self.bytes + bytes > HELD_BYTES_MAX {
            return Err(Refusal::TooMany);
        }
        self.bytes += bytes;
        self.tasks.spawn(async move {
            let result = mounts::prepare(mounts).await.map(|()| frame);
            Waited { stream, bytes, result }
        });
        Ok(())
    }
}

/// What goes to the kata agent.
#[derive(Debug)]
pub struct ToKataAgent {
    requests: Requests,
    waiting: Waiting,
    replies: Arc<Replies>,
}

impl ToServer for ToKataAgent {
    fn on_message(&mut self, message: Bytes, out: &mut impl FnMut(Bytes)) -> Result<(), InterceptError> {
        let mut result = Ok(());
        self.requests.take(message, &mut |what| {
            let (stream, refusal) = match what {
                Out::Pass(piece) => return out(piece),
                Out::Hold(held) => {
                    let stream = held.stream;
                    match self.waiting.hold(held) {
                        Ok(()) => return,
                        Err(refusal) => (stream, refusal),
                    }
                }
                Out::Refuse { stream, refusal } => (stream, refusal),
            };
            if result.is_ok() {
                result = self.replies.refuse(stream, &refusal);
            }
        })?;
        Ok(result?)
    }

    fn ended(&mut self) -> Result<(), InterceptError> {
        Ok(self.requests.end()?)
    }

    fn has_pending(&self) -> bool {
        self.requests.has_released() || !self.waiting.tasks.is_empty()
    }

    async fn next_released(&mut self) -> Result<Option<Bytes>, InterceptError> {
        loop {
            if let Some(frame) = self.requests.due() {
                return Ok(Some(frame));
            }
            let Some(waited) = self.waiting.tasks.join_next().await else {
                // The rest of the frame that is coming brings the place for what is released.
                return std::future::pending().await;
            };
            let Waited { stream, bytes, result } = waited?;
            self.waiting.bytes -= bytes;
            match result {
                Ok(frame) => self.requests.release(frame),
                Err(refusal) => {
                    self.replies.refuse(stream, &refusal)?;
                    return Ok(None);
                }
            }
        }
    }
}

/// What the kata agent sends.
#[derive(Debug)]
pub struct FromKataAgent {
    scanner: Scanner,
    replies: Arc<Replies>,
}

impl FromServer for FromKataAgent {
    fn inspect(&mut self, mut data: &[u8]) -> Result<(), InterceptError> {
        while !data.is_empty() {
            let (used, _) = self.scanner.advance(data)?;
            data = data.get(used..).unwrap_or_default();
        }
        Ok(())
    }

    fn ended(&mut self) -> Result<(), InterceptError> {
        Ok(self.scanner.end()?)
    }

    fn read_limit(&self) -> usize {
        if self.replies.waiting().is_empty() { usize::MAX } else { self.scanner.missing() }
    }

    fn next_injected(&mut self) -> Option<Bytes> {
        if self.scanner.between() { self.replies.waiting().pop_front() } else { None }
    }

    async fn injection_ready(&mut self) {
        self.replies.came.notified().await;
    }
}

#[cfg(test)]
mod messages;
#[cfg(test)]
#[path = "interceptor_tests.rs"]
mod tests;
