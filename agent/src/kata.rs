//! The interceptor in the tunnel to the kata agent: adapts `CreateContainer` and `CreateSandbox` to a pod VM, passes all else
//! unchanged. Has cloud volumes mounted before a container is made, and unmounted before `DestroySandbox` passes.
//!
//! In: a stream of ttrpc requests, and one of responses. Out: the same streams, with edited requests and our refusals. May
//! make directories for bind mounts, read the VM's mounts, and ask `podvm-volumes`.
//!
//! In the order data passes: [`requests`] splits the stream into [`frame`]s; [`edit`] changes requests, whose [`protobuf`] it
//! reads field by field, and whose [`cloud_volumes`] it reads from their annotation; `waiting` holds requests within the
//! `budget` of their connection, [`podvm_volumes`] has volumes mounted, and `mounts` waits for what else a container needs,
//! whose `sources` are made; `reply` builds refusals; `conversation` is what both directions know of one
//! connection. docs/KATA-AGENT.md has the reasons.

mod budget;
pub mod cloud_volumes;
mod conversation;
pub mod edit;
pub mod frame;
mod mounts;
pub mod podvm_volumes;
pub mod protobuf;
mod reply;
pub mod requests;
pub mod sources;
mod waiting;

use std::path::Path;
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
use podvm_volumes::PodvmVolumes;
use reply::RequestRefusal;
use requests::{Out, Requests};
use sources::MountPrefixes;
use waiting::{Means, Waiting};

/// The outbounds of the Kubernetes phase. The one to the kata agent gets its connect timeout and its interceptor; containers
/// join the network namespace `pod_namespace`, a name or a path. Sources of bind mounts are made below `mount_prefixes`. The
/// program that mounts cloud volumes listens on `volumes_socket`.
pub(crate) fn outbounds(
    tags: &[OutboundTag],
    pod_namespace: Option<&str>,
    mount_prefixes: &MountPrefixes,
    volumes_socket: &Path,
) -> Outbounds<Kubernetes, KataAgent> {
    let interceptor =
        KataAgent::new(pod_namespace, mount_prefixes.clone()).with_volumes_socket(volumes_socket);
    Outbounds::new(tags)
        .with_connect_timeout(&TunnelName::kata_agent(), KATA_AGENT_CONNECT)
        .with_interceptor(TunnelName::kata_agent(), interceptor)
}

/// The interceptor of the tunnel to the kata agent.
#[derive(Clone, Debug)]
pub struct KataAgent {
    namespace: Option<Arc<str>>,
    budget: Budget,
    means: Means,
}

impl KataAgent {
    /// Containers join the network namespace of this name or path. Without one they keep those of their spec. Sources of bind
    /// mounts are made below the `prefixes`.
    pub fn new(pod_namespace: Option<&str>, prefixes: MountPrefixes) -> Self {
        let path = |text| Namespace::new(text).path().to_string_lossy().as_ref().into();
        let means = Means { prefixes, volumes: PodvmVolumes::default() };
        Self { namespace: pod_namespace.map(path), budget: Budget::default(), means }
    }

    /// With another path of the socket of the program that mounts cloud volumes than [`podvm_volumes::SOCKET`].
    #[must_use]
    pub fn with_volumes_socket(mut self, path: &Path) -> Self {
        self.means.volumes = PodvmVolumes::at(path);
        self
    }
}

impl Interceptor for KataAgent {
    type ToServer = ToKataAgent;
    type FromServer = FromKataAgent;

    fn begin(&self) -> (ToKataAgent, FromKataAgent) {
        let conversation = Arc::new(Conversation::within(self.budget.clone()));
        let to = ToKataAgent {
            requests: Requests::within(
                self.namespace.clone(),
                self.means.volumes.clone(),
                self.budget.clone(),
            ),
            waiting: Waiting::within(self.budget.clone(), self.means.clone()),
            conversation: conversation.clone(),
        };
        (to, FromKataAgent { scanner: Scanner::default(), discarding: false, conversation })
    }

    fn for_connection(&self) -> Self {
        let (namespace, means) = (self.namespace.clone(), self.means.clone());
        Self { namespace, budget: self.budget.of_another_connection(), means }
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
            let what = match what {
                Out::Hold(held) => self.waiting.hold(held),
                what => Some(what),
            };
            match what {
                Some(Out::Pass(piece)) => out(piece),
                Some(Out::Refuse { stream, refusal }) if result.is_ok() => {
                    result = self.conversation.refuse(stream, &refusal);
                }
                // One that was held is not held again.
                Some(Out::Refuse { .. } | Out::Hold(_)) | None => {}
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
