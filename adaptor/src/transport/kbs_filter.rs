//! What a pod VM's agent may ask of the KBS.
//!
//! In the Attestation phase nothing is proven: who answers at the VM's address gets streams to the KBS's port, from inside
//! the cluster. Over plain HTTP this filter lets only the requests pass that an attesting agent makes. A stream that begins
//! as TLS passes unread: there the KBS decides by itself.

mod head;
mod requests;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use bytes::Bytes;
use secure_comms_tunnel::intercept::{FromServer, InterceptError, Interceptor, ToServer};
use tokio::sync::Notify;

use self::requests::{Refused, Requests};
use crate::text::quote;
use crate::throttle::Throttle;

/// Refusals of all streams that are logged in a minute: a stranger could cause any number.
static REFUSALS: Mutex<Throttle> = Mutex::new(Throttle::new(16));

/// The filter in the streams to the KBS.
#[derive(Clone, Debug)]
pub(crate) struct KbsFilter {
    on: bool,
    /// The agent, for the log.
    peer: Option<SocketAddr>,
}

impl KbsFilter {
    /// A filter that lets all bytes pass unless it is on.
    pub(crate) fn new(on: bool) -> Self {
        Self { on, peer: None }
    }

    /// Sets the agent whose streams it filters.
    pub(crate) fn set_peer(&mut self, peer: SocketAddr) {
        self.peer = Some(peer);
    }
}

impl Interceptor for KbsFilter {
    type ToServer = ToKbs;
    type FromServer = FromKbs;

    fn begin(&self) -> (ToKbs, FromKbs) {
        let refusal = Arc::<Refusal>::default();
        let requests = self.on.then(Requests::default);
        (ToKbs { requests, refusal: refusal.clone(), peer: self.peer }, FromKbs { refusal, injected: false })
    }
}

/// The answer to a request that was refused, from one half to the other.
#[derive(Debug, Default)]
struct Refusal {
    answer: OnceLock<Bytes>,
    refused: Notify,
}

/// The half that reads the agent's requests.
#[derive(Debug)]
pub(crate) struct ToKbs {
    /// None: everything passes.
    requests: Option<Requests>,
    refusal: Arc<Refusal>,
    peer: Option<SocketAddr>,
}

impl ToServer for ToKbs {
    fn on_message(&mut self, message: Bytes, out: &mut impl FnMut(Bytes)) -> Result<(), InterceptError> {
        let Some(requests) = &mut self.requests else {
            out(message);
            return Ok(());
        };
        if let Err(refused) = requests.on_message(message, out) {
            self.log(&refused);
            // Set once: no request is read after this one.
            drop(self.refusal.answer.set(answer(&refused)));
            self.refusal.refused.notify_one();
        }
        Ok(())
    }

    /// The beginning of a head that is held is no request, and is dropped.
    fn ended(&mut self) -> Result<(), InterceptError> {
        Ok(())
    }

    fn has_pending(&self) -> bool {
        false
    }

    fn next_released(&mut self) -> impl Future<Output = Result<Option<Bytes>, InterceptError>> + Send {
        std::future::pending()
    }

    fn is_finished(&self) -> bool {
        self.requests.as_ref().is_some_and(Requests::is_refused)
    }
}

impl ToKbs {
    fn log(&self, refused: &Refused) {
        let peer = self.peer.map(|peer| format!(" of the agent at {peer}")).unwrap_or_default();
        let (line, fault) = (quote(&String::from_utf8_lossy(&refused.line)), refused.fault);
        let advice = "if this is the pod's VM and its KBS needs it, give --kbs-filter off";
        let text = format!("tunnel KBS: refusing a request{peer}, '{line}': {fault}; {advice}");
        match REFUSALS.lock().unwrap_or_else(PoisonError::into_inner).allow() {
            None => tracing::debug!("{text}"),
            Some(0) => tracing::warn!("{text}"),
            Some(left_out) => tracing::warn!("{text} ({left_out} more were left out)"),
        }
    }
}

fn answer(refused: &Refused) -> Bytes {
    let body = format!("Secure Comms does not pass this request to the KBS: {}\n", refused.fault);
    let head = "HTTP/1.1 403 Forbidden\r\nContent-Type: text/plain\r\nConnection: close\r\nContent-Length:";
    format!("{head} {}\r\n\r\n{body}", body.len()).into()
}

/// The half that answers in place of the KBS.
#[derive(Debug)]
pub(crate) struct FromKbs {
    refusal: Arc<Refusal>,
    injected: bool,
}

impl FromServer for FromKbs {
    fn on_data(&mut self, data: Bytes, out: &mut impl FnMut(Bytes)) -> Result<(), InterceptError> {
        out(data);
        Ok(())
    }

    fn ended(&mut self) -> Result<(), InterceptError> {
        Ok(())
    }

    fn read_limit(&self) -> usize {
        usize::MAX
    }

    fn next_injected(&mut self) -> Option<Bytes> {
        let answer = self.refusal.answer.get().filter(|_| !self.injected).cloned();
        self.injected |= answer.is_some();
        answer
    }

    async fn injection_ready(&mut self) {
        if self.refusal.answer.get().is_none() {
            self.refusal.refused.notified().await;
        }
    }

    fn is_finished(&self) -> bool {
        self.injected
    }
}

/// Filters the bytes of one stream, which arrive in these messages: what the KBS receives, and whether a request was refused.
/// For tests.
pub fn filtered(messages: impl IntoIterator<Item = Bytes>) -> (Vec<u8>, bool) {
    let (mut requests, mut received) = (Requests::default(), Vec::new());
    let mut refused = false;
    for message in messages {
        refused |= requests.on_message(message, &mut |piece| received.extend_from_slice(&piece)).is_err();
    }
    (received, refused)
}

#[cfg(test)]
#[path = "kbs_filter_tests.rs"]
mod tests;
