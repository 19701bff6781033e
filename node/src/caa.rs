//! The way in of an unmodified cloud-api-adaptor (CAA): its dial to a VM is redirected to us, and held until the pod can be
//! used.
//!
//! ```text
//! apf.json appears --> directory: sandbox, names, TLS keys --> prepare
//! CAA dials VM:15150 --rules (nftables)--> front: ClientHello --> which sandbox, which VM --> life: start, up, Check
//!                                            \--- handshake finished --> relay <==> KATAAGENT stream
//! ```

pub mod rules;
mod sandbox;

use std::path::PathBuf;
use std::time::Duration;

pub use self::sandbox::{Sandbox, TlsIdentity};

/// Settings of the way in of cloud-api-adaptor.
#[derive(Clone, Debug)]
pub struct CaaSettings {
    /// Where cloud-api-adaptor writes what it knows of its sandboxes.
    pub pods_directory: PathBuf,
    /// The port of the VMs that it dials.
    pub forwarder_port: u16,
    /// Our port on the loopback addresses, to which its dials are redirected.
    pub listen_port: u16,
    /// Directory with our own CA and certificates (`caa-certs`), in the strict variant; `None`: each pod's are in its
    /// `apf.json`.
    pub certificates: Option<PathBuf>,
    /// How long a pod stays after the runtime's connection has ended: it may connect again.
    pub grace: Duration,
    /// How long a pod may take from its first dial, or from its file without a dial, until it can be used.
    pub start_deadline: Duration,
}

impl Default for CaaSettings {
    fn default() -> Self {
        Self {
            pods_directory: PathBuf::from("/run/peerpod/pods"),
            forwarder_port: 15150,
            listen_port: 15151,
            certificates: None,
            grace: Duration::from_secs(60),
            start_deadline: Duration::from_secs(600),
        }
    }
}
