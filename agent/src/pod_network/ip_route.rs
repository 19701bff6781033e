//! IP routes and neighbours.

use std::net::IpAddr;

use futures_util::{StreamExt, TryStreamExt};
use nix::errno::Errno;
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteType,
};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};

use rtnetlink::{Error as NetlinkError, RouteMessageBuilder};

use super::error::{PodNetworkError, Step, already_exists, cause, is_gone, is_refused};
use super::interface::{self, Interface};
use super::netlink::Net;
use super::spec::{InterfaceName, IpRoute, Neighbour, Prefix, Spec};

/// RT_TABLE_LOCAL: the kernel's routes to this machine's own addresses.
const TABLE_LOCAL: u8 = 255;

/// Every unicast route of a namespace's main table.
pub(super) async fn all(net: &Net) -> Result<Vec<RouteMessage>, PodNetworkError> {
    let mut routes = of_all_tables(net).await?;
    routes.retain(is_main);
    Ok(routes)
}

/// Every unicast route of a namespace, except those of the local table, which the kernel makes.
pub(super) async fn of_all_tables(net: &Net) -> Result<Vec<RouteMessage>, PodNetworkError> {
    let request = net.handle.route().get(RouteMessageBuilder::<IpAddr>::new().build());
    let routes: Result<Vec<_>, _> = request.execute().try_collect().await;
    let mut routes = routes.step(|| "listing the routes".into(), "try again")?;
    routes.retain(|route| {
        let header = &route.header;
        header.kind == RouteType::Unicast
            && header.table != TABLE_LOCAL
            && matches!(header.address_family, AddressFamily::Inet | AddressFamily::Inet6)
    });
    Ok(routes)
}

fn is_main(route: &RouteMessage) -> bool {
    route.header.table == RouteHeader::RT_TABLE_MAIN
}

/// Whether it is a default route of the main table.
pub(super) fn is_default(route: &RouteMessage) -> bool {
    route.header.destination_prefix_length == 0 && is_main(route)
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

/// The address of a route's destination; none for a default route.
fn destination(route: &RouteMessage) -> Option<&RouteAddress> {
    route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(address) => Some(address),
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

/// Adds the routes and the neighbours of a spec. Returns those that are left out, each with its reason: the namespace lacks
/// their interface, or the kernel refuses them. The pod has the rest of its network.
///
/// # Errors
/// The kernel takes no requests.
pub(super) async fn add_all(
    pod: &Net,
    tunnel: &Interface,
    spec: &Spec,
) -> Result<Vec<String>, PodNetworkError> {
    let links = interface::all(pod).await?;
    let mut left_out = Vec::new();
    let mut leave_out = |what: String, why: String| left_out.push(format!("{what} is left out: {why}"));
    for route in &spec.routes {
        let what = format!("route {}", describe(route));
        match index(&links, tunnel, route.device.as_ref()) {
            Err(missing) => leave_out(what, missing),
            Ok(index) => match add(pod, as_message(route, index), &what).await? {
                Ok(()) => {}
                Err(refused) => leave_out(what, refused),
            },
        }
    }
    for neighbour in &spec.neighbours {
        let what = format!("neighbour {}", neighbour.address);
        match index(&links, tunnel, neighbour.device.as_ref()) {
            Err(missing) => leave_out(what, missing),
            Ok(index) => match refusal(add_neighbour(pod, neighbour, index).await, &what)? {
                Ok(()) => {}
                Err(refused) => leave_out(what, refused),
            },
        }
    }
    Ok(left_out)
}

/// Adds a route unless it exists. The inner error says why the kernel refuses it.
async fn add(pod: &Net, route: RouteMessage, what: &str) -> Result<Result<(), String>, PodNetworkError> {
    let same = |other: &RouteMessage| {
        other.header.address_family == route.header.address_family
            && other.header.destination_prefix_length == route.header.destination_prefix_length
            && destination(other) == destination(&route)
            && gateway(other) == gateway(&route)
            && output_interfaces(other) == output_interfaces(&route)
    };
    match pod.handle.route().add(route.clone()).execute().await {
        Err(error) if already_exists(&error) => {
            let exists = all(pod).await?.iter().any(same);
            Ok(if exists { Ok(()) } else { Err("another route has this destination".into()) })
        }
        added => refusal(added, what),
    }
}

/// Separates what the kernel refuses (inner error) from what fails for another reason, such as a missing right.
fn refusal(done: Result<(), NetlinkError>, what: &str) -> Result<Result<(), String>, PodNetworkError> {
    match done {
        Err(error) if is_refused(&error) => Ok(Err(reason(error))),
        done => done.step(|| format!("adding {what}"), "try again").map(Ok),
    }
}

fn reason(error: NetlinkError) -> String {
    let source = cause(error);
    let advice = match source.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENETUNREACH | Errno::EHOSTUNREACH) => "no route without a gateway leads to its gateway",
        Some(Errno::EACCES) => "IPv6 may be off there (sysctl net.ipv6.conf.all.disable_ipv6)",
        _ => "correct pod-network in apf.json",
    };
    format!("{source}; {advice}")
}

/// Adds the default routes of a spec that are missing.
pub(super) async fn add_defaults(pod: &Net, tunnel: &Interface, spec: &Spec) -> Result<(), PodNetworkError> {
    let links = interface::all(pod).await?;
    for route in spec.routes.iter().filter(|route| route.destination.length() == 0) {
        // A route that the set-up left out stays out.
        if let Ok(index) = index(&links, tunnel, route.device.as_ref()) {
            append(pod, as_message(route, index), &describe(route)).await?;
        }
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

/// The index of a route's interface, or a text that says which is missing.
fn index(links: &[Interface], tunnel: &Interface, device: Option<&InterfaceName>) -> Result<u32, String> {
    let Some(device) = device.filter(|device| device.as_str() != tunnel.name) else {
        return Ok(tunnel.index);
    };
    let found = links.iter().find(|link| link.name == device.as_str());
    found.map(|link| link.index).ok_or_else(|| format!("the pod's namespace has no interface '{device}'"))
}

async fn add_neighbour(pod: &Net, neighbour: &Neighbour, index: u32) -> Result<(), NetlinkError> {
    let mut request =
        pod.handle.neighbours().add(index, neighbour.address).state(neighbour.state.into()).replace();
    if let Some(address) = neighbour.hardware_address {
        request = request.link_layer_address(address.bytes());
    }
    request.execute().await
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
