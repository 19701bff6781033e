//! Errors of the pod network.

use std::io;

use nix::errno::Errno;
use rtnetlink::Error as NetlinkError;
use secure_comms_tunnel::netns::NamespaceError;

/// Why the pod network could not be set up, or undone.
#[derive(Debug, thiserror::Error)]
pub enum PodNetworkError {
    /// A step failed.
    #[error("{step}: {source}; {advice}")]
    Step {
        /// The step, with its arguments.
        step: String,
        /// Error of the system.
        source: io::Error,
        /// How to fix it.
        advice: &'static str,
    },
    /// The pod's network namespace can't be entered.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    /// The VM's network did not become ready in time.
    #[error("waiting for the VM's network: {missing} after {seconds} s; {advice}")]
    Waited {
        /// What is missing.
        missing: String,
        /// Time waited, in seconds.
        seconds: u64,
        /// How to fix it.
        advice: &'static str,
    },
    /// `dedicated` is set, and the tunnel's interface has the default route.
    #[error(
        "choosing the interface of the tunnel: pod-network says 'dedicated', but '{0}' has the VM's default route; give \
         -host-interface the name of another"
    )]
    NotDedicated(String),
    /// Another interface has the tunnel's name.
    #[error(
        "making the VXLAN link: the pod's namespace has a '{0}' already that is no VXLAN link; remove it, or check \
         -pod-namespace"
    )]
    Taken(String),
    /// Not everything could be undone.
    #[error("undoing it: {}", list(.0))]
    Undo(Vec<Self>),
    /// An interface lacks addresses or routes after a move to another namespace.
    #[error("moving '{name}': {}", list(.errors))]
    Incomplete {
        /// The interface.
        name: String,
        /// Why each part is missing.
        errors: Vec<Self>,
    },
}

/// Errors as one text.
pub(super) fn list(errors: &[PodNetworkError]) -> String {
    errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

/// Turns a failed netlink request into an error of the pod network.
pub(super) trait Step<T> {
    /// Adds the step and advice. Permission errors get advice of their own.
    fn step(self, step: impl FnOnce() -> String, advice: &'static str) -> Result<T, PodNetworkError>;
}

impl<T> Step<T> for io::Result<T> {
    fn step(self, step: impl FnOnce() -> String, advice: &'static str) -> Result<T, PodNetworkError> {
        self.map_err(|source| {
            let advice = match source.raw_os_error().map(Errno::from_raw) {
                Some(Errno::EPERM) => "this needs CAP_NET_ADMIN in both namespaces, and AF_NETLINK sockets",
                // The kernel's answer for an IPv6 address or route where IPv6 is off.
                Some(Errno::EACCES) => {
                    "see whether IPv6 is off there (sysctl net.ipv6.conf.all.disable_ipv6)"
                }
                _ => advice,
            };
            PodNetworkError::Step { step: step(), source, advice }
        })
    }
}

impl<T> Step<T> for Result<T, NetlinkError> {
    fn step(self, step: impl FnOnce() -> String, advice: &'static str) -> Result<T, PodNetworkError> {
        self.map_err(cause).step(step, advice)
    }
}

pub(super) fn cause(error: NetlinkError) -> io::Error {
    match error {
        NetlinkError::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other.to_string()),
    }
}

/// Whether a request failed because its object does not exist.
pub(super) fn is_gone(error: &NetlinkError) -> bool {
    matches!(errno(error), Some(Errno::ENOENT | Errno::ESRCH | Errno::ENODEV))
}

/// Whether a request failed because its object exists already.
pub(super) fn already_exists(error: &NetlinkError) -> bool {
    errno(error) == Some(Errno::EEXIST)
}

/// Whether the kernel refused what was asked for, as opposed to having no memory, or us no right, to do anything of the kind.
pub(super) fn is_refused(error: &NetlinkError) -> bool {
    !matches!(errno(error), None | Some(Errno::EPERM | Errno::ENOMEM | Errno::ENOBUFS | Errno::EINTR))
}

fn errno(error: &NetlinkError) -> Option<Errno> {
    let NetlinkError::NetlinkError(message) = error else { return None };
    Some(Errno::from_raw(message.raw_code().abs()))
}
