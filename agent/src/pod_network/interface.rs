//! Network interfaces and their addresses.

use std::os::fd::{AsFd, AsRawFd};

use futures_util::TryStreamExt;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope};
use rtnetlink::packet_route::link::{
    InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkInfo, LinkLayerType, LinkMessage,
};
use rtnetlink::{Error as NetlinkError, LinkUnspec};

use super::error::{PodNetworkError, Step, already_exists};
use super::netlink::Net;
use super::spec::Prefix;

/// A network interface.
#[derive(Clone, Debug, Default)]
pub(super) struct Interface {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) mtu: u32,
    /// Kind of a virtual interface; none for a network card.
    pub(super) kind: Option<InfoKind>,
    /// Id and port of a VXLAN interface.
    pub(super) vxlan: (u32, u16),
    pub(super) ethernet: bool,
    /// Whether it is part of a bridge or a bond.
    pub(super) has_controller: bool,
    pub(super) alias: String,
}

impl Interface {
    pub(super) fn is_vxlan(&self) -> bool {
        self.kind == Some(InfoKind::Vxlan)
    }
}

impl From<LinkMessage> for Interface {
    fn from(message: LinkMessage) -> Self {
        let mut link = Self {
            index: message.header.index,
            ethernet: message.header.link_layer_type == LinkLayerType::Ether,
            ..Self::default()
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::IfAlias(alias) => link.alias = alias,
                LinkAttribute::Mtu(mtu) => link.mtu = mtu,
                LinkAttribute::Controller(_) => link.has_controller = true,
                LinkAttribute::LinkInfo(infos) => infos.into_iter().for_each(|info| match info {
                    LinkInfo::Kind(kind) => link.kind = Some(kind),
                    LinkInfo::Data(InfoData::Vxlan(data)) => data.into_iter().for_each(|data| match data {
                        InfoVxlan::Id(id) => link.vxlan.0 = id,
                        InfoVxlan::Port(port) => link.vxlan.1 = port,
                        _ => {}
                    }),
                    _ => {}
                }),
                _ => {}
            }
        }
        link
    }
}

/// All interfaces of a namespace.
pub(super) async fn all(net: &Net) -> Result<Vec<Interface>, PodNetworkError> {
    let links = net.handle.link().get().execute().map_ok(Interface::from).try_collect().await;
    links.step(|| "listing the interfaces".into(), "try again")
}

pub(super) async fn named(net: &Net, name: &str) -> Result<Option<Interface>, PodNetworkError> {
    Ok(all(net).await?.into_iter().find(|link| link.name == name))
}

/// An address of an interface.
#[derive(Clone, Debug)]
pub(super) struct Address {
    pub(super) index: u32,
    pub(super) prefix: Prefix,
    pub(super) link_local: bool,
    /// Whether packets may be sent from it now: it is not tentative and not deprecated.
    pub(super) usable: bool,
    message: AddressMessage,
}

/// The addresses of all interfaces, except duplicate ones.
pub(super) async fn addresses(net: &Net) -> Result<Vec<Address>, PodNetworkError> {
    let messages: Result<Vec<_>, _> = net.handle.address().get().execute().try_collect().await;
    let messages = messages.step(|| "listing the addresses".into(), "try again")?;
    Ok(messages.into_iter().filter_map(address).collect())
}

fn address(message: AddressMessage) -> Option<Address> {
    let mut flags = AddressFlags::from_bits_retain(message.header.flags.bits().into());
    let (mut local, mut peer) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Flags(all) => flags = *all,
            // On a point-to-point interface `Address` is the peer's.
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => peer = Some(*ip),
            _ => {}
        }
    }
    let link_local = match message.header.scope {
        AddressScope::Universe | AddressScope::Site => false,
        AddressScope::Link => true,
        _ => return None,
    };
    let prefix = Prefix::new(local.or(peer)?, message.header.prefix_len)?;
    let index = message.header.index;
    let usable = !flags.intersects(AddressFlags::Tentative | AddressFlags::Deprecated);
    (!flags.contains(AddressFlags::Dadfailed)).then_some(Address {
        index,
        prefix,
        link_local,
        usable,
        message,
    })
}

/// Adds an address that is usable at once. Without `connected` the kernel adds no route to its network.
pub(super) async fn add_address(
    net: &Net,
    link: &Interface,
    prefix: Prefix,
    connected: bool,
) -> Result<(), PodNetworkError> {
    let mut request = net.handle.address().add(link.index, prefix.address(), prefix.length());
    let mut flags = no_dad_flag(prefix);
    flags.set(AddressFlags::Noprefixroute, !connected);
    request.message_mut().attributes.push(AddressAttribute::Flags(flags));
    existing_is_fine(request.execute().await)
        .step(|| format!("adding address {prefix} to '{}'", link.name), "correct pod-network in apf.json")
}

/// Adds an address that is not of the pod's network, unless it is there.
pub(super) async fn add_own_address(
    net: &Net,
    link: &Interface,
    prefix: Prefix,
) -> Result<(), PodNetworkError> {
    let request = net.handle.address().add(link.index, prefix.address(), prefix.length());
    existing_is_fine(request.execute().await)
        .step(|| format!("adding address {prefix} to '{}'", link.name), "correct -pod-namespace-address")
}

/// Adds an address that the interface had in another namespace.
pub(super) async fn restore_address(
    net: &Net,
    link: &Interface,
    address: &Address,
) -> Result<(), PodNetworkError> {
    let prefix = address.prefix;
    let mut request = net.handle.address().add(link.index, prefix.address(), prefix.length());
    let message = request.message_mut();
    message.header.scope = address.message.header.scope;
    message.attributes.clear();
    let mut flags = no_dad_flag(prefix);
    for attribute in &address.message.attributes {
        match attribute {
            AddressAttribute::Flags(had) => flags |= *had & AddressFlags::Noprefixroute,
            AddressAttribute::Address(_) | AddressAttribute::Local(_) | AddressAttribute::Broadcast(_) => {
                message.attributes.push(attribute.clone());
            }
            _ => {}
        }
    }
    message.attributes.push(AddressAttribute::Flags(flags));
    // A DHCP client may have been quicker.
    existing_is_fine(request.execute().await)
        .step(|| format!("adding address {prefix} to '{}'", link.name), "add it by hand")
}

fn existing_is_fine(added: Result<(), NetlinkError>) -> Result<(), NetlinkError> {
    match added {
        Err(error) if already_exists(&error) => Ok(()),
        other => other,
    }
}

/// The flag that skips duplicate address detection (IPv6 only): the address is the pod's alone, or was in use before.
fn no_dad_flag(prefix: Prefix) -> AddressFlags {
    if prefix.address().is_ipv6() { AddressFlags::Nodad } else { AddressFlags::empty() }
}

pub(super) async fn set_up(net: &Net, link: &Interface) -> Result<(), PodNetworkError> {
    let message = LinkUnspec::new_with_index(link.index).up().build();
    let changed = net.handle.link().change(message).execute().await;
    changed.step(|| format!("setting '{}' up", link.name), "look at `ip link` there")
}

pub(super) async fn set_alias(net: &Net, link: &Interface, alias: &str) -> Result<(), PodNetworkError> {
    let message = LinkUnspec::new_with_index(link.index)
        .append_extra_attribute(LinkAttribute::IfAlias(alias.to_owned()))
        .build();
    let changed = net.handle.link().change(message).execute().await;
    changed.step(|| format!("marking '{}'", link.name), "look at `ip link` there")
}

/// Moves an interface into another namespace. There it is down and without addresses, and its index may differ.
pub(super) async fn move_to(net: &Net, link: &Interface, to: &impl AsFd) -> Result<(), PodNetworkError> {
    let message = LinkUnspec::new_with_index(link.index).setns_by_fd(to.as_fd().as_raw_fd()).build();
    let moved = net.handle.link().change(message).execute().await;
    moved.step(
        || format!("moving '{}' to the other namespace", link.name),
        "see that no interface there has its name already",
    )
}

pub(super) async fn remove(net: &Net, link: &Interface) -> Result<(), PodNetworkError> {
    let removed = match net.handle.link().del(link.index).execute().await {
        Err(error) if super::error::is_gone(&error) => Ok(()),
        other => other,
    };
    removed.step(|| format!("removing '{}'", link.name), "remove it by hand with `ip link del`")
}
