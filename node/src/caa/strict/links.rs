//! The VXLAN links in the network namespaces of the node's pods.

use std::fs::{self, File};
use std::io;
use std::net::IpAddr;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{InfoData, InfoVxlan, LinkAttribute, LinkInfo, LinkMessage};
use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};
use tokio::sync::oneshot;

/// Most namespaces that are looked into.
const NAMESPACES_MAX: usize = 4096;
/// Most addresses of one namespace that are kept.
const ADDRESSES_MAX: usize = 64;
/// Most parts of one answer; the kernel sends some 30 links in each.
const PARTS_MAX: usize = 1000;
/// The kernel puts at most 32 KiB into one part.
const PART_SIZE: usize = 64 * 1024;

/// A VXLAN link to one remote address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) remote: IpAddr,
    /// The VXLAN's network identifier.
    pub(super) vni: Option<u32>,
    /// All addresses in the link's namespace, but those of the loopback.
    pub(super) addresses: Vec<IpAddr>,
}

/// The links in all namespaces in a directory. A namespace that goes in between is left out.
///
/// # Errors
/// The directory cannot be read, or we may not enter a namespace.
pub(super) async fn links(namespaces: &Path) -> io::Result<Vec<Link>> {
    let namespaces = namespaces.to_owned();
    let (done, result) = oneshot::channel();
    // A thread of its own, which ends: it does not come back from the last namespace.
    std::thread::Builder::new().name("strict-links".into()).spawn(move || {
        // An error: the dial that asked for it has ended.
        done.send(links_in(&namespaces)).ok();
    })?;
    result.await.map_err(|_| io::Error::other("the thread that looks into the namespaces ended early"))?
}

fn links_in(directory: &Path) -> io::Result<Vec<Link>> {
    let mut links = Vec::new();
    let entries = match fs::read_dir(directory) {
        // It is made with the first namespace.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(links),
        entries => entries?,
    };
    let paths: Vec<PathBuf> = entries.take(NAMESPACES_MAX).flatten().map(|entry| entry.path()).collect();
    for path in paths {
        let Ok(namespace) = File::open(&path) else { continue };
        match setns(namespace, CloneFlags::CLONE_NEWNET) {
            Ok(()) => links.extend(links_here()?),
            // A file that is no namespace (any more).
            Err(Errno::EINVAL) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(links)
}

/// The links in the namespace of this thread.
fn links_here() -> io::Result<Vec<Link>> {
    let mut links = Vec::new();
    dump(RouteNetlinkMessage::GetLink(LinkMessage::default()), |message| {
        if let RouteNetlinkMessage::NewLink(link) = message {
            links.extend(link.attributes.iter().find_map(vxlan));
        }
    })?;
    if links.is_empty() {
        return Ok(links);
    }
    let mut addresses = Vec::new();
    dump(RouteNetlinkMessage::GetAddress(AddressMessage::default()), |message| {
        if let RouteNetlinkMessage::NewAddress(address) = message {
            addresses.extend(address.attributes.iter().filter_map(address_of));
        }
    })?;
    addresses.sort_unstable();
    addresses.dedup();
    addresses.truncate(ADDRESSES_MAX);
    for link in &mut links {
        link.addresses.clone_from(&addresses);
    }
    Ok(links)
}

fn vxlan(attribute: &LinkAttribute) -> Option<Link> {
    let LinkAttribute::LinkInfo(infos) = attribute else { return None };
    let data = infos.iter().find_map(|info| match info {
        LinkInfo::Data(InfoData::Vxlan(data)) => Some(data),
        _ => None,
    })?;
    let remote = data.iter().find_map(|info| match info {
        InfoVxlan::Group(address) => Some(IpAddr::from(*address)),
        InfoVxlan::Group6(address) => Some(IpAddr::from(*address)),
        _ => None,
    })?;
    let vni = data.iter().find_map(|info| match info {
        InfoVxlan::Id(vni) => Some(*vni),
        _ => None,
    });
    Some(Link { remote, vni, addresses: Vec::new() })
}

fn address_of(attribute: &AddressAttribute) -> Option<IpAddr> {
    match attribute {
        AddressAttribute::Address(address) | AddressAttribute::Local(address) if !address.is_loopback() => {
            Some(*address)
        }
        _ => None,
    }
}

/// Asks the kernel for all objects of a kind.
fn dump(request: RouteNetlinkMessage, mut each: impl FnMut(RouteNetlinkMessage)) -> io::Result<()> {
    let invalid = |error: netlink_packet_core::DecodeError| {
        io::Error::new(io::ErrorKind::InvalidData, format!("an answer of the kernel: {error}"))
    };
    let socket =
        socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)?;
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_DUMP | NLM_F_REQUEST;
    let mut request = NetlinkMessage::new(header, NetlinkPayload::from(request));
    request.finalize();
    let mut bytes = vec![0; request.buffer_len()];
    request.serialize(&mut bytes);
    sendto(socket.as_raw_fd(), &bytes, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
    let mut part = vec![0; PART_SIZE];
    for _ in 0..PARTS_MAX {
        let length = recv(socket.as_raw_fd(), &mut part, MsgFlags::empty())?;
        let mut rest = part.get(..length).unwrap_or_default();
        while !rest.is_empty() {
            let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest).map_err(invalid)?;
            let length = usize::try_from(message.header.length).unwrap_or(usize::MAX);
            match message.payload {
                NetlinkPayload::Done(_) => return Ok(()),
                NetlinkPayload::Error(error) => return Err(error.to_io()),
                NetlinkPayload::InnerMessage(message) => each(message),
                _ => {}
            }
            // Messages begin at multiples of four bytes.
            rest = rest.get(length.next_multiple_of(4).max(4)..).unwrap_or_default();
        }
    }
    Err(io::Error::other("an answer of the kernel does not end"))
}
