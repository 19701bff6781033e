//! Inbounds: the listening side of tunnels, to which local clients connect.

mod listen;
mod unix;

use std::future::{Future as _, poll_fn};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;

use secure_comms_protocol::limits::{
    CHANNEL_OPEN, INBOUND_CLIENTS_MAX, INBOUND_WAIT, PLACE_RETRY_MAX, RETRY_MIN,
};
use secure_comms_protocol::{InboundTag, RefusalReason, TunnelName};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

use crate::backoff::Backoff;
use crate::link::{Link, OpenError, Stream};
use crate::relay::{relay, report};
use crate::reminder::Reminder;
use crate::socket::Socket;

pub use listen::BindError;
pub use unix::PrivateListener;

use listen::Listener;

/// Reports an inbound that a panic ends: its port is closed from then on, and the process may live on.
struct PanicReport<'a>(&'a TunnelName);

impl Drop for PanicReport<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            log::error!("inbound {}: closed by a panic; restart the program, and report the bug", self.0);
        }
    }
}

/// A listening inbound; [`Inbound::serve`] serves its clients.
#[derive(Debug)]
pub struct Inbound {
    tag: InboundTag,
    listener: Listener,
    local: String,
}

impl Inbound {
    /// Listens at the address of the tag. Waits up to 30 s for a network namespace that does not exist yet.
    ///
    /// Dropping the future closes the listener.
    ///
    /// # Errors
    /// The address is in use, or the namespace can't be entered.
    pub async fn bind(tag: &InboundTag) -> Result<Self, BindError> {
        let (listener, local) = Listener::bind(tag).await?;
        Ok(Self { tag: tag.clone(), listener, local })
    }

    /// Tag of the inbound.
    pub fn tag(&self) -> &InboundTag {
        &self.tag
    }

    /// Address of the listener: `127.0.0.1:<port>` with the port in use, or the path of a unix socket.
    pub fn local(&self) -> &str {
        &self.local
    }

    /// Serves clients; never returns. Each client waits up to [`INBOUND_WAIT`] for a link and a place among its streams, then
    /// gets a stream on it.
    /// Dropping the future closes the listener and every client.
    pub async fn serve<L: Link>(self, links: watch::Receiver<Option<L>>) {
        let name = &self.tag.name;
        let _report = PanicReport(name);
        let mut clients = JoinSet::new();
        let waiting = Arc::new(Waiting::default());
        let mut for_places = waiting.for_places.subscribe();
        // A fault is logged when it starts, changes and ends, not for every client.
        let (mut unserved, mut failing) = (String::new(), None);
        loop {
            let room = clients.len() < INBOUND_CLIENTS_MAX;
            // While a client waits for a place, the next ones stay in the kernel's queue: they would take places that it waits for.
            let all_have_places = *for_places.borrow_and_update() == 0;
            tokio::select! {
                Ok(()) = for_places.changed() => {}
                Some(ended) = clients.join_next() => {
                    let now = match ended {
                        Ok(Ended::Served) => String::new(),
                        Ok(Ended::Unserved(reason)) => reason,
                        Ok(Ended::Left) => continue,
                        // Nothing else ends a task that is not aborted.
                        Err(panic) => {
                            log::error!("inbound {name}: serving a client: {panic}; report the bug");
                            continue;
                        }
                    };
                    if now != unserved {
                        match now.as_str() {
                            "" => log::info!("inbound {name}: recovered, clients are served"),
                            reason => log::warn!("inbound {name}: closing a client: {reason}"),
                        }
                        unserved = now;
                    }
                }
                accepted = self.listener.accept(), if room && all_have_places => match accepted {
                    Ok(socket) => {
                        failing = None;
                        let client = serve_client(name.clone(), socket, links.clone(), waiting.clone());
                        clients.spawn(client);
                    }
                    // The client reset its connection; other clients are not affected.
                    Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                    Err(error) => {
                        // Usually out of file descriptors; clients that leave free some.
                        if failing.replace(error.kind()) != Some(error.kind()) {
                            log::warn!("inbound {name}: accepting a client: {error}");
                        }
                        sleep(RETRY_MIN).await;
                    }
                }
            }
        }
    }
}

/// How serving a client ended.
enum Ended {
    /// The client had a stream.
    Served,
    /// The client left before it had a stream.
    Left,
    /// The client was closed without a stream; with the reason.
    Unserved(String),
}

/// The clients of an inbound that wait.
#[derive(Debug, Default)]
struct Waiting {
    /// One of them reports it, and none has a stream yet.
    is_reported: AtomicBool,
    /// Number of those that wait for a place among the streams.
    for_places: watch::Sender<usize>,
}

/// A client that waits for a place among the streams; until it is dropped.
struct WaitsForPlace<'a>(&'a watch::Sender<usize>);

impl<'a> WaitsForPlace<'a> {
    fn new(waiting: &'a watch::Sender<usize>) -> Self {
        waiting.send_modify(|clients| *clients += 1);
        Self(waiting)
    }
}

impl Drop for WaitsForPlace<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|clients| *clients -= 1);
    }
}

/// What a client without a stream waits for.
#[derive(Clone, Copy)]
enum WaitsFor {
    Peer,
    Place,
    Server,
}

/// Serves one client: waits for a stream, and relays. Of the clients of an inbound that wait for long, the first one reports
/// it, as a [`Reminder`] asks.
async fn serve_client<L: Link>(
    name: TunnelName,
    socket: Socket,
    mut links: watch::Receiver<Option<L>>,
    waiting: Arc<Waiting>,
) -> Ended {
    let waits_for = Mutex::new(WaitsFor::Peer);
    let opened = {
        let opening = open_stream(&name, &socket, &mut links, &waits_for, &waiting.for_places);
        tokio::pin!(opening);
        let (mut reminder, mut reports) = (Reminder::start(), false);
        loop {
            tokio::select! {
                opened = &mut opening => break opened,
                () = reminder.due() => {}
            }
            reports = reports || !waiting.is_reported.swap(true, Ordering::Relaxed);
            if reports {
                let (what, limit) = match *waits_for.lock().unwrap_or_else(PoisonError::into_inner) {
                    WaitsFor::Peer => ("a peer", INBOUND_WAIT),
                    WaitsFor::Place => ("a place among the streams of the connection", INBOUND_WAIT),
                    WaitsFor::Server => ("the other end to reach its server", CHANNEL_OPEN),
                };
                let left = limit.saturating_sub(reminder.waited()).as_secs();
                log::info!("inbound {name}: a client waits for {what}, {left} s left");
            }
        }
    };
    match opened {
        Ok(stream) => {
            waiting.is_reported.store(false, Ordering::Relaxed);
            report(&name, relay(socket, stream).await);
            Ended::Served
        }
        Err(ended) => ended,
    }
}

/// Waits for a link, and opens a stream on it. A lost link, and one without a place, is retried until the deadline.
async fn open_stream<L: Link>(
    name: &TunnelName,
    socket: &Socket,
    links: &mut watch::Receiver<Option<L>>,
    waits_for: &Mutex<WaitsFor>,
    for_places: &watch::Sender<usize>,
) -> Result<Stream<L::Receiver, L::Sender>, Ended> {
    let deadline = Instant::now() + INBOUND_WAIT;
    let mut backoff = Backoff::default();
    let mut for_place = None;
    let set = |now| *waits_for.lock().unwrap_or_else(PoisonError::into_inner) = now;
    loop {
        set(WaitsFor::Peer);
        let usable = |link: &Option<L>| link.as_ref().is_some_and(|link| !link.is_gone());
        let link = tokio::select! {
            biased;
            link = links.wait_for(usable) => link.ok().and_then(|link| link.clone()),
            // A client that has left frees its place among the clients.
            () = socket.client_gone() => return Err(Ended::Left),
            () = sleep_until(deadline) => {
                return Err(Ended::Unserved(format!("no peer within {} s", INBOUND_WAIT.as_secs())));
            }
        };
        // None: the sender of links is gone, so no link will arrive.
        let Some(link) = link else { return Err(Ended::Unserved("shutting down".into())) };
        tokio::select! {
            biased;
            () = link.ready(name) => {}
            () = socket.client_gone() => return Err(Ended::Left),
            () = sleep_until(deadline) => {
                return Err(Ended::Unserved(format!("no connection to the peer within {} s", INBOUND_WAIT.as_secs())));
            }
        }
        set(WaitsFor::Server);
        let opening = link.open(name);
        tokio::pin!(opening);
        // The first poll takes a place at this end, or finds none.
        let opened = match poll_fn(|context| Poll::Ready(opening.as_mut().poll(context))).await {
            Poll::Ready(opened) => opened,
            Poll::Pending => {
                for_place = None;
                tokio::select! {
                    biased;
                    opened = opening => opened,
                    _ = socket.failed() => return Err(Ended::Left),
                }
            }
        };
        match opened {
            Ok(stream) => return Ok(stream),
            Err(OpenError::Refused(reason)) => {
                return Err(Ended::Unserved(format!("the other end refused: {reason}")));
            }
            // The places may all be taken only here or only there: an end counts a stream until it has the other's close.
            Err(OpenError::Full) if Instant::now() >= deadline => {
                let (limit, why) = (INBOUND_WAIT.as_secs(), RefusalReason::TooManyStreams);
                return Err(Ended::Unserved(format!("no place within {limit} s: {why}")));
            }
            Err(OpenError::Full) => {
                set(WaitsFor::Place);
                for_place.get_or_insert_with(|| WaitsForPlace::new(for_places));
                tokio::select! {
                    biased;
                    () = socket.client_gone() => return Err(Ended::Left),
                    () = sleep(backoff.next_pause().min(PLACE_RETRY_MAX)) => {}
                }
            }
            Err(OpenError::LinkGone) if Instant::now() >= deadline => {
                return Err(Ended::Unserved("the connection to the peer was lost".into()));
            }
            // Retry on a newer link, or on this one after a pause: it may not have noticed yet that it is gone.
            Err(OpenError::LinkGone) => tokio::select! {
                Ok(()) = links.changed() => {}
                () = backoff.pause() => {}
            },
        }
    }
}
