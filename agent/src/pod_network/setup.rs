//! Setting the pod's network up, and undoing it.

use std::fs::File;
use std::io;
use std::sync::Arc;

use secure_comms_tunnel::netns::{Namespace, NamespaceError};
use tokio::sync::{Mutex, watch};

use super::error::{PodNetworkError, Step};
use super::netlink::Net;
use super::secondary::{Kept, SecondaryInterface};
use super::spec::{InterfaceName, Prefix, Spec};
use super::{firewall, interface, ip_route, secondary, underlay, vxlan};

/// Lines about routes and neighbours that are left out, at most.
const REMARKS_MAX: usize = 16;

/// A network for one pod.
#[derive(Clone, Debug)]
pub struct PodNetwork {
    pub(super) spec: Spec,
    namespace: Namespace,
    pub(super) host_interface: Option<InterfaceName>,
    /// Held while the second interface moves, so that no other step sees it half moved.
    pub(super) secondary: Arc<Mutex<Kept>>,
    /// Set once: see [`PodNetwork::open`].
    namespaces: watch::Sender<Option<Arc<Namespaces>>>,
}

/// The pod's network namespace and our own (the host's): sockets in them, and files that refer to them.
#[derive(Debug)]
struct Namespaces {
    pod: Net,
    pod_file: File,
    host: Net,
    host_file: File,
}

impl PodNetwork {
    /// The network of `spec` in `namespace`. Its tunnel leaves the VM by `host_interface`, or by the interface of the default
    /// route.
    pub(crate) fn new(spec: Spec, namespace: Namespace, host_interface: Option<InterfaceName>) -> Self {
        let (secondary, namespaces) = (Arc::default(), watch::Sender::default());
        Self { spec, namespace, host_interface, secondary, namespaces }
    }

    /// Makes the tunnel, after removing the remains of an earlier process. Waits until the underlay has an address, at most
    /// [`POD_NETWORK_WAIT`](secure_comms_protocol::limits::POD_NETWORK_WAIT).
    ///
    /// # Errors
    /// A step failed; the steps before it were undone.
    pub(super) async fn set_up(&self) -> Result<(), PodNetworkError> {
        let namespaces = self.open().await?;
        // The firewall of an earlier process stays until it is replaced.
        self.clear_tunnel(&namespaces).await?;
        let made = self.make(&namespaces).await;
        if made.is_err()
            && let Err(error) = self.clear(&namespaces).await
        {
            log::warn!("pod network: {error}");
        }
        made
    }

    /// Moves the VM's second interface into the pod's namespace. If that fails, moves it back as it was.
    ///
    /// Cancellation: safe. The move then goes on by itself; what comes next waits for it.
    pub(super) async fn move_secondary(&self, second: SecondaryInterface) -> Result<(), PodNetworkError> {
        let namespaces = self.open().await?;
        let network = self.clone();
        let moving = async move {
            let mut kept = network.secondary.lock().await;
            let Namespaces { pod, pod_file, host, host_file } = &*namespaces;
            let moved = secondary::move_to_pod(host, pod, pod_file, kept.insert(second)).await;
            if moved.is_err() {
                let returned = secondary::return_to_host(host, Some(pod), host_file, &mut kept).await;
                for error in [returned, network.add_defaults(pod).await].into_iter().filter_map(Result::err) {
                    log::warn!("pod network: {error}");
                }
            }
            moved
        };
        to_its_end(moving).await
    }

    /// Moves the second interface back after a move whose undo failed.
    ///
    /// Cancellation: safe, as that of [`PodNetwork::move_secondary`].
    pub(super) async fn reclaim_secondary(&self) -> Result<(), PodNetworkError> {
        let moved = self.secondary.lock().await.is_some();
        if moved { self.return_secondary(&self.open().await?).await } else { Ok(()) }
    }

    /// Moves the second interface back, if it is not the VM's.
    ///
    /// Cancellation: safe, as that of [`PodNetwork::move_secondary`].
    async fn return_secondary(&self, namespaces: &Arc<Namespaces>) -> Result<(), PodNetworkError> {
        let (network, namespaces) = (self.clone(), namespaces.clone());
        let returning = async move {
            let mut kept = network.secondary.lock().await;
            let Namespaces { pod, host, host_file, .. } = &*namespaces;
            secondary::return_to_host(host, Some(pod), host_file, &mut kept).await
        };
        to_its_end(returning).await
    }

    async fn add_defaults(&self, pod: &Net) -> Result<(), PodNetworkError> {
        match interface::named(pod, self.spec.interface.as_str()).await? {
            Some(tunnel) => ip_route::add_defaults(pod, &tunnel, &self.spec).await,
            None => Ok(()),
        }
    }

    /// Undoes every part of the network that exists.
    ///
    /// # Errors
    /// Every part that could not be undone.
    pub(super) async fn tear_down(&self) -> Result<(), PodNetworkError> {
        match self.open().await {
            Ok(namespaces) => self.clear(&namespaces).await,
            // A namespace that was removed took everything in it along.
            Err(PodNetworkError::Namespace(NamespaceError::Open { cause, .. }))
                if cause.kind() == io::ErrorKind::NotFound =>
            {
                // The second interface came back by itself, without its addresses.
                let mut kept = self.secondary.lock().await;
                let (host, file) = (open_host()?, open_host_file()?);
                // The firewall stays: processes may still hold the namespace open, and with it the tunnel.
                secondary::return_to_host(&host, None, &file, &mut kept).await
            }
            Err(error) => Err(error),
        }
    }

    /// The namespaces. Opened once and then kept: later this process may have no right to enter the pod's. So a namespace
    /// that is removed in between goes on to exist, as it does for an inbound, and is the one that the undo works in.
    async fn open(&self) -> Result<Arc<Namespaces>, PodNetworkError> {
        if let Some(kept) = &*self.namespaces.borrow() {
            return Ok(kept.clone());
        }
        let path = self.namespace.path();
        let file = |cause| NamespaceError::Open { path: path.into(), cause };
        let opened = Arc::new(Namespaces {
            pod: Net::inside(&self.namespace).await?,
            pod_file: File::open(path).map_err(file)?,
            host: open_host()?,
            host_file: open_host_file()?,
        });
        self.namespaces.send_replace(Some(opened.clone()));
        Ok(opened)
    }

    /// Waits until nothing needs the right to enter the pod's namespace any more. Cancellation safe.
    pub(crate) async fn until_open(&self) {
        // The sender lives in self, so this ends by the value only.
        drop(self.namespaces.subscribe().wait_for(Option::is_some).await);
    }

    async fn make(&self, namespaces: &Namespaces) -> Result<(), PodNetworkError> {
        let (spec, pod) = (&self.spec, &namespaces.pod);
        if let Some(taken) = interface::named(pod, spec.interface.as_str()).await? {
            return Err(PodNetworkError::Taken(taken.name));
        }
        let over = underlay::find(self.host_interface.as_ref(), spec).await?;
        // Before the link exists, so before the first packet.
        self.put_up_firewall()?;
        let tunnel = vxlan::add(&namespaces.host, pod, &namespaces.pod_file, spec, &over).await?;
        let mtu = vxlan::set_mtu(pod, &tunnel, spec, &over).await?;
        // Connected only if it is a single host: which networks are on the link is for the worker node's routes to say.
        interface::add_address(pod, &tunnel, spec.pod, spec.pod.is_host()).await?;
        interface::set_up(pod, &tunnel).await?;
        let left_out = ip_route::add_all(pod, &tunnel, spec).await?;
        log::info!(
            "pod network: '{}' {} in {}, VXLAN {} from {} ('{}') to {} port {}, MTU {mtu}",
            spec.interface,
            spec.pod,
            self.namespace.path().display(),
            spec.id,
            over.address,
            over.link.name,
            spec.worker_node,
            spec.port
        );
        log_remarks(&left_out);
        Ok(())
    }

    /// Drops the packets of strangers to the tunnel.
    ///
    /// # Errors
    /// The kernel refuses. Without these rules a tunnel must not exist: its packets prove nothing but their source address.
    fn put_up_firewall(&self) -> Result<(), PodNetworkError> {
        let Spec { worker_node, port, .. } = self.spec;
        let tracked = firewall::put_up(worker_node, port).map_err(|source| {
            let advice = if firewall::lacks_nftables(&source) {
                "the kernel lacks nf_tables, without which anyone could send into the tunnel; use a kernel that has it"
            } else {
                "without it anyone could send into the tunnel; this needs CAP_NET_ADMIN, and that no other program owns the \
                 table inet secure-comms"
            };
            let step = format!("dropping packets to port {port} that are not from {worker_node}");
            PodNetworkError::Step { step, source, advice }
        })?;
        if let Some(error) = tracked {
            log::warn!(
                "pod network: the NOTRACK rules are left out: {error}: the kernel may lack notrack (nft_ct); connection \
                 tracking, where the VM has it on, tracks the tunnel"
            );
        }
        Ok(())
    }

    /// Undoes each part, even if others fail; but the firewall stays as long as the tunnel does.
    async fn clear(&self, namespaces: &Arc<Namespaces>) -> Result<(), PodNetworkError> {
        self.clear_tunnel(namespaces).await?;
        remove_firewall()
    }

    /// Undoes each part but the firewall, even if others fail.
    async fn clear_tunnel(&self, namespaces: &Arc<Namespaces>) -> Result<(), PodNetworkError> {
        let pod = &namespaces.pod;
        all_of([
            self.return_secondary(namespaces).await,
            ip_route::remove_foreign(pod, &self.spec).await,
            self.remove_tunnel(pod).await,
        ])
    }

    /// Removes VXLAN links with our name, and one that has our id and port, which the kernel allows only once.
    async fn remove_tunnel(&self, pod: &Net) -> Result<(), PodNetworkError> {
        for link in interface::all(pod).await?.into_iter().filter(interface::Interface::is_vxlan) {
            if link.name == self.spec.interface.as_str() || link.vxlan == (self.spec.id, self.spec.port) {
                interface::remove(pod, &link).await?;
            }
        }
        Ok(())
    }
}

fn open_host() -> Result<Net, PodNetworkError> {
    Net::host().step(|| "opening a netlink socket".into(), "try again")
}

fn open_host_file() -> Result<File, PodNetworkError> {
    File::open("/proc/thread-self/ns/net")
        .step(|| "opening our own namespace".into(), "see that /proc is mounted")
}

/// Every failure of several parts of an undo, as one error.
fn all_of<const N: usize>(parts: [Result<(), PodNetworkError>; N]) -> Result<(), PodNetworkError> {
    let mut failed = Vec::new();
    for error in parts.into_iter().filter_map(Result::err) {
        match error {
            PodNetworkError::Undo(errors) => failed.extend(errors),
            error => failed.push(error),
        }
    }
    if failed.is_empty() { Ok(()) } else { Err(PodNetworkError::Undo(failed)) }
}

/// Runs `work` to its end, even if this future is dropped.
async fn to_its_end(
    work: impl Future<Output = Result<(), PodNetworkError>> + Send + 'static,
) -> Result<(), PodNetworkError> {
    let ended = tokio::spawn(work).await.map_err(io::Error::other);
    ended.step(|| "moving the second interface".into(), "report this as a bug")?
}

/// Sets the loopback interface of a namespace up, with one more address if it is given and not there.
///
/// # Errors
/// The namespace can't be entered, or the kernel refuses.
pub async fn set_loopback_up(namespace: &Namespace, address: Option<Prefix>) -> Result<(), PodNetworkError> {
    let net = Net::inside(namespace).await?;
    let Some(lo) = interface::named(&net, "lo").await? else { return Ok(()) };
    if let Some(address) = address {
        interface::add_own_address(&net, &lo, address).await?;
    }
    interface::set_up(&net, &lo).await
}

/// Logs what the network lacks, one line each: apf.json may list thousands of routes, so only the first ones.
pub(super) fn log_remarks(remarks: &[String]) {
    for remark in remarks.iter().take(REMARKS_MAX) {
        log::warn!("pod network: {remark}");
    }
    if let Some(more) = remarks.len().checked_sub(REMARKS_MAX).filter(|&more| more > 0) {
        log::warn!("pod network: {more} more like the last one");
    }
}

fn remove_firewall() -> Result<(), PodNetworkError> {
    let removed = firewall::remove();
    removed.step(|| "removing the firewall".into(), "remove it with `nft delete table inet secure-comms`")
}
