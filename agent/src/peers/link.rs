//! The link to a peer: streams in SSH channels of type `forwarded-tcpip`.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use russh::Channel;
use russh::server::{Handle, Msg};
use secure_comms_protocol::{Opening, TunnelName};
use secure_comms_ssh::channel::{ChannelReceiver, ChannelSender, PendingChannel};
use secure_comms_ssh::link::{Opener, SshLink};
use secure_comms_tunnel::session::Session;

/// Sends on a stream.
pub(crate) type PeerSender = ChannelSender<Msg>;
/// Receives on a stream.
pub(crate) type PeerReceiver = ChannelReceiver;
/// Opens streams to a peer.
pub(crate) type PeerLink = SshLink<ForwardOpener>;
/// The streams of a session.
pub(crate) type SessionStreams = Session<PeerLink>;
/// A stream that a peer asks for.
pub(crate) type PeerPending = PendingChannel<Msg>;

/// What a peer serves: the tunnel names that it asked to have forwarded, each with address and port as it wrote them.
#[derive(Debug, Default)]
pub(crate) struct Offers(Mutex<HashMap<TunnelName, (String, u32)>>);

impl Offers {
    fn table(&self) -> MutexGuard<'_, HashMap<TunnelName, (String, u32)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a tunnel, or replaces its address and port.
    pub(crate) fn add(&self, name: TunnelName, address: &str, port: u32) {
        self.table().insert(name, (address.to_owned(), port));
    }

    /// Removes a tunnel; whether it was there.
    pub(crate) fn remove(&self, name: &TunnelName) -> bool {
        self.table().remove(name).is_some()
    }

    /// Whether the peer serves this tunnel.
    pub(crate) fn has(&self, name: &TunnelName) -> bool {
        self.table().contains_key(name)
    }

    /// Whether the peer serves no tunnel.
    pub(crate) fn is_empty(&self) -> bool {
        self.table().is_empty()
    }

    fn get(&self, name: &TunnelName) -> Option<(String, u32)> {
        self.table().get(name).cloned()
    }
}

/// Opens `forwarded-tcpip` channels, with the address and port that the peer asked for.
#[derive(Clone, Debug)]
pub(crate) struct ForwardOpener {
    handle: Handle,
    offers: Arc<Offers>,
}

impl ForwardOpener {
    /// Opens channels on the connection of `handle`, for the tunnels in `offers`.
    pub(crate) fn new(handle: Handle, offers: Arc<Offers>) -> Self {
        Self { handle, offers }
    }
}

impl Opener for ForwardOpener {
    type Message = Msg;

    fn open(
        &self,
        name: &TunnelName,
        id: u32,
        opening: Opening,
    ) -> impl Future<Output = Result<Channel<Msg>, russh::Error>> + Send + 'static {
        let offer = self.offers.get(name);
        let handle = self.handle.clone();
        async move {
            // The peer may have cancelled the forward since the route was chosen.
            let (address, port) = offer.ok_or(russh::Error::RequestDenied)?;
            handle.channel_open_forwarded_tcpip(address, port, opening.to_string(), id).await
        }
    }
}
