//! A peer: an authenticated SSH connection, typed by its phase.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use secure_comms_protocol::limits::FAREWELL;
use secure_comms_protocol::{Phase, PodId, TunnelName};
use secure_comms_ssh::control::Outbox;
use secure_comms_tunnel::Credits;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use crate::access::limiter::Place;
use crate::connection::Connection;
use crate::peers::link::{Offers, PeerLink};

/// An authenticated peer of a phase.
#[derive(Debug)]
pub(crate) struct Peer<P> {
    /// Connection to the peer.
    pub(crate) connection: Connection,
    /// Opens streams to the peer.
    pub(crate) link: PeerLink,
    /// When the peer authenticated.
    pub(crate) since: Instant,
    /// Tunnels that the peer serves.
    pub(crate) offers: Arc<Offers>,
    /// Control messages to the peer.
    pub(crate) outbox: Outbox,
    /// Streams on the connection.
    pub(crate) credits: Credits,
    /// The pod that the peer names in its hello.
    pub(crate) pod: OnceLock<PodId>,
    closing: AtomicBool,
    controlled: AtomicBool,
    /// Among a limited number of peers; none once it has taken [the adaptor's place](Peers::take_place).
    limited: Mutex<Option<Place>>,
    is_adaptor: AtomicBool,
    phase: PhantomData<P>,
}

impl<P: Phase> Peer<P> {
    /// A peer that has just authenticated, with its place among a limited number.
    pub(crate) fn new(
        connection: Connection,
        credits: Credits,
        link: PeerLink,
        offers: Arc<Offers>,
        place: Place,
    ) -> Self {
        Self {
            connection,
            link,
            since: Instant::now(),
            offers,
            outbox: Outbox::default(),
            credits,
            pod: OnceLock::new(),
            closing: AtomicBool::new(false),
            controlled: AtomicBool::new(false),
            limited: Mutex::new(Some(place)),
            is_adaptor: AtomicBool::new(false),
            phase: PhantomData,
        }
    }

    /// Ends the connection with a reason: by `bye`, if the peer has a control channel that takes it within [`FAREWELL`], and
    /// by SSH's disconnect message. Only the first call has an effect.
    pub(crate) fn close_gracefully(&self, reason: &str) {
        self.close(reason, false);
    }

    /// As [`Self::close_gracefully`], for a connection whose session ends with it.
    pub(crate) fn close_with_session(&self, reason: &str) {
        self.close(reason, true);
    }

    fn close(&self, reason: &str, ends_session: bool) {
        if self.closing.swap(true, Ordering::Relaxed) {
            return;
        }
        let say_bye = if ends_session { Outbox::bye_session } else { Outbox::bye };
        say_bye(&self.outbox, reason);
        let (connection, outbox, reason) = (self.connection.clone(), self.outbox.clone(), reason.to_owned());
        let credits = self.credits.clone();
        let controlled = self.controlled.load(Ordering::Relaxed);
        tokio::spawn(async move {
            if controlled {
                // A bye that the SSH session does not take in time is not waited for: the disconnect says the same.
                drop(timeout(FAREWELL, outbox.said_bye()).await);
                if ends_session {
                    // The disconnect does not say that the session ends, and a client may read it first. One that reads the bye
                    // closes the connection at once.
                    drop(timeout(FAREWELL, credits.gone()).await);
                }
            }
            connection.end(&reason);
        });
    }

    /// Notes that a control channel takes the messages of the outbox.
    pub(crate) fn set_controlled(&self) {
        self.controlled.store(true, Ordering::Relaxed);
    }

    /// Whether the connection is about to close: no new streams are sent to the peer.
    pub(crate) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Relaxed)
    }

    /// Whether the peer has taken the adaptor's place, which it keeps until it is about to close.
    pub(crate) fn is_adaptor(&self) -> bool {
        self.is_adaptor.load(Ordering::Relaxed)
    }

    /// Whether the peer serves this tunnel.
    pub(crate) fn offers(&self, name: &TunnelName) -> bool {
        self.offers.has(name)
    }
}

impl<P> Peer<P> {
    /// The peer no longer counts among a limited number: it has become the adaptor, or its SSH session has ended.
    pub(crate) fn give_place_back(&self) {
        drop(self.limited.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}

/// The peers of a phase.
#[derive(Debug)]
pub(crate) struct Peers<P> {
    list: Mutex<Vec<Arc<Peer<P>>>>,
    changed: watch::Sender<u64>,
}

impl<P> Default for Peers<P> {
    fn default() -> Self {
        Self { list: Mutex::default(), changed: watch::Sender::new(0) }
    }
}

impl<P: Phase> Peers<P> {
    fn list(&self) -> MutexGuard<'_, Vec<Arc<Peer<P>>>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a peer.
    pub(crate) fn add(&self, peer: Arc<Peer<P>>) {
        self.list().push(peer);
        self.notify_changed();
    }

    /// Removes the peer of this connection, if it is one of this phase.
    pub(crate) fn remove(&self, id: u64) {
        self.list().retain(|peer| peer.connection.id != id);
        self.notify_changed();
    }

    /// Notifies of a change in a peer's offers or in what it said.
    pub(crate) fn notify_changed(&self) {
        self.changed.send_modify(|version| *version += 1);
    }

    /// Receives a new value on every change.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// All current peers, oldest first.
    pub(crate) fn all(&self) -> Vec<Arc<Peer<P>>> {
        self.list().clone()
    }

    /// The peer that authenticated last and is not about to close.
    pub(crate) fn newest(&self) -> Option<Arc<Peer<P>>> {
        self.list().iter().rev().find(|peer| !peer.is_closing()).cloned()
    }

    /// The peer that has the adaptor's place.
    pub(crate) fn adaptor(&self) -> Option<Arc<Peer<P>>> {
        self.list().iter().rev().find(|peer| peer.is_adaptor() && !peer.is_closing()).cloned()
    }

    /// The peer that local clients are sent to: the adaptor, or else the newest guest that offers a tunnel.
    pub(crate) fn serving(&self) -> Option<Arc<Peer<P>>> {
        // Before its hello, a peer may become a lane of a session, which has streams of its own.
        let serves = |peer: &&Arc<Peer<P>>| {
            !peer.offers.is_empty() && !peer.is_closing() && peer.credits.knows_peer_mode()
        };
        self.adaptor().or_else(|| self.list().iter().rev().find(serves).cloned())
    }

    /// Gives the adaptor's place to this peer; returns the peer that had it. The newest login wins, however late it says
    /// hello: the hello of an older one may have been delayed by the network that made its adaptor fail over.
    ///
    /// # Errors
    /// The adaptor that has the place, which logged in later.
    pub(crate) fn take_place(&self, peer: &Peer<P>) -> Result<Option<Arc<Peer<P>>>, Arc<Peer<P>>> {
        let adaptor = self.adaptor().filter(|adaptor| adaptor.connection.id != peer.connection.id);
        if let Some(newer) = adaptor.as_ref().filter(|adaptor| adaptor.connection.id > peer.connection.id) {
            return Err(newer.clone());
        }
        self.join_place(peer);
        Ok(adaptor)
    }

    /// Gives this peer a part of the adaptor's place: the connections of a session have it together.
    pub(crate) fn join_place(&self, peer: &Peer<P>) {
        peer.is_adaptor.store(true, Ordering::Relaxed);
        peer.give_place_back();
        self.notify_changed();
    }

    /// Closes every peer gracefully.
    pub(crate) fn close_all(&self, reason: &str) {
        for peer in self.all() {
            peer.close_gracefully(reason);
        }
    }

    /// Waits until there are no peers.
    pub(crate) async fn until_empty(&self) {
        let mut changes = self.changes();
        while !self.list().is_empty() {
            if changes.changed().await.is_err() {
                return;
            }
        }
    }
}
