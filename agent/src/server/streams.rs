//! The channels that peers open: a new stream is served, or refused.

use secure_comms_protocol::{Opening, Phase};
use secure_comms_tunnel::intercept::Interceptor;
use secure_comms_tunnel::link::Incoming;
use secure_comms_tunnel::{Credits, Outbounds, outbound};

use crate::connection::Connection;

/// A channel open of the peer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked<'a> {
    /// Name of the tunnel, as the peer wrote it.
    pub(super) name: &'a str,
    /// Stream id.
    pub(super) id: u32,
    /// For what the channel is, in a session.
    pub(super) opening: Opening,
}

/// Serves a new stream of a connection, with a permit and a place, or refuses it.
pub(super) fn serve<P: Phase, I: Interceptor>(
    connection: &Connection,
    outbounds: &Outbounds<P, I>,
    credits: &Credits,
    asked: Asked<'_>,
    incoming: impl Incoming,
) {
    let permit = outbounds.permit(asked.name);
    match permit.and_then(|permit| permit.admit(credits)) {
        Ok(admitted) => {
            tokio::spawn(outbound::serve(admitted, asked.id, incoming));
        }
        Err(refusal) => {
            let (level, address) = (connection.count_refusal(), connection.address);
            log::log!(level, "refusing a stream of {address}: {}", refusal.reason);
            tokio::spawn(incoming.refuse(refusal));
        }
    }
}
