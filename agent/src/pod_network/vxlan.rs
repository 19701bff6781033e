//! The tunnel itself: a VXLAN interface, and its MTU.

use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd};

use rtnetlink::{LinkUnspec, LinkVxlan};

use super::error::{PodNetworkError, Step};
use super::interface::{self, Interface};
use super::netlink::Net;
use super::spec::Spec;
use super::underlay::Underlay;

/// Bytes of the outer IP, UDP, VXLAN and inner Ethernet headers, for IPv4 and IPv6.
const OVERHEAD: (u32, u32) = (50, 70);

/// Adds the tunnel: an interface in the pod's namespace, whose packets leave by the underlay. The kernel makes it there, with
/// its name, in one step, so that an interruption leaves nothing half made.
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
        // The only other end is the worker node: received packets must not add more.
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

/// Sets the MTU of the spec, or the largest that fits into the underlay's packets.
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
