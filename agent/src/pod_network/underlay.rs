//! The underlay: the VM's interface that the tunnel's packets leave by.

use std::net::IpAddr;

use secure_comms_protocol::limits::POD_NETWORK_WAIT;
use tokio::time::{Instant, timeout_at};

use super::error::{PodNetworkError, Step};
use super::interface::{self, Interface};
use super::ip_route;
use super::netlink::Net;
use super::spec::{InterfaceName, Spec};

/// The interface and the address that the tunnel's packets leave from.
#[derive(Clone, Debug)]
pub(super) struct Underlay {
    pub(super) link: Interface,
    /// An address of the worker node's family.
    pub(super) address: IpAddr,
}

/// Waits until the interface exists and has an address: DHCP may be slow.
pub(super) async fn find(wanted: Option<&InterfaceName>, spec: &Spec) -> Result<Underlay, PodNetworkError> {
    let host = Net::host_watched().step(|| "listening to the kernel".into(), "try again")?;
    let deadline = Instant::now() + POD_NETWORK_WAIT;
    let mut said = String::new();
    loop {
        let missing = match look(&host, wanted, spec).await? {
            Ok(found) => return Ok(found),
            Err(missing) => missing,
        };
        if said != missing {
            log::info!("pod network: waiting: {missing}");
            said.clone_from(&missing);
        }
        if timeout_at(deadline, host.changed()).await.is_err() {
            let advice = if wanted.is_some() {
                "correct -host-interface, or see why it gets none"
            } else {
                "see why it gets none, or name the interface with -host-interface"
            };
            return Err(PodNetworkError::Waited { missing, seconds: POD_NETWORK_WAIT.as_secs(), advice });
        }
    }
}

/// The interface, or a text that says what is missing.
async fn look(
    host: &Net,
    wanted: Option<&InterfaceName>,
    spec: &Spec,
) -> Result<Result<Underlay, String>, PodNetworkError> {
    let family = if spec.worker_node.is_ipv4() { "IPv4" } else { "IPv6" };
    let default = ip_route::default_interface(&ip_route::all(host).await?, spec.worker_node);
    let links = interface::all(host).await?;
    let found = match wanted {
        Some(name) => links.into_iter().find(|link| link.name == name.as_str()),
        None => links.into_iter().find(|link| Some(link.index) == default),
    };
    let Some(link) = found else {
        return Ok(Err(match wanted {
            Some(name) => format!("no interface '{name}'"),
            None => format!("no default route for {family}"),
        }));
    };
    if spec.dedicated && Some(link.index) == default {
        return Err(PodNetworkError::NotDedicated(link.name));
    }
    let link_local = matches!(spec.worker_node, IpAddr::V6(address) if address.is_unicast_link_local());
    let mut addresses = interface::addresses(host).await?;
    addresses.retain(|address| {
        address.index == link.index
            && address.usable
            && address.link_local == link_local
            && address.prefix.address().is_ipv4() == spec.worker_node.is_ipv4()
    });
    // Prefer an address in the worker node's network.
    let near = addresses.iter().find(|address| address.prefix.contains(spec.worker_node));
    Ok(match near.or(addresses.first()) {
        Some(address) => Ok(Underlay { address: address.prefix.address(), link }),
        None => Err(format!("'{}' has no {family} address", link.name)),
    })
}
