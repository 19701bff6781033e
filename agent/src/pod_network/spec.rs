//! `pod-network` of apf.json: the pod's network as the worker node describes it, valid as a whole.

mod names;
mod read;
mod values;

use std::collections::HashSet;
use std::fmt;
use std::net::IpAddr;

use serde::Deserialize;
use serde_json::Value;

use names::{PROTOCOL_BOOT, PROTOCOLS, SCOPE_LINK, SCOPES, STATE_PERMANENT, STATES};
use read::FieldReader;
use values::{Address, Destination};
pub use values::{HardwareAddress, InterfaceName, Prefix};

/// The largest MTU: Ethernet's 1500 bytes without the headers of VXLAN over IPv4 (50 bytes).
const MTU_MAX: u32 = 1450;
/// The smallest MTU of IPv4 (RFC 791) and of IPv6 (RFC 8200).
const MTU_MIN: (u32, u32) = (68, 1280);
/// The VXLAN port (RFC 7348), unless `vxlan-port` names another.
const VXLAN_PORT: u16 = 4789;

/// `pod-network` as in the file. Unknown keys are ignored.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(rename_all = "kebab-case", default)]
pub struct PodNetworkConfig {
    podip: Value,
    pod_hw_addr: Value,
    interface: Value,
    worker_node_ip: Value,
    tunnel_type: Value,
    routes: Value,
    neighbors: Value,
    mtu: Value,
    vxlan_port: Value,
    vxlan_id: Value,
    dedicated: Value,
    external_net_via_pod_vm: Value,
}

/// All faults of a `pod-network`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Faults(Vec<String>);

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("; "))
    }
}

/// A valid `pod-network`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    pub(super) pod: Prefix,
    /// None if the kernel chooses one.
    pub(super) hardware_address: Option<HardwareAddress>,
    pub(super) interface: InterfaceName,
    pub(super) worker_node: IpAddr,
    pub(super) port: u16,
    pub(super) id: u32,
    pub(super) mtu: u32,
    /// Whether the tunnel must not use the interface of the VM's default route.
    pub(super) dedicated: bool,
    /// Whether the pod's default route leaves by the VM's second interface.
    pub(super) external: bool,
    /// Routes without a gateway first: the gateways of the others are reached by them.
    pub(super) routes: Vec<IpRoute>,
    pub(super) neighbours: Vec<Neighbour>,
    /// What the file says and the network lacks: routes and neighbours that are left out, each with its reason.
    pub(super) remarks: Vec<String>,
}

/// A route in the pod's network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct IpRoute {
    pub(super) destination: Prefix,
    pub(super) gateway: Option<IpAddr>,
    /// None for the tunnel's interface.
    pub(super) device: Option<InterfaceName>,
    pub(super) protocol: u8,
    pub(super) scope: u8,
}

/// An entry of the pod's neighbour table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Neighbour {
    pub(super) address: IpAddr,
    pub(super) hardware_address: Option<HardwareAddress>,
    /// None for the tunnel's interface.
    pub(super) device: Option<InterfaceName>,
    pub(super) state: u16,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RouteConfig {
    dst: Value,
    gw: Value,
    dev: Value,
    protocol: Value,
    scope: Value,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
struct NeighbourConfig {
    ip: Value,
    hw_addr: Value,
    dev: Value,
    state: Value,
}

impl PodNetworkConfig {
    /// Whether there is no pod network: a worker node without one writes empty texts and zeros.
    pub fn is_empty(&self) -> bool {
        [&self.podip, &self.interface, &self.worker_node_ip, &self.tunnel_type]
            .iter()
            .all(|value| value.is_null() || value.as_str() == Some(""))
    }

    /// Checks every value. A route or a neighbour with a fault is left out.
    ///
    /// # Errors
    /// Every fault, if there is one outside the lists.
    pub fn validate(&self) -> Result<Spec, Faults> {
        let mut read = FieldReader::default();
        let pod: Option<Prefix> = read.required("podip", &self.podip, Prefix::EXPECTED);
        let hardware_address = read.parsed("pod-hw-addr", &self.pod_hw_addr, HardwareAddress::EXPECTED);
        let interface = read.required("interface", &self.interface, InterfaceName::EXPECTED);
        let worker_node: Option<Prefix> =
            read.required("worker-node-ip", &self.worker_node_ip, Prefix::EXPECTED);
        match read.text("tunnel-type", &self.tunnel_type) {
            Some("vxlan") => {}
            Some(other) => {
                read.fault("tunnel-type", &format!("'{other}' is not supported; expected 'vxlan'"))
            }
            None => read.missing("tunnel-type", &self.tunnel_type, "'vxlan'"),
        }
        let port = read.number("vxlan-port", &self.vxlan_port, 0..=u16::MAX);
        let id = read.number("vxlan-id", &self.vxlan_id, 0..=(1 << 24) - 1);
        let mtu = read.number("mtu", &self.mtu, 0..=u32::MAX);
        if let (Some(mtu), Some(pod)) = (mtu, pod) {
            let min = if pod.address().is_ipv4() { MTU_MIN.0 } else { MTU_MIN.1 };
            if (1..min).contains(&mtu) {
                read.fault("mtu", &format!("{mtu} is too small; expected at least {min}"));
            }
        }
        let dedicated = read.flag("dedicated", &self.dedicated);
        let external = read.flag("external-net-via-pod-vm", &self.external_net_via_pod_vm);
        let family = pod.map(|pod| pod.address());
        let mut routes =
            read.list("routes", &self.routes, |read, key, route| IpRoute::read(read, key, &route, family));
        routes.sort_by_key(|route| route.gateway.is_some());
        if let Some(tunnel) = &interface {
            drop_repeated(&mut routes, tunnel);
        }
        let neighbours =
            read.list("neighbors", &self.neighbors, |read, key, entry| Neighbour::read(read, key, &entry));
        if let (Some(pod), Some(interface), Some(worker_node), []) =
            (pod, interface, worker_node, &*read.faults)
        {
            return Ok(Spec {
                pod,
                hardware_address,
                interface,
                worker_node: worker_node.address(),
                port: port.filter(|&port| port != 0).unwrap_or(VXLAN_PORT),
                // Zero is a valid id: where ids start at zero, it is the first pod's.
                id: id.unwrap_or(0),
                mtu: mtu.filter(|&mtu| mtu != 0).unwrap_or(MTU_MAX).min(MTU_MAX),
                dedicated,
                external,
                routes,
                neighbours,
                remarks: read.remarks,
            });
        }
        Err(Faults([read.faults, read.remarks].concat()))
    }
}

impl IpRoute {
    fn read(read: &mut FieldReader, key: &str, config: &RouteConfig, pod: Option<IpAddr>) -> Option<Self> {
        let destination = read.parsed(&format!("{key}.dst"), &config.dst, Destination::EXPECTED);
        let destination = match destination {
            Some(Destination::Network(prefix)) => Some(prefix),
            Some(Destination::Default) | None => None,
        };
        let gateway = read.parsed(&format!("{key}.gw"), &config.gw, Address::EXPECTED);
        // 0.0.0.0 is no gateway: tables of routes show it where there is none.
        let gateway = gateway.map(|Address(gateway)| gateway).filter(|gateway| !gateway.is_unspecified());
        let device = read.parsed(&format!("{key}.dev"), &config.dev, InterfaceName::EXPECTED);
        let protocol = read.named(&format!("{key}.protocol"), &config.protocol, &PROTOCOLS);
        let scope = read.named(&format!("{key}.scope"), &config.scope, &SCOPES);
        if let (Some(destination), Some(gateway)) = (destination, gateway)
            && destination.address().is_ipv4() != gateway.is_ipv4()
        {
            let fault = format!("{gateway} is not of the family of dst {destination}; expected one that is");
            read.fault(&format!("{key}.gw"), &fault);
        }
        // Without a destination it is the default route.
        let destination = destination.or_else(|| gateway.or(pod).map(Prefix::default_of))?;
        // A route without a gateway has link scope. With universe scope the kernel would not reach gateways by it.
        let default_scope = if gateway.is_none() && destination.address().is_ipv4() { SCOPE_LINK } else { 0 };
        Some(Self {
            destination: destination.network(),
            gateway,
            device,
            protocol: byte(protocol).unwrap_or(PROTOCOL_BOOT),
            scope: byte(scope).unwrap_or(default_scope),
        })
    }
}

impl Neighbour {
    fn read(read: &mut FieldReader, key: &str, config: &NeighbourConfig) -> Option<Self> {
        let hardware_address =
            read.parsed(&format!("{key}.hw-addr"), &config.hw_addr, HardwareAddress::EXPECTED);
        let device = read.parsed(&format!("{key}.dev"), &config.dev, InterfaceName::EXPECTED);
        let state = read.named(&format!("{key}.state"), &config.state, &STATES);
        let Address(address) = read.required(&format!("{key}.ip"), &config.ip, Address::EXPECTED)?;
        Some(Self {
            address,
            hardware_address,
            device,
            state: state.filter(|&state| state != 0).unwrap_or(STATE_PERMANENT),
        })
    }
}

/// A number that was read in a byte's range; none for zero, which means the default.
fn byte(number: Option<u16>) -> Option<u8> {
    number.and_then(|number| u8::try_from(number).ok()).filter(|&number| number != 0)
}

/// Keeps the first of routes to one destination by one gateway and interface.
fn drop_repeated(routes: &mut Vec<IpRoute>, tunnel: &InterfaceName) {
    let mut seen = HashSet::new();
    routes.retain(|route| {
        let device = route.device.as_ref().unwrap_or(tunnel);
        seen.insert((route.destination, route.gateway, device.clone()))
    });
}

#[cfg(test)]
#[path = "spec_tests.rs"]
mod tests;
