//! The tunnel itself: a VXLAN link, and its MTU.

use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd};

use rtnetlink::{LinkUnspec, LinkVxlan};

use super::error::{PodNetworkError, Step};
use super::interface::{self, Interface};
use super::netlink::Net;
use super::spec::Spec;
use super::underlay::Underlay;

/// What an IP, a UDP, a VXLAN and an inner Ethernet header take of the tunnel's interface's MTU.
const OVERHEAD: (u32, u32) = (50, 70);

/// Makes the tunnel: a link in the pod's namespace, whose packets leave by the host's. The kernel makes it where it is
/// wanted, under its name, in one step, so that none is ever half made under another.
pub(super) async fn add(
    host: &Net,
    pod: &Net,
    namespace: &impl AsFd,
    spec: &Spec,
    over: &Underlay,
) -> Result<Interface, PodNetworkError> {
    let name = spec.interface.as_str();
    let mut request = LinkVxlan::new(name, spec.id)
        .dev(over.link.index)
        .port(spec.port)
        // There is one other end, whatever anyone sends us.
        .learning(false)
        .setns_by_fd(namespace.as_fd().as_raw_fd());
    request = match (spec.worker_node, over.address) {
        (IpAddr::V4(remote), IpAddr::V4(local)) => request.remote(remote).local(local),
        (remote, local) => request.remote6(v6(remote)).local6(v6(local)),
    };
    if let Some(address) = spec.hardware_address {
        request = request.address(address.bytes().to_vec());
    }
    host.handle.link().add(request.build()).execute().await.step(
        || format!("making VXLAN link '{name}', id {}, port {}, to {}", spec.id, spec.port, spec.worker_node),
        "see that the kernel has VXLAN, and that `ip -d link show type vxlan` has no other link with this id and port",
    )?;
    interface::named(pod, name).await?.ok_or_else(|| PodNetworkError::Taken(name.to_owned()))
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
    link: &Interface,
    spec: &Spec,
    over: &Underlay,
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
