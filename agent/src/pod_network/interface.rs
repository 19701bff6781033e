//! Links (interfaces) and their addresses.

use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd};

use futures_util::TryStreamExt;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope};
use rtnetlink::packet_route::link::{
    InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkInfo, LinkLayerType, LinkMessage,
};
use rtnetlink::{LinkUnspec, LinkVxlan};

use super::error::{PodNetworkError, Step};
use super::underlay::HostInterface;
use super::netlink::Net;
use super::spec::{Prefix, Spec};

/// What an IP, a UDP, a VXLAN and an inner Ethernet header take of the tunnel's interface's MTU.
const OVERHEAD: (u32, u32) = (50, 70);

/// What is known of a link.
#[derive(Clone, Debug, Default)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) mtu: u32,
    /// The kind of a link that software makes; none for a network card.
    pub(super) kind: Option<InfoKind>,
    /// Id and port of a VXLAN link.
    pub(super) vxlan: (u32, u16),
    pub(super) ethernet: bool,
    /// Part of a bridge, a bond or the like.
    pub(super) governed: bool,
    pub(super) alias: String,
}

impl Link {
    pub(super) fn is_vxlan(&self) -> bool {
        self.kind == Some(InfoKind::Vxlan)
    }
}

impl From<LinkMessage> for Link {
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
                LinkAttribute::Controller(_) => link.governed = true,
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

/// Every link of a namespace.
pub(super) async fn all(net: &Net) -> Result<Vec<Link>, PodNetworkError> {
    let links = net.handle.link().get().execute().map_ok(Link::from).try_collect().await;
    links.step(|| "listing the interfaces".into(), "try again")
}

pub(super) async fn named(net: &Net, name: &str) -> Result<Option<Link>, PodNetworkError> {
    Ok(all(net).await?.into_iter().find(|link| link.name == name))
}

/// An address of a link.
#[derive(Clone, Debug)]
pub(super) struct Address {
    pub(super) index: u32,
    pub(super) prefix: Prefix,
    pub(super) link_local: bool,
    message: AddressMessage,
}

/// The addresses of all links that can be used: not those that another host may turn out to have, nor old ones.
pub(super) async fn addresses(net: &Net) -> Result<Vec<Address>, PodNetworkError> {
    let messages: Result<Vec<_>, _> = net.handle.address().get().execute().try_collect().await;
    let messages = messages.step(|| "listing the addresses".into(), "try again")?;
    Ok(messages.into_iter().filter_map(usable).collect())
}

fn usable(message: AddressMessage) -> Option<Address> {
    let mut flags = AddressFlags::from_bits_retain(message.header.flags.bits().into());
    let (mut local, mut address) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Flags(all) => flags = *all,
            // On a point-to-point link the other one is the peer's.
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => address = Some(*ip),
            _ => {}
        }
    }
    let unusable = AddressFlags::Tentative | AddressFlags::Dadfailed | AddressFlags::Deprecated;
    let link_local = match message.header.scope {
        AddressScope::Universe | AddressScope::Site => false,
        AddressScope::Link => true,
        _ => return None,
    };
    let prefix = Prefix::new(local.or(address)?, message.header.prefix_len)?;
    let index = message.header.index;
    (!flags.intersects(unusable)).then_some(Address { index, prefix, link_local, message })
}

/// Gives a link an address, usable at once. Without `connected` the kernel makes no route to its network.
pub(super) async fn add_address(
    net: &Net,
    link: &Link,
    prefix: Prefix,
    connected: bool,
) -> Result<(), PodNetworkError> {
    let mut request = net.handle.address().add(link.index, prefix.address(), prefix.length());
    let mut flags = at_once(prefix);
    flags.set(AddressFlags::Noprefixroute, !connected);
    request.message_mut().attributes.push(AddressAttribute::Flags(flags));
    request
        .execute()
        .await
        .step(|| format!("adding address {prefix} to '{}'", link.name), "correct pod-network in apf.json")
}

/// Gives a link an address that it had in another namespace.
pub(super) async fn add_again(net: &Net, link: &Link, address: &Address) -> Result<(), PodNetworkError> {
    let prefix = address.prefix;
    let mut request = net.handle.address().add(link.index, prefix.address(), prefix.length());
    let message = request.message_mut();
    message.header.scope = address.message.header.scope;
    message.attributes.clear();
    let mut flags = at_once(prefix);
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
    request.execute().await.step(|| format!("adding address {prefix} to '{}'", link.name), "add it by hand")
}

/// Nobody else can have it, or it was in use before: it is not asked for first.
fn at_once(prefix: Prefix) -> AddressFlags {
    if prefix.address().is_ipv6() { AddressFlags::Nodad } else { AddressFlags::empty() }
}

pub(super) async fn set_up(net: &Net, link: &Link) -> Result<(), PodNetworkError> {
    let message = LinkUnspec::new_with_index(link.index).up().build();
    let changed = net.handle.link().change(message).execute().await;
    changed.step(|| format!("setting '{}' up", link.name), "look at `ip link` there")
}

pub(super) async fn set_alias(net: &Net, link: &Link, alias: &str) -> Result<(), PodNetworkError> {
    let message = LinkUnspec::new_with_index(link.index)
        .append_extra_attribute(LinkAttribute::IfAlias(alias.to_owned()))
        .build();
    let changed = net.handle.link().change(message).execute().await;
    changed.step(|| format!("marking '{}'", link.name), "look at `ip link` there")
}

/// Moves a link into another namespace, where its index may be another one, and it is down without addresses.
pub(super) async fn hand_over(net: &Net, link: &Link, to: &impl AsFd) -> Result<(), PodNetworkError> {
    let message = LinkUnspec::new_with_index(link.index).setns_by_fd(to.as_fd().as_raw_fd()).build();
    let moved = net.handle.link().change(message).execute().await;
    moved.step(
        || format!("moving '{}' to the other namespace", link.name),
        "see that no interface there has its name already",
    )
}

pub(super) async fn remove(net: &Net, link: &Link) -> Result<(), PodNetworkError> {
    let removed = match net.handle.link().del(link.index).execute().await {
        Err(error) if super::error::is_gone(&error) => Ok(()),
        other => other,
    };
    removed.step(|| format!("removing '{}'", link.name), "remove it by hand with `ip link del`")
}

/// Makes the tunnel: a link in the pod's namespace, whose packets leave by the host's. The kernel makes it where it is
/// wanted, under its name, in one step, so that none is ever half made under another.
pub(super) async fn make_tunnel(
    host: &Net,
    pod: &Net,
    namespace: &impl AsFd,
    spec: &Spec,
    over: &HostInterface,
) -> Result<Link, PodNetworkError> {
    let name = spec.interface.as_str();
    let mut link = LinkVxlan::new(name, spec.id)
        .dev(over.link.index)
        .port(spec.port)
        // There is one other end, whatever anyone sends us.
        .learning(false)
        .setns_by_fd(namespace.as_fd().as_raw_fd());
    link = match (spec.worker_node, over.address) {
        (IpAddr::V4(remote), IpAddr::V4(local)) => link.remote(remote).local(local),
        (remote, local) => link.remote6(v6(remote)).local6(v6(local)),
    };
    if let Some(address) = spec.hardware_address {
        link = link.address(address.bytes().to_vec());
    }
    host.handle.link().add(link.build()).execute().await.step(
        || format!("making VXLAN link '{name}', id {}, port {}, to {}", spec.id, spec.port, spec.worker_node),
        "see that the kernel has VXLAN, and that `ip -d link show type vxlan` has no other link with this id and port",
    )?;
    named(pod, name).await?.ok_or_else(|| PodNetworkError::Taken(name.to_owned()))
}

fn v6(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    }
}

/// Sets the MTU: what is asked for, or the most that fits into the packets of the interface below.
pub(super) async fn set_mtu(
    pod: &Net,
    link: &Link,
    spec: &Spec,
    over: &HostInterface,
) -> Result<u32, PodNetworkError> {
    let overhead = if spec.worker_node.is_ipv4() { OVERHEAD.0 } else { OVERHEAD.1 };
    let mtu = spec.mtu.min(over.link.mtu.saturating_sub(overhead));
    if mtu < spec.mtu {
        log::info!("pod network: MTU {mtu} instead of {}: '{}' takes no more", spec.mtu, over.link.name);
    }
    let message = LinkUnspec::new_with_index(link.index).mtu(mtu).build();
    let changed = pod.handle.link().change(message).execute().await;
    changed.step(
        || format!("setting the MTU of '{}' to {mtu}", link.name),
        "correct pod-network.mtu in apf.json",
    )?;
    Ok(mtu)
}
