//! Runs the real programs, and sets the scene of a test around them.
//!
//! - [`binaries`]: where the programs under test are, and that they are built from this source;
//! - [`process`]: runs them, keeps their logs, waits for log lines;
//! - [`test_namespace`]: network namespaces that are removed when dropped;
//! - [`pod_keys`]: the keys that an adaptor would have made for a pod;
//! - [`drawn`]: ports and ids at random;
//! - [`kept_directory`]: where a scene has its files, and how a later process continues it;
//! - [`scene`]: one pod with everything around it, on this machine's loopback;
//! - [`control_channel`]: the control channel by hand, over the stock client;
//! - [`routed_path`]: worker node and VM in network namespaces, with a router between them that has faults;
//! - [`session_pod`]: one pod at unix sockets only, for the faults of the line between its programs;
//! - [`pod_runtime`]: the runtime with its open calls, and its patience;
//! - [`shim`]: the runtime with a remote hypervisor: it has a VM made, and is its pod's [`pod_runtime`];
//! - [`steady`]: a stream with a byte each way in steady steps;
//! - [`busy_pod`]: all of these together;
//! - [`cloud`]: VMs at addresses of their own; [`caa_node`]: a worker node with CAA and `serve`, whose VMs these are;
//! - [`pod_networks`]: the pods' network namespaces on that node;
//! - [`vm`]: the same with the VM's programs in network namespaces;
//! - [`pod_site`]: the VM's and the worker node's ends of a pod's network.

pub mod binaries;
pub mod process;
pub mod test_namespace;

pub mod pod_keys;

pub mod busy_pod;
pub mod caa_node;
pub mod cloud;
pub mod control_channel;
pub mod drawn;
pub mod kept_directory;
pub mod pod_networks;
pub mod pod_runtime;
pub mod pod_site;
pub mod routed_path;
pub mod scene;
pub mod session_pod;
pub mod shim;
pub mod steady;
pub mod vm;
