//! The interceptor in the tunnel to the kata agent: adapts `CreateContainer` and `CreateSandbox` to a pod VM, passes all else
//! unchanged.
//!
//! In: a stream of ttrpc requests, and one of responses. Out: the same streams, with edited requests and our refusals. May
//! make directories for bind mounts, and read the VM's mounts.
//!
//! In the order data passes: [`requests`] splits the stream into [`frame`]s; [`edit`] changes requests, whose [`protobuf`] it
//! reads field by field; `mounts` waits for what a container needs; `reply` builds refusals. docs/KATA-AGENT.md has the
//! reasons.

pub mod edit;
pub mod frame;
mod mounts;
pub mod protobuf;
mod reply;
pub mod requests;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use secure_comms_protocol::limits::{HELD_BYTES_MAX, HELD_REQUESTS_MAX, KATA_AGENT_CONNECT, REPLIES_MAX};
use secure_comms_protocol::{Kubernetes, OutboundTag, TunnelName};
use secure_comms_tunnel::Outbounds;
use secure_comms_tunnel::intercept::{FromServer, InterceptError, Interceptor, ToServer};
use secure_comms_tunnel::netns::Namespace;
use tokio::sync::Notify;
use tokio::task::JoinSet;

use frame::Scanner;
use reply::RequestRefusal;
use requests::{Held, Out, Requests};

/// The outbounds of the Kubernetes phase. The one to the kata agent gets its connect timeout and its interceptor; containers
/// join the network namespace `pod_namespace`, a name or a path.
pub(crate) fn outbounds(
    tags: &[OutboundTag],
    pod_namespace: Option<&str>,
) -> Outbounds<Kubernetes, KataAgent> {
    Outbounds::new(tags)
        .with_connect_timeout(&TunnelName::kata_agent(), KATA_AGENT_CONNECT)
        .with_interceptor(TunnelName::kata_agent(), KataAgent::new(pod_namespace))
}

/// The client does not read our refusals.
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
    /// Containers join the network namespace of this name or path. Without one they keep those of their spec.
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

/// Our replies, from one half of the interceptor to the other.
#[derive(Debug, Default)]
struct Replies {
    waiting: Mutex<VecDeque<Bytes>>,
    added: Notify,
}

impl Replies {
    fn waiting(&self) -> MutexGuard<'_, VecDeque<Bytes>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn refuse(&self, stream: u32, refusal: &RequestRefusal) -> Result<(), RepliesUnread> {
        log::warn!("tunnel KATAAGENT: refusing the request of ttrpc stream {stream}: {refusal}");
        let mut waiting = self.waiting();
        if waiting.len() >= REPLIES_MAX {
            return Err(RepliesUnread);
        }
        waiting.push_back(refusal.reply(stream));
        drop(waiting);
        self.added.notify_one();
        Ok(())
    }
}

/// Held requests, which wait for their mounts. Dropped with the tunnel.
#[derive(Debug, Default)]
struct Waiting {
    tasks: JoinSet<Waited>,
    bytes: usize,
}

#[derive(Debug)]
struct Waited {
    stream: u32,
    bytes: usize,
    result: Result<Bytes, RequestRefusal>,
}

impl Waiting {
    fn hold(&mut self, Held { stream, frame, mounts }: Held) -> Result<(), RequestRefusal> {
        let bytes = frame.len();
        if self.tasks.len() >= HELD_REQUESTS_MAX || self.bytes + bytes > HELD_BYTES_MAX {
            return Err(RequestRefusal::TooMany);
        }
        self.bytes += bytes;
        self.tasks.spawn(async move {
            let result = mounts::prepare(mounts).await.map(|()| frame);
            Waited { stream, bytes, result }
        });
        Ok(())
    }
}

/// The half that sees the requests to the kata agent.
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
                // A released request is waiting for the end of a frame, which the next messages bring.
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

/// The half that sees the kata agent's responses.
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
        if self.replies.waiting().is_empty() { usize::MAX } else { self.scanner.until_boundary() }
    }

    fn next_injected(&mut self) -> Option<Bytes> {
        if self.scanner.at_boundary() { self.replies.waiting().pop_front() } else { None }
    }

    async fn injection_ready(&mut self) {
        self.replies.added.notified().await;
    }
}

#[cfg(test)]
mod messages;
#[cfg(test)]
#[path = "kata_tests.rs"]
mod tests;
