//! `external-net-via-pod-vm`: the VM's second interface moves into the pod's namespace, with its addresses and routes,
//! and the pod's default route leaves by it.
//!
//! Before the move the interface gets an alias as a mark. So the next process after a killed agent finds it, and moves it
//! back with the addresses and routes that the kernel reports for it.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd;

use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::link::InfoKind;
use rtnetlink::packet_route::route::{RouteAttribute, RouteMessage, RouteProtocol};
use secure_comms_protocol::limits::POD_NETWORK_WAIT;
use tokio::time::{Instant, timeout_at};

use super::error::{PodNetworkError, Step};
use super::interface::{self, Address, Interface};
use super::ip_route;
use super::netlink::Net;
use super::spec::{InterfaceName, Prefix};

/// The alias that marks an interface of the VM.
const MARK: &str = "secure-comms: the VM's second interface";
/// The routing protocol number of a default route that the VM did not have. Unused by the kernel and by iproute2.
const MADE: u8 = 0x5c;

/// The VM's second interface, with the addresses and routes that move along.
pub(super) struct SecondaryInterface {
    link: Interface,
    addresses: Vec<Address>,
    routes: Vec<RouteMessage>,
}

/// Waits for a second interface with an address, other than the tunnel's.
pub(super) async fn find(tunnel: Option<&InterfaceName>) -> Result<SecondaryInterface, PodNetworkError> {
    let host = Net::host_watched().step(|| "listening to the kernel".into(), "try again")?;
    let deadline = Instant::now() + POD_NETWORK_WAIT;
    loop {
        if let Some(mut second) = look(&host, tunnel).await? {
            add_default(&host, &mut second).await?;
            return Ok(second);
        }
        if timeout_at(deadline, host.changed()).await.is_err() {
            return Err(PodNetworkError::Waited {
                missing: "no second interface with an address".into(),
                seconds: POD_NETWORK_WAIT.as_secs(),
                advice: "give the VM another one, or take external-net-via-pod-vm out of apf.json",
            });
        }
    }
}

/// Moves the interface into the pod's namespace.
///
/// Cancellation: not safe. During the move only this function knows the addresses.
pub(super) async fn move_to_pod(
    host: &Net,
    pod: &Net,
    namespace: &impl AsFd,
    second: SecondaryInterface,
) -> Result<(), PodNetworkError> {
    interface::set_alias(host, &second.link, MARK).await?;
    interface::move_to(host, &second.link, namespace).await?;
    let families: HashSet<u8> =
        second.routes.iter().filter(|route| ip_route::is_default(route)).map(family).collect();
    for other in ip_route::all(pod).await? {
        let replaced = ip_route::is_default(&other) && families.contains(&family(&other));
        if let ([index], true) = (&*ip_route::output_interfaces(&other), replaced) {
            ip_route::remove(pod, carried(&other, *index), "default").await?;
        }
    }
    let link = restore(pod, second).await?;
    log::info!("pod network: '{}' is the pod's, with its addresses and routes", link.name);
    Ok(())
}

/// Moves a marked interface back from the pod's namespace, and removes marks.
pub(super) async fn return_to_host(
    host: &Net,
    pod: &Net,
    namespace: &impl AsFd,
) -> Result<(), PodNetworkError> {
    for link in interface::all(pod).await?.into_iter().filter(|link| link.alias == MARK) {
        let mut second = describe(pod, link).await?;
        second.routes.retain(|route| route.header.protocol != RouteProtocol::from(MADE));
        interface::move_to(pod, &second.link, namespace).await?;
        log::info!("pod network: '{}' is the VM's again", second.link.name);
        restore(host, second).await?;
    }
    for link in interface::all(host).await?.into_iter().filter(|link| link.alias == MARK) {
        interface::set_alias(host, &link, "").await?;
    }
    Ok(())
}

/// The first network card with an address that is used neither by the tunnel nor by the VM's default routes.
async fn look(
    host: &Net,
    tunnel: Option<&InterfaceName>,
) -> Result<Option<SecondaryInterface>, PodNetworkError> {
    let routes = ip_route::all(host).await?;
    let ours = |address: IpAddr| ip_route::default_interface(&routes, address);
    let ours = [ours(Ipv4Addr::UNSPECIFIED.into()), ours(Ipv6Addr::UNSPECIFIED.into())];
    let addresses = interface::addresses(host).await?;
    let second = interface::all(host).await?.into_iter().find(|link| {
        link.ethernet
            && !link.has_controller
            && !matches!(link.kind, Some(InfoKind::Vxlan | InfoKind::Bridge | InfoKind::Tun))
            && !ours.contains(&Some(link.index))
            && tunnel.is_none_or(|tunnel| tunnel.as_str() != link.name)
            && addresses.iter().any(|address| address.index == link.index && !address.link_local)
    });
    match second {
        Some(link) => Ok(Some(describe(host, link).await?)),
        None => Ok(None),
    }
}

/// An interface with its addresses and routes, except those that the kernel adds in any namespace.
async fn describe(net: &Net, link: Interface) -> Result<SecondaryInterface, PodNetworkError> {
    let mut addresses = interface::addresses(net).await?;
    addresses.retain(|address| address.index == link.index && !address.link_local);
    let mut routes = ip_route::all(net).await?;
    routes.retain(|route| {
        let own = matches!(
            route.header.protocol,
            RouteProtocol::Kernel | RouteProtocol::Ra | RouteProtocol::IcmpRedirect
        );
        !own && ip_route::output_interfaces(route) == [link.index]
    });
    // Routes without a gateway first: the gateways of the others are reached by them.
    routes.sort_by_key(|route| ip_route::gateway(route).is_some());
    Ok(SecondaryInterface { link, addresses, routes })
}

/// Adds the VM's default route to an interface that has none, if the gateway is on its network.
async fn add_default(host: &Net, second: &mut SecondaryInterface) -> Result<(), PodNetworkError> {
    for route in ip_route::all(host).await?.iter().filter(|route| ip_route::is_default(route)) {
        let has_one = |own: &RouteMessage| ip_route::is_default(own) && family(own) == family(route);
        let Some(gateway) = ip_route::gateway(route) else { continue };
        let near = second.addresses.iter().any(|address| address.prefix.contains(gateway));
        if near && !second.routes.iter().any(has_one) {
            let destination = Prefix::default_of(gateway);
            let made = ip_route::message(destination, Some(gateway), second.link.index, MADE.into(), 0);
            second.routes.push(made);
        }
    }
    Ok(())
}

/// Sets an interface up after a move: its addresses, then its routes.
async fn restore(net: &Net, second: SecondaryInterface) -> Result<Interface, PodNetworkError> {
    let Some(link) = interface::named(net, &second.link.name).await? else {
        return Err(PodNetworkError::Taken(second.link.name));
    };
    for address in &second.addresses {
        interface::restore_address(net, &link, address).await?;
    }
    interface::set_up(net, &link).await?;
    for route in &second.routes {
        ip_route::append(net, carried(route, link.index), &format!("of '{}'", link.name)).await?;
    }
    Ok(link)
}

/// A copy of a route for another namespace, where its interface has this index.
fn carried(route: &RouteMessage, index: u32) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header = route.header.clone();
    message.attributes = route
        .attributes
        .iter()
        .filter(|attribute| {
            matches!(
                attribute,
                RouteAttribute::Destination(_)
                    | RouteAttribute::Gateway(_)
                    | RouteAttribute::PrefSource(_)
                    | RouteAttribute::Priority(_)
            )
        })
        .cloned()
        .collect();
    message.attributes.push(RouteAttribute::Oif(index));
    message
}

fn family(route: &RouteMessage) -> u8 {
    match route.header.address_family {
        AddressFamily::Inet => 4,
        _ => 6,
    }
}
