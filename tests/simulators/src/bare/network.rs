//! Links and an address by rtnetlink(7); two messages do not need a library.

use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;

use anyhow::{Context, Result, anyhow};
use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};

/// Address that qemu's user network gives its first guest, with its prefix length.
pub(super) const QEMU_USER_NETWORK: (Ipv4Addr, u8) = (Ipv4Addr::new(10, 0, 2, 15), 24);

const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const NLM_F_REQUEST_ACK: u16 = 1 | 4;
const NLM_F_CREATE: u16 = 0x400;
const NLMSG_ERROR: u16 = 2;
const IFF_UP: u32 = 1;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;

/// Brings a link up, with an address and its prefix length if one is given.
pub(super) fn up(link: &str, address: Option<(Ipv4Addr, u8)>) -> Result<()> {
    let index = if_nametoindex(link).with_context(|| format!("network: looking for {link}"))?;
    if let Some((address, prefix)) = address {
        let mut body = vec![AddressFamily::Inet as u8, prefix, 0, 0];
        body.extend(index.to_ne_bytes());
        for kind in [IFA_LOCAL, IFA_ADDRESS] {
            body.extend(8_u16.to_ne_bytes());
            body.extend(kind.to_ne_bytes());
            body.extend(address.octets());
        }
        request(RTM_NEWADDR, NLM_F_REQUEST_ACK | NLM_F_CREATE, &body)
            .with_context(|| format!("network: giving {link} the address {address}/{prefix}"))?;
    }
    let mut body = vec![0; 4];
    for word in [index, IFF_UP, IFF_UP] {
        body.extend(word.to_ne_bytes());
    }
    request(RTM_NEWLINK, NLM_F_REQUEST_ACK, &body).with_context(|| format!("network: bringing {link} up"))
}

/// Sends one message and waits for the kernel's reply.
fn request(kind: u16, flags: u16, body: &[u8]) -> Result<()> {
    let netlink = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        Some(SockProtocol::NetlinkRoute),
    )?;
    let mut message = u32::try_from(16 + body.len())?.to_ne_bytes().to_vec();
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    // Sequence number and port: this socket has one user.
    message.extend([0; 8]);
    message.extend(body);
    send(netlink.as_raw_fd(), &message, MsgFlags::empty())?;
    let mut answer = [0; 4096];
    let length = recv(netlink.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    let field = |at: usize, size: usize| answer.get(..length).and_then(|answer| answer.get(at..at + size));
    let (Some(kind), Some(error)) = (field(4, 2), field(16, 4)) else {
        return Err(anyhow!("an answer of {length} bytes"));
    };
    if kind != NLMSG_ERROR.to_ne_bytes() {
        return Err(anyhow!("an answer that is no acknowledgement"));
    }
    match i32::from_ne_bytes(error.try_into()?) {
        0 => Ok(()),
        error => Err(Errno::from_raw(-error).into()),
    }
}
