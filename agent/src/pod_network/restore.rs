//! The addresses and routes of an interface after its move to another namespace.
//!
//! Everything that can be restored is, whatever fails; what exists already counts as restored, because a DHCP client or an
//! earlier attempt may have been quicker.

use std::time::Duration;

use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::route::{RouteAttribute, RouteFlags, RouteMessage};
use tokio::time::sleep;

use super::error::PodNetworkError;
use super::interface::{self, Address, Interface};
use super::ip_route;
use super::netlink::Net;

/// Pause before what could not be restored is tried once more.
const PAUSE: Duration = Duration::from_millis(200);

/// Sets an interface up after a move: all its addresses, then its routes. What exists counts as restored; what fails is tried
/// once more. Returns what is missing in the end.
pub(super) async fn restore(
    net: &Net,
    link: &Interface,
    addresses: &[Address],
    routes: &[&RouteMessage],
) -> Vec<PodNetworkError> {
    if restore_once(net, link, addresses, routes).await.is_empty() {
        return Vec::new();
    }
    sleep(PAUSE).await;
    restore_once(net, link, addresses, routes).await
}

async fn restore_once(
    net: &Net,
    link: &Interface,
    addresses: &[Address],
    routes: &[&RouteMessage],
) -> Vec<PodNetworkError> {
    let mut errors = Vec::new();
    for address in addresses {
        errors.extend(interface::restore_address(net, link, address).await.err());
    }
    errors.extend(interface::set_up(net, link).await.err());
    for route in routes {
        errors.extend(append_to(net, route, link).await.err());
    }
    errors
}

async fn append_to(net: &Net, route: &RouteMessage, link: &Interface) -> Result<(), PodNetworkError> {
    ip_route::append(net, carried(route, link.index), &format!("of '{}'", link.name)).await
}

/// Replaces the `others` by the interface's own default routes, family by family. Where none of its own can be added, the
/// others are put back.
pub(super) async fn replace_defaults(
    pod: &Net,
    link: &Interface,
    own: &[&RouteMessage],
    others: &[RouteMessage],
) -> Vec<PodNetworkError> {
    let mut errors = Vec::new();
    let mut families = Vec::new();
    for route in others.iter().filter(|other| own.iter().any(|own| family(own) == family(other))) {
        errors.extend(ip_route::remove(pod, route.clone(), "default").await.err());
    }
    for route in own {
        match append_to(pod, route, link).await {
            Ok(()) => families.push(family(route)),
            Err(error) => errors.push(error),
        }
    }
    for route in others.iter().filter(|other| !families.contains(&family(other))) {
        errors.extend(ip_route::append(pod, route.clone(), "default").await.err());
    }
    errors
}

/// A copy of a route for another namespace, where its interface has this index.
fn carried(route: &RouteMessage, index: u32) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header = route.header.clone();
    // The others are a state, such as a link that is down, and the kernel refuses them.
    message.header.flags &= RouteFlags::Onlink;
    message.attributes = route
        .attributes
        .iter()
        .filter(|attribute| {
            matches!(
                attribute,
                RouteAttribute::Destination(_)
                    | RouteAttribute::Gateway(_)
                    | RouteAttribute::Via(_)
                    | RouteAttribute::PrefSource(_)
                    | RouteAttribute::Priority(_)
                    | RouteAttribute::Metrics(_)
                    | RouteAttribute::Preference(_)
                    | RouteAttribute::Table(_)
            )
        })
        .cloned()
        .collect();
    message.attributes.push(RouteAttribute::Oif(index));
    message
}

/// A copy of a route, if it is a default route by one other interface.
pub(super) fn other_default(route: &RouteMessage, link: &Interface) -> Option<RouteMessage> {
    match *ip_route::output_interfaces(route) {
        [index] if index != link.index && ip_route::is_default(route) => Some(carried(route, index)),
        _ => None,
    }
}

fn family(route: &RouteMessage) -> AddressFamily {
    route.header.address_family
}
