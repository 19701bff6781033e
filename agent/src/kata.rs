//! The interceptor in the tunnel to the kata agent: adapts `CreateContainer` and `CreateSandbox` to a pod VM, passes all else
//! unchanged.
//!
//! In: a stream of ttrpc requests, and one of responses. Out: the same streams, with edited requests and our refusals. May
//! make directories for bind mounts, and read the VM's mounts.
//!
//! In the order data passes: [`requests`] splits the stream into [`frame`]s; [`edit`] changes requests, whose [`protobuf`] it
//! reads field by field; `waiting` holds requests within the `budget` of their connection, and `mounts` waits for what a
//! container needs, whose `sources` are made; `reply` builds refusals; `conversation` is what both directions know of one
//! connection. docs/KATA-AGENT.md has the reasons.

mod budget;
mod conversation;
pub mod edit;
pub mod frame;
mod mounts;
pub mod protobuf;
mod reply;
pub mod requests;
pub mod sources;
mod waiting;

use std::sync::Arc;

use bytes::{Buf, Bytes};
use secure_comms_protocol::limits::KATA_AGENT_CONNECT;
use secure_comms_protocol::{Kubernetes, OutboundTag, TunnelName};
use secure_comms_tunnel::Outbounds;
use secure_comms_tunnel::intercept::{FromServer, InterceptError, Interceptor, ToServer};
use secure_comms_tunnel::netns::Namespace;

use budget::Budget;
use conversation::Conversation;
use frame::Scanner;
use reply::RequestRefusal;
use requests::{Out, Requests};
use sources::MountPrefixes;
use waiting::Waiting;

/// The outbounds of the Kubernetes phase. The one to the kata agent gets its connect timeout and its interceptor; containers
/// join the network namespace `pod_namespace`, a name or a path. Sources of bind mounts are made below `mount_prefixes`.
pub(crate) fn outbounds(
    tags: &[OutboundTag],
    pod_namespace: Option<&str>,
    mount_prefixes: &MountPrefixes,
) -> Outbounds<Kubernetes, KataAgent> {
    Outbounds::new(tags)
        .with_connect_timeout(&TunnelName::kata_agent(), KATA_AGENT_CONNECT)
        .with_interceptor(TunnelName::kata_agent(), KataAgent::new(pod_namespace, mount_prefixes.clone()))
}

/// The interceptor of the tunnel to the kata agent.
#[derive(Clone, Debug)]
pub struct KataAgent {
    namespace: Option<Arc<str>>,
    budget: Budget,
    prefixes: MountPrefixes,
}

impl KataAgent {
    /// Containers join the network namespace of this name or path. Without one they keep those of their spec. Sources of bind
    /// mounts are made below the `prefixes`.
    pub fn new(pod_namespace: Option<&str>, prefixes: MountPrefixes) -> Self {
        let path = |text| Namespace::new(text).path().to_string_lossy().as_ref().into();
        Self { namespace: pod_namespace.map(path), budget: Budget::default(), prefixes }
    }
}

impl Interceptor for KataAgent {
    type ToServer = ToKataAgent;
    type FromServer = FromKataAgent;

    fn begin(&self) -> (ToKataAgent, FromKataAgent) {
        let conversation = Arc::new(Conversation::within(self.budget.clone()));
        let to = ToKataAgent {
            requests: Requests::within(self.namespace.clone(), self.budget.clone()),
            waiting: Waiting::within(self.budget.clone(), self.prefixes.clone()),
            conversation: conversation.clone(),
        };
        (to, FromKataAgent { scanner: Scanner::default(), discarding: false, conversation })
    }

    fn for_connection(&self) -> Self {
        let (namespace, prefixes) = (self.namespace.clone(), self.prefixes.clone());
        Self { namespace, budget: self.budget.of_another_connection(), prefixes }
    }
}

/// The half that sees the requests to the kata agent.
#[derive(Debug)]
pub struct ToKataAgent {
    requests: Requests,
    waiting: Waiting,
    conversation: Arc<Conversation>,
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
                result = self.conversation.refuse(stream, &refusal);
            }
        })?;
        self.conversation.saw(self.requests.seen());
        Ok(result?)
    }

    /// A ttrpc client that ends its half is gone: it reads no answer, so nothing may be done for it any more.
    fn ended(&mut self) -> Result<(), InterceptError> {
        self.requests.end()?;
        let dropped = self.waiting.drop_all() + self.requests.drop_released();
        if dropped > 0 {
            log::warn!(
                "tunnel KATAAGENT: the runtime closed its connection; dropping {dropped} held requests, the kata agent \
                 does not see them"
            );
        }
        self.conversation.client_ended();
        Ok(())
    }

    fn cost(&self) -> Option<&'static str> {
        self.conversation.cost()
    }

    fn has_pending(&self) -> bool {
        self.requests.has_released() || !self.waiting.is_empty()
    }

    async fn next_released(&mut self) -> Result<Option<Bytes>, InterceptError> {
        loop {
            let (stream, refusal) = match self.requests.due() {
                Some(Out::Pass(frame)) => return Ok(Some(frame)),
                Some(Out::Refuse { stream, refusal }) => (stream, refusal),
                // A released request is not held again.
                Some(Out::Hold(_)) => return Ok(None),
                None => match self.waiting.next().await? {
                    Ok(held) => {
                        self.requests.release(held);
                        continue;
                    }
                    Err(refused) => refused,
                },
            };
            self.conversation.refuse(stream, &refusal)?;
            return Ok(None);
        }
    }
}

/// The half that sees the kata agent's responses.
#[derive(Debug)]
pub struct FromKataAgent {
    scanner: Scanner,
    /// The current frame is too long: it was refused, and its bytes are dropped.
    discarding: bool,
    conversation: Arc<Conversation>,
}

impl FromKataAgent {
    /// Whether all frames that were begun to be passed are complete. Of a header nothing passes before the whole.
    fn at_boundary(&self) -> bool {
        self.scanner.left() == 0 || self.discarding
    }
}

impl FromServer for FromKataAgent {
    fn on_data(&mut self, mut data: Bytes, out: &mut impl FnMut(Bytes)) -> Result<(), InterceptError> {
        // The bytes before `at` pass.
        let mut at = 0;
        while let Some(rest) = data.get(at..).filter(|rest| !rest.is_empty()) {
            let (in_data, fresh) = (self.scanner.left() > 0, self.scanner.at_boundary());
            let (used, header) = self.scanner.advance(rest)?;
            match header {
                None if in_data && !self.discarding => at += used,
                None if in_data => data.advance(used),
                // The beginning of a header, which the scanner keeps.
                None => data.truncate(at),
                Some(header) => {
                    self.discarding = header.is_too_long();
                    if fresh && !self.discarding {
                        at += used;
                        continue;
                    }
                    out(data.split_to(at));
                    data.advance(used);
                    at = 0;
                    if self.discarding {
                        self.conversation
                            .refuse(header.stream, &RequestRefusal::AnswerTooLong(header.length))?;
                    } else {
                        out(Bytes::copy_from_slice(&header.to_bytes()));
                    }
                }
            }
        }
        out(data);
        Ok(())
    }

    fn ended(&mut self) -> Result<(), InterceptError> {
        self.scanner.end()?;
        self.conversation.server_ended();
        Ok(())
    }

    fn read_limit(&self) -> usize {
        if self.conversation.has_replies() && !self.at_boundary() { self.scanner.left() } else { usize::MAX }
    }

    fn next_injected(&mut self) -> Option<Bytes> {
        if self.at_boundary() { self.conversation.next_reply() } else { None }
    }

    async fn injection_ready(&mut self) {
        self.conversation.reply_added().await;
    }
}

#[cfg(test)]
mod messages;
#[cfg(test)]
#[path = "kata_tests.rs"]
mod tests;
