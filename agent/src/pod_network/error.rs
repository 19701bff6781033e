//! Why the pod network is not up.

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
        /// What was being done, and with what.
        step: String,
        /// The cause.
        source: io::Error,
        /// What to do.
        advice: &'static str,
    },
    /// The pod's network namespace can't be entered.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    /// Something in the VM that was waited for did not come.
    #[error("waiting for the VM's network: {missing} after {seconds} s; {advice}")]
    Waited {
        /// What is missing.
        missing: String,
        /// How long it was waited for.
        seconds: u64,
        /// What to do.
        advice: &'static str,
    },
    /// `dedicated`, and the tunnel's interface is not.
    #[error(
        "choosing the interface of the tunnel: pod-network says 'dedicated', but '{0}' has the VM's default route; give \
         -host-interface the name of another"
    )]
    NotDedicated(String),
    /// Another link has the name.
    #[error(
        "making the VXLAN link: the pod's namespace has a '{0}' already that is no VXLAN link; remove it, or check \
         -pod-namespace"
    )]
    Taken(String),
    /// Not everything could be undone.
    #[error("undoing it: {}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Undo(Vec<Self>),
}

/// What a failed request of netlink is turned into.
pub(super) trait Step<T> {
    /// Says what was being done; `advice` is for causes that don't speak for themselves.
    fn step(self, step: impl FnOnce() -> String, advice: &'static str) -> Result<T, PodNetworkError>;
}

impl<T> Step<T> for io::Result<T> {
    fn step(self, step: impl FnOnce() -> String, advice: &'static str) -> Result<T, PodNetworkError> {
        self.map_err(|source| {
            let advice = match source.raw_os_error().map(Errno::from_raw) {
                Some(Errno::EPERM | Errno::EACCES) => {
                    "this needs CAP_NET_ADMIN in both namespaces, and AF_NETLINK sockets"
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

/// Whether a request failed because what it was about is not there (any more).
pub(super) fn is_gone(error: &NetlinkError) -> bool {
    matches!(errno(error), Some(Errno::ENOENT | Errno::ESRCH | Errno::ENODEV))
}

/// Whether a request failed because what it was to make is there.
pub(super) fn already_exists(error: &NetlinkError) -> bool {
    errno(error) == Some(Errno::EEXIST)
}

fn errno(error: &NetlinkError) -> Option<Errno> {
    let NetlinkError::NetlinkError(message) = error else { return None };
    Some(Errno::from_raw(message.raw_code().abs()))
}
