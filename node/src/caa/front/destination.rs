//! Where a connection was going before the node's rules redirected it to us.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use nix::errno::Errno;
use nix::sys::socket::{getsockopt, sockopt};
use tokio::net::TcpStream;

/// The address that the client has dialled. Of a connection that was not redirected it is our own.
///
/// # Errors
/// The system has no record of the connection's addresses: then it was not redirected.
pub fn original_destination(stream: &TcpStream) -> io::Result<SocketAddr> {
    if stream.local_addr()?.is_ipv4() {
        let address = getsockopt(stream, sockopt::OriginalDst)?;
        let ip = Ipv4Addr::from(u32::from_be(address.sin_addr.s_addr));
        return Ok(SocketAddr::from((ip, u16::from_be(address.sin_port))));
    }
    let address = getsockopt(stream, sockopt::Ip6tOriginalDst)?;
    Ok(SocketAddr::from((Ipv6Addr::from(address.sin6_addr.s6_addr), u16::from_be(address.sin6_port))))
}

/// Why a connection is not a dial to a VM.
#[derive(Debug, thiserror::Error)]
pub(super) enum NotRedirected {
    #[error("it was made to {0} itself")]
    Direct(SocketAddr),
    #[error("it was made to {0}, an address of this node only")]
    Local(IpAddr),
    #[error("its original address is unknown ({0})")]
    Unknown(io::Error),
}

/// The VM that the client has dialled.
pub(super) fn vm_of(stream: &TcpStream) -> Result<SocketAddr, NotRedirected> {
    let local = stream.local_addr().map_err(NotRedirected::Unknown)?;
    let dialled = match original_destination(stream) {
        Ok(dialled) => dialled,
        // Without connection tracking there is no redirect.
        Err(error) if is_untracked(&error) => return Err(NotRedirected::Direct(local)),
        Err(error) => return Err(NotRedirected::Unknown(error)),
    };
    let ip = dialled.ip().to_canonical();
    match dialled {
        _ if dialled == local => Err(NotRedirected::Direct(local)),
        _ if ip.is_loopback() || ip.is_unspecified() || ip.is_multicast() => Err(NotRedirected::Local(ip)),
        vm => Ok(vm),
    }
}

fn is_untracked(error: &io::Error) -> bool {
    matches!(error.raw_os_error().map(Errno::from_raw), Some(Errno::ENOENT | Errno::ENOPROTOOPT))
}
