//! The strict variant: cloud-api-adaptor trusts a certificate authority of ours, and nothing in the pods directory is secret.
//!
//! There it asks each VM for the same server name, [`STRICT_SERVER_NAME`](super::identity::STRICT_SERVER_NAME). So the sandbox is found by the VM's address: in the pod's
//! network namespace cloud-api-adaptor has made a VXLAN link to that address before it dials, and the pod's address there is
//! in one `apf.json`.

mod certificates;
mod links;

use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use secure_comms_protocol::PodId;

pub use self::certificates::{Made, StrictError, VALIDITY_DAYS, load, make};
use self::links::{Link, links};
use super::directory::PodsDirectory;
use super::identity::TlsIdentity;
use super::looks::Looks;
use super::sandbox::Sandbox;

/// Where the pods' network namespaces are.
const NAMESPACES: &str = "/run/netns";

/// Time between two looks into the namespaces: dials cannot keep more of a processor busy than one look takes of this.
const LOOK_PAUSE: Duration = Duration::from_millis(250);

/// Certificates of ours, and the sandboxes by their VMs. A clone is the same.
#[derive(Clone, Debug)]
pub struct Strict(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    identity: TlsIdentity,
    directory: PodsDirectory,
    namespaces: PathBuf,
    /// Into the namespaces.
    looks: Looks<Result<Arc<Vec<Link>>, Arc<io::Error>>>,
}

/// Why no sandbox can be named for a VM.
#[derive(Debug, thiserror::Error)]
pub enum VmLookupError {
    /// The namespaces cannot be looked into.
    #[error("looking for the VM in {}: {cause}; this needs CAP_SYS_ADMIN and the host's {NAMESPACES}", path.display())]
    Namespaces {
        /// Their directory.
        path: PathBuf,
        /// Error of the system.
        cause: Arc<io::Error>,
    },
    /// No link leads to the VM.
    #[error(
        "no pod's network namespace has a VXLAN link to {0}; a VM with a dedicated interface for it cannot be named"
    )]
    NoLink(IpAddr),
    /// No sandbox has the addresses of the namespace.
    #[error("the pod with the VXLAN link to {vm} has the addresses {}, and no apf.json has one of them", list(.addresses))]
    NoSandbox {
        /// The VM.
        vm: IpAddr,
        /// The addresses in the namespaces with a link to it.
        addresses: Vec<IpAddr>,
    },
    /// More than one sandbox has them, and not just one of these lives.
    #[error("more than one sandbox has the address of the pod with the VXLAN link to {vm}: {}", list(.ids))]
    Ambiguous {
        /// The VM.
        vm: IpAddr,
        /// The sandboxes.
        ids: Vec<PodId>,
    },
}

fn list<T: ToString>(items: &[T]) -> String {
    const SAID: usize = 8;
    let said: Vec<String> = items.iter().take(SAID).map(ToString::to_string).collect();
    said.join(", ") + if items.len() > SAID { " and more" } else { "" }
}

impl Strict {
    /// Reads the certificates in a directory, which [`make`] made.
    ///
    /// # Errors
    /// Those of [`load`].
    pub fn open(certificates: &Path, directory: PodsDirectory) -> Result<Self, StrictError> {
        Ok(Self::with(load(certificates)?, directory, NAMESPACES.into()))
    }

    fn with(identity: TlsIdentity, directory: PodsDirectory, namespaces: PathBuf) -> Self {
        Self(Arc::new(Inner { identity, directory, namespaces, looks: Looks::new(LOOK_PAUSE) }))
    }

    /// The TLS keys, which are the same for all sandboxes.
    pub fn identity(&self) -> &TlsIdentity {
        &self.0.identity
    }

    /// Whether a dial with this server name is to be answered with [`Self::identity`].
    pub fn answers(&self, server_name: &str) -> bool {
        server_name.eq_ignore_ascii_case(&self.0.identity.server_name)
    }

    /// The sandbox whose VM has this address. Looks at the namespaces as they are now, some milliseconds for hundreds of
    /// pods; of a burst, all get the answer of one look.
    ///
    /// # Errors
    /// The namespaces cannot be looked into, or the VM is of no sandbox or of several.
    pub async fn by_vm(&self, vm: IpAddr) -> Result<Arc<Sandbox>, VmLookupError> {
        let vm = vm.to_canonical();
        let links = self.links().await.map_err(|cause| {
            let path = self.0.namespaces.clone();
            VmLookupError::Namespaces { path, cause }
        })?;
        let links: Vec<&Link> = links.iter().filter(|link| link.remote == vm).collect();
        if links.is_empty() {
            return Err(VmLookupError::NoLink(vm));
        }
        self.0.directory.look().await;
        let mut sandboxes = self.0.directory.list();
        sandboxes.retain(|sandbox| links.iter().any(|link| is_of(sandbox, link)));
        if sandboxes.len() > 1 {
            let living = self.0.directory.living().await;
            if let [one] =
                sandboxes.iter().filter(|sandbox| living.contains(&sandbox.id)).collect::<Vec<_>>()[..]
            {
                sandboxes = vec![Arc::clone(one)];
            }
        }
        match (sandboxes.pop(), sandboxes.is_empty()) {
            (Some(sandbox), true) => Ok(sandbox),
            (Some(last), false) => {
                let ids = sandboxes.iter().chain([&last]).map(|sandbox| sandbox.id.clone()).collect();
                Err(VmLookupError::Ambiguous { vm, ids })
            }
            (None, _) => {
                let addresses = links.iter().flat_map(|link| &link.addresses).copied().collect();
                Err(VmLookupError::NoSandbox { vm, addresses })
            }
        }
    }

    async fn links(&self) -> Result<Arc<Vec<Link>>, Arc<io::Error>> {
        let look = || async { links(&self.0.namespaces).await.map(Arc::new).map_err(Arc::new) };
        self.0.looks.after_now(look).await
    }
}

/// Which sandbox a dial is for, and the TLS keys that answer it: by its server name, or in the strict variant by its VM.
#[derive(Clone, Debug)]
pub struct Identities {
    directory: PodsDirectory,
    strict: Option<Strict>,
}

impl Identities {
    /// Reads the certificates of the strict variant, if there is a directory of them.
    ///
    /// # Errors
    /// Those of [`load`].
    pub fn open(directory: PodsDirectory, certificates: Option<&Path>) -> Result<Self, StrictError> {
        let strict = certificates.map(|path| Strict::open(path, directory.clone())).transpose()?;
        Ok(Self { directory, strict })
    }

    /// The sandbox that a dial with this server name to this VM is for.
    ///
    /// # Errors
    /// There is none, or there are several: in one line.
    pub async fn sandbox(&self, server_name: &str, vm: IpAddr) -> Result<Arc<Sandbox>, String> {
        match self.strict(server_name) {
            Some(strict) => strict.by_vm(vm).await.map_err(|error| error.to_string()),
            None => self.directory.by_server_name(server_name).await.map_err(|error| error.to_string()),
        }
    }

    /// The TLS keys that answer a dial with this server name, for this sandbox.
    ///
    /// # Errors
    /// There are none: in one line.
    pub fn identity<'a>(
        &'a self,
        server_name: &str,
        sandbox: &'a Sandbox,
    ) -> Result<&'a TlsIdentity, String> {
        let strict = self.strict(server_name).map(Strict::identity);
        strict.or(sandbox.tls.as_ref()).ok_or_else(|| {
            "its apf.json has no TLS keys: cloud-api-adaptor has certificates of its own; they have to be those of \
             caa-certs, and --certificates has to name them"
                .to_owned()
        })
    }

    fn strict(&self, server_name: &str) -> Option<&Strict> {
        self.strict.as_ref().filter(|strict| strict.answers(server_name))
    }
}

/// Whether a link is in the namespace of a sandbox's pod. cloud-api-adaptor gives each sandbox a network identifier of its
/// own, so that an address of an earlier pod is not taken for this one's.
fn is_of(sandbox: &Sandbox, link: &Link) -> bool {
    sandbox.pod_ip.is_some_and(|ip| link.addresses.contains(&ip))
        && sandbox.vxlan_id.is_none_or(|vni| link.vni == Some(vni))
}

#[cfg(test)]
mod tests;
