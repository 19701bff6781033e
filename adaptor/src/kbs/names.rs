//! The KBS's host name is looked up, and its addresses are raced, as all others are.

use std::net::SocketAddr;

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use secure_comms_tunnel::{Resolver, dial};

/// The resolver of `tunnel/` for reqwest, which does not ask it for IP addresses.
pub(super) struct Names {
    resolver: Resolver,
    /// Port of the KBS.
    port: u16,
}

impl Names {
    pub(super) fn new(resolver: Resolver, port: u16) -> Self {
        Self { resolver, port }
    }
}

impl Resolve for Names {
    fn resolve(&self, name: Name) -> Resolving {
        let (resolver, port) = (self.resolver.clone(), self.port);
        Box::pin(async move {
            let found = resolver.lookup(name.as_str(), port).await?;
            Ok(Box::new(reachable(found).await?.into_iter()) as Addrs)
        })
    }
}

/// The address that a race of connects finds. reqwest tries those of one family one after another, each for its share of the
/// timeout.
async fn reachable(found: Vec<SocketAddr>) -> std::io::Result<Vec<SocketAddr>> {
    if found.len() < 2 {
        return Ok(found);
    }
    Ok(vec![dial::connect_first(found).await?.peer_addr()?])
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use tokio::net::{TcpListener, TcpSocket, TcpStream};
    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn a_dead_address_of_the_kbs_is_passed_over() {
        let good = TcpListener::bind("127.0.0.3:0").await.unwrap();
        let port = good.local_addr().unwrap().port();
        // A full backlog drops what would open a connection.
        let dead = TcpSocket::new_v4().unwrap();
        dead.bind(SocketAddr::from(([127, 0, 0, 2], port))).unwrap();
        let dead = dead.listen(1).unwrap();
        let mut clients = Vec::new();
        let connect = || timeout(Duration::from_millis(200), TcpStream::connect(dead.local_addr().unwrap()));
        while let Ok(client) = connect().await {
            clients.push(client.unwrap());
        }
        let hosts = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&hosts, "127.0.0.2 kbs\n127.0.0.3 kbs\n127.0.0.2 gone\n").unwrap();
        let names = Names::new(Resolver::with_files(hosts.path(), "/nonexistent", 9), port);
        let start = Instant::now();
        let found: Vec<SocketAddr> = names.resolve("kbs".parse().unwrap()).await.unwrap().collect();
        assert_eq!(found, [good.local_addr().unwrap()]);
        assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
        let one: Vec<SocketAddr> = names.resolve("gone".parse().unwrap()).await.unwrap().collect();
        assert_eq!(one, [dead.local_addr().unwrap()], "one address is not tried twice");
        let error = names.resolve("nosuch".parse().unwrap()).await.err().unwrap().to_string();
        assert!(error.contains("looking up the host name nosuch"), "{error}");
    }
}
