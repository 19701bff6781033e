//! `external-net-via-pod-vm`: the VM's second interface moves into the pod's namespace, with its addresses and routes,
//! and the pod's default route leaves by it.
//!
//! A move is a transaction: the kernel drops the addresses and routes of an interface that leaves a namespace, so they are
//! described before it leaves and kept until it is back ([`Kept`]). What can't be restored is named, the rest is restored.
//!
//! Before the move the interface gets an alias as a mark. So the next process after a killed agent finds it, and moves it
//! back with the addresses and routes that the kernel reports for it then.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd;
use std::time::Duration;

use rtnetlink::packet_route::link::InfoKind;
use rtnetlink::packet_route::route::{RouteMessage, RouteProtocol};
use secure_comms_protocol::limits::POD_NETWORK_WAIT;
use tokio::time::{Instant, timeout_at};

use super::error::{PodNetworkError, Step, list};
use super::interface::{self, Address, Interface};
use super::ip_route;
use super::netlink::Net;
use super::restore::{other_default, replace_defaults, restore};
use super::spec::{InterfaceName, Prefix};

/// The alias that marks an interface of the VM.
const MARK: &str = "secure-comms: the VM's second interface";
/// The routing protocol number of a default route that the VM did not have. Unused by the kernel and by iproute2.
const MADE: u8 = 0x5c;
/// Time that an interface with an address has to get its default route: a DHCP client adds the one after the other.
const DEFAULT_ROUTE_WAIT: Duration = Duration::from_secs(5);

/// The VM's second interface, with the addresses and routes that move along.
#[derive(Clone, Debug)]
pub(super) struct SecondaryInterface {
    link: Interface,
    addresses: Vec<Address>,
    routes: Vec<RouteMessage>,
}

/// The interface as it was in the VM's namespace, while it is not there.
pub(super) type Kept = Option<SecondaryInterface>;

impl SecondaryInterface {
    fn has_default(&self) -> bool {
        self.routes.iter().any(ip_route::is_default)
    }
}

/// Waits for a second interface with an address, other than the tunnel's, and then a little for its default route.
pub(super) async fn find(tunnel: Option<&InterfaceName>) -> Result<SecondaryInterface, PodNetworkError> {
    let host = Net::host_watched().step(|| "listening to the kernel".into(), "try again")?;
    let deadline = Instant::now() + POD_NETWORK_WAIT;
    let mut settled = None;
    loop {
        let second = look(&host, tunnel).await?;
        let until = match &second {
            Some(second) if second.has_default() => Instant::now(),
            Some(_) => *settled.get_or_insert_with(|| Instant::now() + DEFAULT_ROUTE_WAIT),
            None => {
                settled = None;
                deadline
            }
        };
        let late = Instant::now() >= until || timeout_at(until, host.changed()).await.is_err();
        match second {
            Some(second) if late => return Ok(second),
            None if late => {
                return Err(PodNetworkError::Waited {
                    missing: "no second interface with an address".into(),
                    seconds: POD_NETWORK_WAIT.as_secs(),
                    advice: "give the VM another one, or take external-net-via-pod-vm out of apf.json",
                });
            }
            _ => {}
        }
    }
}

/// Moves the interface into the pod's namespace. Addresses and routes that the pod's namespace refuses are named in a warning.
///
/// Cancellation: not safe. During the move only the caller knows the addresses.
///
/// # Errors
/// The interface can't be moved, or has no address after the move. The caller then moves it back.
pub(super) async fn move_to_pod(
    host: &Net,
    pod: &Net,
    namespace: &impl AsFd,
    second: &SecondaryInterface,
) -> Result<(), PodNetworkError> {
    let name = &second.link.name;
    interface::set_alias(host, &second.link, MARK).await?;
    interface::move_to(host, &second.link, namespace).await?;
    let Some(link) = marked(pod).await?.into_iter().next() else {
        return Err(std::io::Error::from(std::io::ErrorKind::NotFound))
            .step(|| format!("looking for '{name}' in the pod's namespace"), "look at `ip link` there");
    };
    let others = ip_route::all(pod).await?;
    let others: Vec<_> = others.iter().filter_map(|route| other_default(route, &link)).collect();
    let (defaults, near): (Vec<_>, Vec<_>) =
        second.routes.iter().partition(|route| ip_route::is_default(route));
    let mut errors = restore(pod, &link, &second.addresses, &near).await;
    let has_address = interface::addresses(pod).await?.iter().any(|address| is_global_of(address, &link));
    if !has_address {
        return Err(PodNetworkError::Incomplete { name: name.clone(), errors });
    }
    errors.extend(replace_defaults(pod, &link, &defaults, &others).await);
    if errors.is_empty() {
        log::info!("pod network: '{name}' is the pod's, with its addresses and routes");
    } else {
        log::warn!(
            "pod network: '{name}' is the pod's, but not with all addresses and routes: {}",
            list(&errors)
        );
    }
    if defaults.is_empty() {
        log::warn!(
            "pod network: '{name}' has no default route, and the VM's gateway is not in its networks: the pod's default \
             route stays on the tunnel; give '{name}' a default route in the VM before the agent starts"
        );
    }
    Ok(())
}

/// Moves a marked interface back from the pod's namespace (none if that is gone), as `kept` or else the kernel describes it.
///
/// Cancellation: not safe. During the move only this function knows the addresses.
///
/// # Errors
/// Each part that failed; the others are done.
pub(super) async fn return_to_host(
    host: &Net,
    pod: Option<&Net>,
    namespace: &impl AsFd,
    kept: &mut Kept,
) -> Result<(), PodNetworkError> {
    let mut errors = Vec::new();
    if let Some(pod) = pod {
        for link in marked(pod).await? {
            if kept.is_none() {
                *kept = Some(describe(pod, link.clone()).await?);
            }
            match interface::move_to(pod, &link, namespace).await {
                Ok(()) => log::info!("pod network: '{}' is the VM's again", link.name),
                Err(error) => errors.push(error),
            }
        }
    }
    for link in marked(host).await? {
        if let Some(second) = kept.take() {
            let made = |route: &&RouteMessage| route.header.protocol == RouteProtocol::from(MADE);
            let routes: Vec<_> = second.routes.iter().filter(|route| !made(route)).collect();
            errors.extend(restore(host, &link, &second.addresses, &routes).await);
        }
        if let Err(error) = interface::set_alias(host, &link, "").await {
            errors.push(error);
        }
    }
    if errors.is_empty() { Ok(()) } else { Err(PodNetworkError::Undo(errors)) }
}

async fn marked(net: &Net) -> Result<Vec<Interface>, PodNetworkError> {
    let mut links = interface::all(net).await?;
    links.retain(|link| link.alias == MARK);
    Ok(links)
}

fn is_global_of(address: &Address, link: &Interface) -> bool {
    address.index == link.index && !address.link_local
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
            && addresses.iter().any(|address| address.usable && is_global_of(address, link))
    });
    let Some(link) = second else { return Ok(None) };
    let mut second = describe(host, link).await?;
    add_default(&routes, &mut second);
    Ok(Some(second))
}

/// An interface with its addresses and routes, except those that the kernel adds in any namespace.
async fn describe(net: &Net, link: Interface) -> Result<SecondaryInterface, PodNetworkError> {
    let mut addresses = interface::addresses(net).await?;
    addresses.retain(|address| is_global_of(address, &link));
    let mut routes = ip_route::of_all_tables(net).await?;
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
fn add_default(routes: &[RouteMessage], second: &mut SecondaryInterface) {
    for route in routes.iter().filter(|route| ip_route::is_default(route)) {
        let has_one = |own: &RouteMessage| {
            ip_route::is_default(own) && own.header.address_family == route.header.address_family
        };
        let Some(gateway) = ip_route::gateway(route) else { continue };
        let near = second.addresses.iter().any(|address| address.prefix.contains(gateway));
        if near && !second.routes.iter().any(has_one) {
            let destination = Prefix::default_of(gateway);
            let made = ip_route::message(destination, Some(gateway), second.link.index, MADE.into(), 0);
            second.routes.push(made);
        }
    }
}
