//! The port to which cloud-api-adaptor's dials are redirected.
//!
//! ```text
//! accept -> redirected? -> ClientHello -> server name, address of the VM -> Held --finish--> CaaStream --relay--> KATAAGENT
//! ```
//!
//! A connection is held without an answer until the pod can be used, because cloud-api-adaptor waits in its TLS handshake.
//! What is not its dial is refused. It dials again after whatever ends a dial, so nothing is lost by a refusal in error:
//!
//! - a fault of TLS in a hello, or in a handshake that is being finished, is answered by a TLS alert;
//! - everything else by a reset.

mod destination;
mod finish;
mod hangup;
mod held;
mod hello;
mod limits;
mod places;
mod receive;
mod refusal;
mod refusals;
mod relay;

use std::future::pending;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout_at};

use self::destination::vm_of;
use self::hangup::reset;
use self::places::Places;
use self::refusals::Refusals;
use super::identity::STRICT_SERVER_NAME;
use crate::metrics::Metrics;

pub use self::destination::original_destination;
pub use self::finish::{CaaStream, FinishError};
pub use self::held::{Closed, Held};
pub use self::limits::FrontLimits;
pub use self::refusal::Refusal;
pub use self::relay::{RelayEnd, Side, relay};

/// The first and the longest pause after a failed accept(2): mostly there is no free file descriptor.
const PAUSES: [Duration; 2] = [Duration::from_millis(20), Duration::from_secs(1)];

/// Why the port cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum FrontError {
    /// An address cannot be listened at.
    #[error(
        "cannot listen at {address}, where the connections of cloud-api-adaptor are redirected to: free the port or choose another"
    )]
    Bind {
        /// The address.
        address: SocketAddr,
        /// The system's error.
        #[source]
        source: io::Error,
    },
}

/// The listening port, on the loopback addresses: that is where a redirect of the node's own packets leads.
#[derive(Debug)]
pub struct Front {
    v4: TcpListener,
    /// `None`: the node has no IPv6.
    v6: Option<TcpListener>,
    port: u16,
    shared: Shared,
}

/// What all connections use.
#[derive(Clone, Debug)]
struct Shared {
    limits: FrontLimits,
    hellos: Places,
    held: Places,
    refusals: Refusals,
}

impl Front {
    /// Listens at `127.0.0.1` and, if the node has IPv6, at `::1`. Port 0: any free one. Raises the limit of open files as
    /// far as the process may.
    ///
    /// # Errors
    /// An address cannot be listened at.
    pub async fn bind(listen_port: u16, limits: FrontLimits, metrics: Metrics) -> Result<Self, FrontError> {
        raise_open_files();
        let v4 = listen(SocketAddr::from((Ipv4Addr::LOCALHOST, listen_port))).await?;
        let port = v4.local_addr().map_or(listen_port, |address| address.port());
        let v6 = match listen(SocketAddr::from((Ipv6Addr::LOCALHOST, port))).await {
            Ok(listener) => Some(listener),
            Err(FrontError::Bind { source, .. }) if has_no_ipv6(&source) => {
                tracing::info!(
                    "caa front: the node has no IPv6 loopback address: VMs with IPv6 addresses cannot be served"
                );
                None
            }
            Err(error) => return Err(error),
        };
        let shared = Shared {
            limits,
            hellos: Places::unnamed(limits.hellos),
            held: Places::new(limits.held, limits.held_per_name),
            refusals: Refusals::new(metrics),
        };
        Ok(Self { v4, v6, port, shared })
    }

    /// The port that is listened at.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Accepts until `stop` becomes true or nothing receives `held` any more. Connections of which no hello has been read are
    /// closed then; those in `held` are their receiver's.
    ///
    /// # Cancellation
    /// As with `stop`.
    pub async fn run(self, held: mpsc::Sender<Held>, mut stop: watch::Receiver<bool>) {
        let Self { v4, v6, shared, .. } = self;
        let v6 = async {
            match &v6 {
                Some(listener) => accept_all(listener, &shared, &held).await,
                None => pending().await,
            }
        };
        tokio::select! {
            // An error: what would have stopped us is gone.
            _ = stop.wait_for(|stop| *stop) => {}
            () = held.closed() => {}
            () = accept_all(&v4, &shared, &held) => {}
            () = v6 => {}
            () = report(&shared.refusals) => {}
        }
    }
}

async fn listen(address: SocketAddr) -> Result<TcpListener, FrontError> {
    TcpListener::bind(address).await.map_err(|source| FrontError::Bind { address, source })
}

fn has_no_ipv6(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::EADDRNOTAVAIL | Errno::EAFNOSUPPORT))
}

/// Each held connection needs a few descriptors, and the soft limit is often 1024.
fn raise_open_files() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| match soft < hard {
        true => setrlimit(Resource::RLIMIT_NOFILE, hard, hard),
        false => Ok(()),
    });
    if let Err(error) = raised {
        tracing::warn!(
            "caa front: the limit of open files cannot be raised ({error}): many pods may need more, set LimitNOFILE="
        );
    }
}

/// Accepts for good. Never waits for a client.
async fn accept_all(listener: &TcpListener, shared: &Shared, held: &mpsc::Sender<Held>) {
    let mut clients = JoinSet::new();
    let [first, longest] = PAUSES;
    let mut pause = first;
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = clients.join_next() => continue,
        };
        match accepted {
            Ok((stream, _)) => {
                pause = first;
                if let Some(vm) = admit(&stream, shared) {
                    clients.spawn(serve(stream, vm, shared.clone(), held.clone()));
                }
            }
            Err(error) if is_the_clients(&error) => {}
            Err(error) => {
                shared.refusals.not_accepted(&error);
                sleep(pause).await;
                pause = longest.min(pause * 2);
            }
        }
    }
}

/// accept(2) also reports errors of the connection that it would have returned.
fn is_the_clients(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset)
}

/// The VM that the client has dialled, if it was redirected to us.
fn admit(stream: &TcpStream, shared: &Shared) -> Option<SocketAddr> {
    match vm_of(stream) {
        Ok(vm) => Some(vm),
        Err(why) => {
            shared.refusals.refused(Refusal::NotRedirected, None, &why.to_string());
            reset(stream);
            None
        }
    }
}

/// Reads the hello and hands the connection over.
async fn serve(stream: TcpStream, vm: SocketAddr, shared: Shared, held: mpsc::Sender<Held>) {
    let deadline = Instant::now() + shared.limits.hello_time;
    // Never full: the oldest makes room, because none is recognised. cloud-api-adaptor sends its hello at once and needs its
    // place for no time.
    let Some(mut place) = shared.hellos.enter("") else { return };
    let read = tokio::select! {
        read = timeout_at(deadline, receive::hello(&stream)) => read.unwrap_or_else(|_| Err(Refusal::HelloTimeout.into())),
        () = place.evicted() => Err(Refusal::TooManyHellos.into()),
    };
    let hello = match read {
        Ok(hello) => hello,
        Err(fault) => {
            shared.refusals.refused(fault.refusal, Some(vm), &fault.detail);
            receive::answer(&fault, &stream);
            return;
        }
    };
    let refuse = |refusal| {
        shared.refusals.refused(refusal, Some(vm), "");
        reset(&stream);
    };
    let Some(kept) = shared.held.enter(&place_of(&hello.server_name, vm)) else {
        return refuse(Refusal::TooManyHeld);
    };
    let connection = match Held::new(stream, hello, vm, kept, &shared) {
        Ok(connection) => connection,
        Err(error) => {
            shared.refusals.not_accepted(&error);
            return;
        }
    };
    // An error hands the connection back or drops it: either closes it.
    match timeout_at(deadline, held.send(connection)).await {
        Ok(Ok(()) | Err(_)) => {}
        Err(_) => shared.refusals.refused(Refusal::Busy, Some(vm), ""),
    }
}

/// Of which connections a newer one takes the place: of those of one pod. In the strict variant all VMs have one name.
fn place_of(server_name: &str, vm: SocketAddr) -> String {
    if server_name == STRICT_SERVER_NAME { vm.ip().to_string() } else { server_name.to_owned() }
}

/// Logs what was left out, as long as there is something.
async fn report(refusals: &Refusals) {
    let mut tick = interval(refusals::WINDOW);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        refusals.report();
    }
}

#[cfg(test)]
#[path = "../../../fuzz/src/client_hello.rs"]
mod client_hello;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_corpus_of_client_hello_holds() {
        crate::caa::testing::corpus::replay("client_hello", client_hello::exercise);
    }

    #[test]
    fn in_the_strict_variant_each_vm_has_its_places() {
        let [one, two] = ["192.0.2.1:15150", "192.0.2.2:15150"].map(|vm| vm.parse().unwrap());
        assert_ne!(place_of("podvm-server", one), place_of("podvm-server", two));
        assert_eq!(place_of("podvm-web-0-aaaaaaaa", one), place_of("podvm-web-0-aaaaaaaa", two));
    }
}
