//! Connects to a host, whichever of its addresses is reachable.

use std::fmt::Write as _;
use std::io;
use std::net::SocketAddr;

use secure_comms_protocol::limits::{CONNECT_STAGGER, TCP_CONNECT};
use secure_comms_protocol::tag::Host;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::names::Resolver;
use crate::race::race;

/// Addresses whose causes are in an error.
const REPORTED_MAX: usize = 4;

/// Connects to a TCP server. The addresses of a name are raced (RFC 8305), each for at most [`TCP_CONNECT`]; an IP address is
/// tried for as long as the kernel does. Dropping the future stops all attempts.
///
/// # Errors
/// The name has no address, or no address can be reached; with the cause for each.
pub async fn connect(resolver: &Resolver, host: &Host, port: u16) -> io::Result<TcpStream> {
    let name = match host {
        Host::Ip(ip) => return TcpStream::connect((*ip, port)).await,
        Host::Name(name) => name,
    };
    connect_first(resolver.lookup(name.as_str(), port).await?).await
}

/// Connects to the first of the addresses that can be reached; they are raced (RFC 8305). Dropping the future stops all
/// attempts.
///
/// # Errors
/// None can be reached, each within [`TCP_CONNECT`]; with the cause for each.
pub async fn connect_first(addresses: Vec<SocketAddr>) -> io::Result<TcpStream> {
    let attempt = |address| async move { connect_to(address).await.map_err(|error| (address, error)) };
    race(addresses, CONNECT_STAGGER, attempt, |_| true).await.map(|(_, stream)| stream).map_err(summary)
}

async fn connect_to(address: SocketAddr) -> io::Result<TcpStream> {
    match timeout(TCP_CONNECT, TcpStream::connect(address)).await {
        Ok(connected) => connected,
        Err(_) => Err(io::Error::new(
            io::ErrorKind::TimedOut,
            format!("no answer within {} s", TCP_CONNECT.as_secs()),
        )),
    }
}

/// One error of the errors of all addresses, in their order.
fn summary(errors: Vec<(SocketAddr, io::Error)>) -> io::Error {
    let mut text = String::new();
    for (address, error) in errors.iter().take(REPORTED_MAX) {
        let separator = if text.is_empty() { "" } else { ", " };
        // Writing to a String can't fail.
        let _ = write!(text, "{separator}{}: {error}", address.ip());
    }
    let more = errors.len().saturating_sub(REPORTED_MAX);
    if more > 0 {
        let _ = write!(text, " and {more} more");
    }
    let kind = errors.first().map_or(io::ErrorKind::NotFound, |(_, error)| error.kind());
    io::Error::new(kind, text)
}
