//! A worker node and a VM in network namespaces, and a router between them that translates addresses, as a cloud has it. What
//! happens to packets happens in the kernel: drops, moved addresses, forgotten translations. Needs root, iproute2, nftables.

use std::net::{IpAddr, SocketAddr};
use std::process::Stdio;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use tokio::io::AsyncWriteExt;

use crate::harness::test_namespace::TestNamespace;

/// Port of the agent in the VM.
const SSH_PORT: u16 = 2222;
/// Device of the worker node and of the VM.
const DEVICE: &str = "cable";
/// Devices of the router.
const TO_NODE: &str = "node";
const TO_VM: &str = "vm";
const NODE: [&str; 2] = ["10.81.1.2", "10.81.1.3"];
const VM: [&str; 2] = ["10.81.2.2", "10.81.2.3"];
const ROUTER: [&str; 2] = ["10.81.1.1", "10.81.2.1"];

/// What the router drops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drops {
    /// Nothing.
    Nothing,
    /// Each packet.
    All,
    /// Packets from the worker node to the VM.
    ToVm,
    /// Packets from the VM to the worker node.
    ToNode,
}

/// The namespaces; removed when dropped.
#[derive(Debug)]
pub struct RoutedPath {
    /// The worker node.
    pub node: Arc<TestNamespace>,
    /// The VM.
    pub vm: Arc<TestNamespace>,
    router: TestNamespace,
}

impl RoutedPath {
    /// Makes the namespaces; every packet passes.
    ///
    /// # Errors
    /// If a step fails; names it.
    pub async fn new() -> Result<Self> {
        let (node, vm) = (TestNamespace::new("node")?, TestNamespace::new("vm")?);
        let router = TestNamespace::new("router")?;
        for (device, end, theirs, ours) in
            [(TO_NODE, &node, NODE[0], ROUTER[0]), (TO_VM, &vm, VM[0], ROUTER[1])]
        {
            router.veth(device, end, DEVICE)?;
            router.address(device, &format!("{ours}/24"))?;
            end.address(DEVICE, &format!("{theirs}/24"))?;
            end.ip(["route", "add", "default", "via", ours])?;
        }
        let forward = "echo 1 > /proc/sys/net/ipv4/ip_forward";
        let set = router.command("sh").args(["-c", forward]).output().await?;
        ensure!(set.status.success(), "{forward}: {}", String::from_utf8_lossy(&set.stderr));
        let path = Self { node: Arc::new(node), vm: Arc::new(vm), router };
        path.nft(&format!(
            "table ip path {{
                 chain faults {{ type filter hook forward priority filter; }}
                 chain lost {{ type filter hook forward priority filter + 1; }}
                 chain translate {{ type nat hook postrouting priority srcnat; oifname {TO_VM} masquerade random; }}
             }}"
        ))
        .await?;
        Ok(path)
    }

    /// The agent's addresses: where the VM is, and where [`RoutedPath::move_vm`] moves it.
    ///
    /// # Errors
    /// Never: the addresses are constants.
    pub fn agent(&self) -> Result<[SocketAddr; 2]> {
        let [here, there] = VM.map(str::parse::<IpAddr>);
        Ok([SocketAddr::new(here?, SSH_PORT), SocketAddr::new(there?, SSH_PORT)])
    }

    /// Drops these packets from now on, and no others.
    ///
    /// # Errors
    /// If nftables refuses it.
    pub async fn drops(&self, drops: Drops) -> Result<()> {
        let rule = match drops {
            Drops::Nothing => String::new(),
            Drops::All => "add rule ip path faults drop".to_owned(),
            Drops::ToVm => format!("add rule ip path faults oifname {TO_VM} drop"),
            Drops::ToNode => format!("add rule ip path faults oifname {TO_NODE} drop"),
        };
        // In one transaction, so that no packet passes between two faults.
        self.nft(&format!("flush chain ip path faults\n{rule}\n")).await
    }

    /// The router forgets its translations, so the next packets of a connection come to the VM from another port. With
    /// `silent`, the VM's answer to that, a reset, does not get back.
    ///
    /// # Errors
    /// If a step fails.
    pub async fn rebind(&self, silent: bool) -> Result<()> {
        let rule = if silent { "add rule ip path lost tcp flags & rst == rst drop" } else { "" };
        self.nft(&format!("flush chain ip path lost\n{rule}\n")).await?;
        // The kernel drops the translations of a masquerade when its device goes down.
        self.router.ip(["link", "set", TO_VM, "down"])?;
        self.router.ip(["link", "set", TO_VM, "up"])
    }

    /// The VM gets its second address, and loses the first.
    ///
    /// # Errors
    /// If a step fails.
    pub fn move_vm(&self) -> Result<()> {
        readdress(&self.vm, VM, ROUTER[1])
    }

    /// The worker node gets its second address, and loses the first.
    ///
    /// # Errors
    /// If a step fails.
    pub fn move_node(&self) -> Result<()> {
        readdress(&self.node, NODE, ROUTER[0])
    }

    async fn nft(&self, script: &str) -> Result<()> {
        let mut command = self.router.command("nft");
        command.args(["-f", "-"]).stdin(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().context("nft: starting it")?;
        let mut stdin = child.stdin.take().context("nft: no stdin")?;
        stdin.write_all(script.as_bytes()).await.context("nft: its rules")?;
        drop(stdin);
        let output = child.wait_with_output().await.context("nft")?;
        ensure!(output.status.success(), "nft: {}: {script}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }
}

fn readdress(end: &TestNamespace, [old, new]: [&str; 2], router: &str) -> Result<()> {
    end.address(DEVICE, &format!("{new}/24"))?;
    end.ip(["address", "del", &format!("{old}/24"), "dev", DEVICE])?;
    // The new address became a secondary one of the old, and is kept or removed with it, as the kernel is set.
    if !end.show(["address"])?.to_string().contains(new) {
        end.address(DEVICE, &format!("{new}/24"))?;
    }
    // Removed with the old address on some kernels.
    end.ip(["route", "replace", "default", "via", router])
}

#[cfg(test)]
mod tests {
    use super::*;
    use secure_comms_tunnel::netns::{self, Namespace};
    use std::time::Duration;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};
    use tokio::time::timeout;

    const SOON: Duration = Duration::from_secs(10);
    const QUIET: Duration = Duration::from_millis(100);

    /// A listener in the VM, and a connection to it.
    async fn connection(path: &RoutedPath) -> (TcpListener, TcpStream, TcpStream) {
        let any = SocketAddr::from(([0, 0, 0, 0], SSH_PORT));
        let listener = netns::listen(Some(&Namespace::new(path.vm.name())), any).await.unwrap();
        let (client, server) = connect(path, &listener).await;
        (listener, client, server)
    }

    async fn connect(path: &RoutedPath, listener: &TcpListener) -> (TcpStream, TcpStream) {
        let to = path.agent().unwrap()[0];
        let node = Namespace::new(path.node.name());
        let client = timeout(SOON, netns::connect(Some(&node), to)).await.unwrap().unwrap();
        (client, timeout(SOON, listener.accept()).await.unwrap().unwrap().0)
    }

    #[tokio::test]
    async fn only_the_named_packets_are_dropped() {
        let path = RoutedPath::new().await.unwrap();
        let (_listener, mut client, mut server) = connection(&path).await;
        path.drops(Drops::ToVm).await.unwrap();
        client.write_all(b"a").await.unwrap();
        server.write_all(b"b").await.unwrap();
        assert!(timeout(QUIET, server.read_u8()).await.is_err());
        assert_eq!(timeout(SOON, client.read_u8()).await.unwrap().unwrap(), b'b');
        path.drops(Drops::ToNode).await.unwrap();
        assert_eq!(timeout(SOON, server.read_u8()).await.unwrap().unwrap(), b'a');
        server.write_all(b"c").await.unwrap();
        assert!(timeout(QUIET, client.read_u8()).await.is_err());
        path.drops(Drops::Nothing).await.unwrap();
        assert_eq!(timeout(SOON, client.read_u8()).await.unwrap().unwrap(), b'c');
    }

    #[tokio::test]
    async fn a_forgotten_translation_ends_a_connection_and_no_later_one() {
        let path = RoutedPath::new().await.unwrap();
        let (listener, mut client, server) = connection(&path).await;
        let before = server.peer_addr().unwrap();
        path.rebind(false).await.unwrap();
        // The kernel forgets it in the background: a byte that comes before goes on to the server.
        let end = timeout(SOON, async {
            loop {
                drop(client.write_all(b"a").await);
                if let Ok(end) = timeout(QUIET, client.read_u8()).await {
                    break end.unwrap_err();
                }
            }
        });
        let end = end.await.unwrap();
        assert_eq!(end.kind(), std::io::ErrorKind::ConnectionReset);
        let (mut client, mut server) = connect(&path, &listener).await;
        assert_ne!(server.peer_addr().unwrap(), before);
        path.rebind(true).await.unwrap();
        client.write_all(b"b").await.unwrap();
        assert!(timeout(QUIET, client.read_u8()).await.is_err());
        assert!(timeout(QUIET, server.read_u8()).await.is_err());
        connect(&path, &listener).await;
    }

    #[tokio::test]
    async fn a_moved_end_is_reached_at_its_new_address() {
        let path = RoutedPath::new().await.unwrap();
        let (listener, _client, _server) = connection(&path).await;
        path.move_vm().unwrap();
        path.move_node().unwrap();
        let node = Namespace::new(path.node.name());
        let to = path.agent().unwrap()[1];
        timeout(SOON, netns::connect(Some(&node), to)).await.unwrap().unwrap();
        timeout(SOON, listener.accept()).await.unwrap().unwrap();
    }
}
