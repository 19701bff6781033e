//! The channels that peers open: a new stream is served, or refused.

use log::Level;
use secure_comms_protocol::{Opening, Phase, RefusalKind};
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
            let address = connection.address;
            // Of a shortage the other end's inbound says that its clients wait, and it asks often.
            let level = match refusal.kind {
                RefusalKind::Shortage => Level::Debug,
                RefusalKind::Prohibited | RefusalKind::ConnectFailed => connection.count_refusal(),
            };
            log::log!(level, "refusing a stream of {address}: {}", refusal.reason);
            tokio::spawn(incoming.refuse(refusal));
        }
    }
}
