//! Why there is no configuration.

use secure_comms_protocol::PodId;
use secure_comms_protocol::limits::CONTROL_LINE_MAX;

use crate::pod_network::spec::{Faults, InterfaceName};

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Secure Comms is not enabled.
    #[error(
        "starting: Secure Comms is off, and this forwarder speaks nothing else; set the flag -secure-comms, or, for a \
         pod that is not confidential, -secure-comms-user-data all with \"sc\": true, sc-pp-prv and sc-wn-pub in {0}"
    )]
    NotSecureComms(String),
    /// The keys in the daemon config are incomplete or invalid. The agent does not fall back to attestation.
    #[error("reading the keys in {file}: {fault}")]
    UserData {
        /// Path of the daemon config.
        file: String,
        /// The fault, and its fix.
        fault: String,
    },
    /// All faults of all tags.
    #[error("reading the tunnels: {0}; correct the tags where they are given")]
    Tags(String),
    /// The tunnels do not fit into the agent's hello.
    #[error(
        "reading the tunnels: the agent's hello, which lists them, would be {excess} bytes longer than a control line \
         may be ({CONTROL_LINE_MAX}); name fewer tunnels, or shorter paths"
    )]
    TooManyTunnels {
        /// Bytes beyond the limit.
        excess: usize,
    },
    /// Flag and init-data name different pods.
    #[error(
        "reading init-data: 'sc-pod-id' names pod {init_data}, and -secure-comms-pod-id names pod {flag}; correct one of \
         them"
    )]
    PodId {
        /// The pod of the flag.
        flag: PodId,
        /// The pod of init-data.
        init_data: PodId,
    },
    /// The path of the kata agent's socket is invalid.
    #[error("reading -kata-agent-socket: {0}")]
    KataAgentSocket(String),
    /// The name of the interface for the pod network is invalid.
    #[error("reading -host-interface: '{0}': expected {expected}", expected = InterfaceName::EXPECTED)]
    HostInterface(String),
    /// All faults of the pod network.
    #[error("reading 'pod-network' in {file}: {faults}; correct the VM's user data")]
    PodNetwork {
        /// Path of the daemon config.
        file: String,
        /// Every fault.
        faults: Faults,
    },
    /// There is a pod network, but no namespace for it.
    #[error(
        "setting up the pod network: 'pod-network' is in {0}, but -pod-namespace is empty; name the pod's network \
         namespace, or take 'pod-network' out"
    )]
    NoPodNamespace(String),
}

impl ConfigError {
    /// Exit code of the process: 2 if the command line is at fault, 1 if the daemon config is.
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::NotSecureComms(_)
            | Self::Tags(_)
            | Self::TooManyTunnels { .. }
            | Self::KataAgentSocket(_)
            | Self::HostInterface(_) => 2,
            Self::UserData { .. }
            | Self::PodNetwork { .. }
            | Self::NoPodNamespace(_)
            | Self::PodId { .. } => 1,
        }
    }
}
