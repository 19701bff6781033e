//! A connection that waits in its TLS handshake.

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::StartHandshake;
use tokio_rustls::rustls::server::Accepted;

use super::Shared;
use super::finish::{CaaStream, FinishError, handshake, server_config};
use super::hangup::{Hangup, HangupWatch};
use super::hello::Hello;
use super::places::Place;
use super::refusal::Refusal;
use super::refusals::Refusals;
use crate::caa::identity::TlsIdentity;

/// A connection of a client that has sent its hello, and has got no answer. Dropping it resets the connection:
/// cloud-api-adaptor dials again then.
#[derive(Debug)]
pub struct Held {
    /// The server that the client asks for (SNI), in lower case.
    pub server_name: String,
    /// The address that the client has dialled.
    pub vm: SocketAddr,
    /// When its hello was complete.
    pub since: SystemTime,
    stream: TcpStream,
    accepted: Accepted,
    hangup: HangupWatch,
    place: Place,
    refusals: Refusals,
    finish_time: Duration,
}

/// Why a connection that was held is of no more use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Closed {
    /// The client has closed it.
    ByClient,
    /// The client has reset it, or is gone.
    Reset,
    /// Newer connections took its place.
    Superseded,
}

impl Held {
    /// # Errors
    /// There is no free file descriptor.
    pub(super) fn new(
        stream: TcpStream,
        hello: Hello,
        vm: SocketAddr,
        place: Place,
        shared: &Shared,
    ) -> io::Result<Self> {
        // A call is small, and its answer is waited for.
        stream.set_nodelay(true)?;
        let hangup = HangupWatch::new(&stream)?;
        stream.set_zero_linger()?;
        Ok(Self {
            server_name: hello.server_name,
            vm,
            since: SystemTime::now(),
            stream,
            accepted: hello.accepted,
            hangup,
            place,
            refusals: shared.refusals.clone(),
            finish_time: shared.limits.finish_time,
        })
    }

    /// Says that the connection belongs to a known sandbox: it keeps its place when too many are held. Those that do not lose
    /// theirs first.
    pub fn recognise(&self) {
        self.place.recognise();
    }

    /// Returns once the client has closed or reset the connection, or is dropped to make room for newer ones, which is
    /// counted as a refusal. At once, whatever lies unread.
    ///
    /// # Cancellation
    /// Loses nothing.
    pub async fn closed(&mut self) -> Closed {
        let Self { place, hangup, .. } = self;
        tokio::select! {
            () = place.evicted() => {
                self.superseded();
                Closed::Superseded
            }
            hangup = poll_fn(|cx| hangup.poll(cx)) => match hangup {
                Ok(Hangup::Closed) => Closed::ByClient,
                // What cannot be watched cannot be held.
                Ok(Hangup::Reset) | Err(_) => Closed::Reset,
            },
        }
    }

    /// Ends the handshake with the keys of the pod, bounded in time.
    ///
    /// # Errors
    /// The keys are of no use, the client presents another certificate than the identity's or none, or its handshake fails.
    /// The client has got a TLS alert or a reset.
    ///
    /// # Cancellation
    /// Resets the connection.
    pub async fn finish(self, identity: &TlsIdentity) -> Result<CaaStream, FinishError> {
        let Self { server_name, vm, stream, accepted, refusals, finish_time, .. } = self;
        let finished = match server_config(&server_name, identity) {
            Ok(config) => {
                match timeout(finish_time, handshake(StartHandshake::from_parts(accepted, stream), config))
                    .await
                {
                    Ok(finished) => finished,
                    Err(_) => Err(FinishError::Timeout(finish_time)),
                }
            }
            Err(error) => Err(error),
        };
        finished.inspect_err(|error| refusals.refused(error.refusal(), Some(vm), &error.to_string()))
    }

    /// Resets the connection; `reason` is logged.
    pub fn refuse_with(self, refusal: Refusal, reason: &str) {
        let detail = format!("server name {}: {reason}", self.server_name);
        self.refusals.refused(refusal, Some(self.vm), &detail);
    }

    /// Counts and logs that newer connections took its place. The caller drops it.
    pub fn superseded(&self) {
        self.refusals.refused(
            Refusal::Superseded,
            Some(self.vm),
            &format!("server name {}", self.server_name),
        );
    }
}
