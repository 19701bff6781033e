//! The pod's network: a VXLAN tunnel from the pod's namespace to the worker node, as `pod-network` in apf.json says.
//!
//! In: a [`spec`]. Out: links, addresses, routes and rules in the kernel; a status text for systemd. Only these files name
//! rtnetlink. In the order in which the network is made: the VM's interface that the tunnel's packets leave by
//! (`underlay`), rules that let only the worker node's packets in (`firewall`), the tunnel (`vxlan`), its routes and neighbours
//! (`ip_route`), the VM's second interface, where the pod gets it (`secondary`, `restore`). `setup` does these steps and undoes
//! them, `supervisor` retries them.
//!
//! For the undo the kernel's state shows what the agent made. So the next start also undoes what a killed agent, or a set-up
//! that was interrupted, left behind. Only what the second interface had in the VM is remembered: the kernel forgets it.

pub mod spec;

mod supervisor;

mod setup;

mod underlay;
mod vxlan;

mod firewall;
mod ip_route;
mod restore;
mod secondary;

mod interface;
mod netlink;
mod nftables;

mod error;

pub use error::PodNetworkError;
pub use setup::{PodNetwork, set_loopback_up};
