//! Netlink sockets. A socket stays in the namespace that it was made in.

use std::io;

use futures_util::StreamExt;
use rtnetlink::{Handle, MulticastGroup, new_connection, new_multicast_connection};
use secure_comms_tunnel::netns::{Namespace, NamespaceError};
use std::sync::Arc;
use tokio::sync::Notify;
use tokio::task::JoinSet;

/// Changes after which an interface may have become usable.
const GROUPS: [MulticastGroup; 5] = [
    MulticastGroup::Link,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv6Ifaddr,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv6Route,
];

/// The kernel's network configuration in one namespace.
#[derive(Debug)]
pub(super) struct Net {
    pub(super) handle: Handle,
    changed: Arc<Notify>,
    /// The task that moves the messages; aborted on drop.
    _connection: JoinSet<()>,
}

impl Net {
    /// In our own namespace.
    pub(super) fn host() -> io::Result<Self> {
        let (connection, handle, _) = new_connection()?;
        Ok(Self::new(connection, handle, Arc::default()))
    }

    /// In our own namespace, subscribed to changes.
    pub(super) fn host_watched() -> io::Result<Self> {
        let (connection, handle, mut messages) = new_multicast_connection(&GROUPS)?;
        let changed = Arc::new(Notify::new());
        let watch = {
            let changed = changed.clone();
            async move {
                while messages.next().await.is_some() {
                    changed.notify_one();
                }
                // The socket is broken: wake the waiter, whose next request then reports the error.
                changed.notify_one();
            }
        };
        let both = async move {
            tokio::join!(connection, watch);
        };
        Ok(Self::new(both, handle, changed))
    }

    /// In another namespace.
    pub(super) async fn inside(namespace: &Namespace) -> Result<Self, NamespaceError> {
        let runtime = tokio::runtime::Handle::current();
        let (connection, handle, _) = namespace
            .run(move || {
                // This thread makes the socket, the runtime's own thread serves it.
                let _runtime = runtime.enter();
                new_connection()
            })
            .await?;
        Ok(Self::new(connection, handle, Arc::default()))
    }

    fn new(
        connection: impl Future<Output = ()> + Send + 'static,
        handle: Handle,
        changed: Arc<Notify>,
    ) -> Self {
        let mut tasks = JoinSet::new();
        tasks.spawn(connection);
        Self { handle, changed, _connection: tasks }
    }

    /// Waits for a change since the last call. Never returns on a socket without subscription.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }
}
