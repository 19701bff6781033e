//! The KBS's host name is looked up as all others are.

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use secure_comms_tunnel::Resolver;

/// The resolver of `tunnel/` for reqwest, which does not ask it for IP addresses.
pub(super) struct Names;

impl Resolve for Names {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            // reqwest puts the port in.
            let found = Resolver::default().lookup(name.as_str(), 0).await?;
            Ok(Box::new(found.into_iter()) as Addrs)
        })
    }
}
