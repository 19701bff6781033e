//! IP routes and neighbours.

use std::net::IpAddr;

use futures_util::{StreamExt, TryStreamExt};
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteType,
};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};

use rtnetlink::{Error as NetlinkError, RouteMessageBuilder};

use super::error::{PodNetworkError, Step, already_exists, is_gone};
use super::interface::{self, Interface};
use super::netlink::Net;
use super::spec::{InterfaceName, IpRoute, Neighbour, Prefix, Spec};

/// Every unicast route of a namespace's main table.
pub(super) async fn all(net: &Net) -> Result<Vec<RouteMessage>, PodNetworkError> {
    let request = net.handle.route().get(RouteMessageBuilder::<IpAddr>::new().build());
    let routes: Result<Vec<_>, _> = request.execute().try_collect().await;
    let mut routes = routes.step(|| "listing the routes".into(), "try again")?;
    routes.retain(|route| {
        let header = &route.header;
        header.kind == RouteType::Unicast
            && header.table == RouteHeader::RT_TABLE_MAIN
            && matches!(header.address_family, AddressFamily::Inet | AddressFamily::Inet6)
    });
    Ok(routes)
}

pub(super) fn is_default(route: &RouteMessage) -> bool {
    route.header.destination_prefix_length == 0
}

/// Indexes of the interfaces that a route sends packets out of.
pub(super) fn output_interfaces(route: &RouteMessage) -> Vec<u32> {
    let by = |attribute: &RouteAttribute| match attribute {
        RouteAttribute::Oif(index) => vec![*index],
        RouteAttribute::MultiPath(hops) => hops.iter().map(|hop| hop.interface_index).collect(),
        _ => Vec::new(),
    };
    route.attributes.iter().flat_map(by).collect()
}

pub(super) fn gateway(route: &RouteMessage) -> Option<IpAddr> {
    route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Gateway(RouteAddress::Inet(address)) => Some((*address).into()),
        RouteAttribute::Gateway(RouteAddress::Inet6(address)) => Some((*address).into()),
        _ => None,
    })
}

/// The metric of a route; lower ones are preferred.
pub(super) fn metric(route: &RouteMessage) -> u32 {
    let metric = |attribute: &RouteAttribute| match attribute {
        RouteAttribute::Priority(metric) => Some(*metric),
        _ => None,
    };
    route.attributes.iter().find_map(metric).unwrap_or(0)
}

/// The interface of the preferred default route of `address`' family.
pub(super) fn default_interface(routes: &[RouteMessage], address: IpAddr) -> Option<u32> {
    let family = family(address);
    let defaults = routes.iter().filter(|route| is_default(route) && route.header.address_family == family);
    defaults
        .flat_map(|route| output_interfaces(route).into_iter().map(|index| (metric(route), index)))
        .min()
        .map(|best| best.1)
}

fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

pub(super) fn message(
    destination: Prefix,
    gateway: Option<IpAddr>,
    index: u32,
    protocol: RouteProtocol,
    scope: u8,
) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header = RouteHeader {
        address_family: family(destination.address()),
        destination_prefix_length: destination.length(),
        table: RouteHeader::RT_TABLE_MAIN,
        protocol,
        scope: scope.into(),
        kind: RouteType::Unicast,
        ..RouteHeader::default()
    };
    if destination.length() != 0 {
        message.attributes.push(RouteAttribute::Destination(destination.address().into()));
    }
    message.attributes.extend(gateway.map(|gateway| RouteAttribute::Gateway(gateway.into())));
    message.attributes.push(RouteAttribute::Oif(index));
    message
}

/// Adds a route. Others to the same destination stay, because two interfaces may have one each. Does nothing if the route
/// exists.
pub(super) async fn append(net: &Net, route: RouteMessage, what: &str) -> Result<(), PodNetworkError> {
    let mut request = NetlinkMessage::from(RouteNetlinkMessage::NewRoute(route));
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_APPEND;
    let answered = async {
        let mut answers = net.handle.clone().request(request)?;
        while let Some(answer) = answers.next().await {
            if let NetlinkPayload::Error(error) = answer.payload {
                return Err(NetlinkError::NetlinkError(error));
            }
        }
        Ok(())
    };
    let appended = match answered.await {
        Err(error) if already_exists(&error) => Ok(()),
        other => other,
    };
    appended.step(|| format!("adding route {what}"), "look at `ip route` there")
}

/// Removes a route, if it exists.
pub(super) async fn remove(net: &Net, route: RouteMessage, what: &str) -> Result<(), PodNetworkError> {
    let removed = match net.handle.route().del(route).execute().await {
        Err(error) if is_gone(&error) => Ok(()),
        other => other,
    };
    removed.step(|| format!("removing route {what}"), "remove it by hand with `ip route del`")
}

/// Adds the routes and the neighbours of a spec.
pub(super) async fn add_all(pod: &Net, tunnel: &Interface, spec: &Spec) -> Result<(), PodNetworkError> {
    for route in &spec.routes {
        let index = index(pod, tunnel, route.device.as_ref()).await?;
        pod.handle.route().add(as_message(route, index)).execute().await.step(
            || format!("adding route {}", describe(route)),
            "a gateway must be reached by a route without one, and no two routes may have one destination; correct \
             pod-network.routes in apf.json",
        )?;
    }
    for neighbour in &spec.neighbours {
        let index = index(pod, tunnel, neighbour.device.as_ref()).await?;
        add_neighbour(pod, neighbour, index).await?;
    }
    Ok(())
}

/// Adds the default routes of a spec that are missing.
pub(super) async fn add_defaults(pod: &Net, tunnel: &Interface, spec: &Spec) -> Result<(), PodNetworkError> {
    for route in spec.routes.iter().filter(|route| route.destination.length() == 0) {
        let index = index(pod, tunnel, route.device.as_ref()).await?;
        append(pod, as_message(route, index), &describe(route)).await?;
    }
    Ok(())
}

/// Removes the routes and neighbours of other interfaces than the tunnel's, which are removed along with the tunnel.
pub(super) async fn remove_foreign(pod: &Net, spec: &Spec) -> Result<(), PodNetworkError> {
    let foreign = |device: &Option<InterfaceName>| device.clone().filter(|device| *device != spec.interface);
    for route in &spec.routes {
        let Some(device) = foreign(&route.device) else { continue };
        let Some(link) = interface::named(pod, device.as_str()).await? else { continue };
        remove(pod, as_message(route, link.index), &describe(route)).await?;
    }
    for neighbour in &spec.neighbours {
        let Some(device) = foreign(&neighbour.device) else { continue };
        let Some(link) = interface::named(pod, device.as_str()).await? else { continue };
        remove_neighbour(pod, neighbour, link.index).await?;
    }
    Ok(())
}

fn as_message(route: &IpRoute, index: u32) -> RouteMessage {
    message(route.destination, route.gateway, index, route.protocol.into(), route.scope)
}

fn describe(route: &IpRoute) -> String {
    match route.gateway {
        Some(gateway) => format!("{} by {gateway}", route.destination),
        None => route.destination.to_string(),
    }
}

async fn index(
    pod: &Net,
    tunnel: &Interface,
    device: Option<&InterfaceName>,
) -> Result<u32, PodNetworkError> {
    let Some(device) = device.filter(|device| device.as_str() != tunnel.name) else {
        return Ok(tunnel.index);
    };
    let found =
        interface::named(pod, device.as_str()).await?.ok_or_else(|| std::io::ErrorKind::NotFound.into());
    let found: std::io::Result<Interface> = found;
    let advice = "correct dev in pod-network.routes and pod-network.neighbors in apf.json";
    Ok(found.step(|| format!("looking for interface '{device}' in the pod's namespace"), advice)?.index)
}

async fn add_neighbour(pod: &Net, neighbour: &Neighbour, index: u32) -> Result<(), PodNetworkError> {
    let mut request =
        pod.handle.neighbours().add(index, neighbour.address).state(neighbour.state.into()).replace();
    if let Some(address) = neighbour.hardware_address {
        request = request.link_layer_address(address.bytes());
    }
    let advice = "correct pod-network.neighbors in apf.json";
    request.execute().await.step(|| format!("adding neighbour {}", neighbour.address), advice)
}

async fn remove_neighbour(pod: &Net, neighbour: &Neighbour, index: u32) -> Result<(), PodNetworkError> {
    let mut message = NeighbourMessage::default();
    message.header.family = family(neighbour.address);
    message.header.ifindex = index;
    message.attributes.push(NeighbourAttribute::Destination(match neighbour.address {
        IpAddr::V4(address) => NeighbourAddress::Inet(address),
        IpAddr::V6(address) => NeighbourAddress::Inet6(address),
    }));
    let removed = match pod.handle.neighbours().del(message).execute().await {
        Err(error) if is_gone(&error) => Ok(()),
        other => other,
    };
    removed.step(|| format!("removing neighbour {}", neighbour.address), "remove it with `ip neigh del`")
}
