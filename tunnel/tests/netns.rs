//! Sockets in another network namespace; no other thread of the process moves.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod harness;

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::path::PathBuf;
use std::process::Command;

use harness::{Connection, FIXED, within};
use secure_comms_protocol::tag::parse_list;
use secure_comms_protocol::{InboundTag, Kubernetes, OutboundTag};
use secure_comms_tunnel::netns::{self, Namespace, NamespaceError};
use secure_comms_tunnel::{Inbound, Outbounds};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

fn ip(arguments: &[&str]) {
    let output = Command::new("ip").args(arguments).output();
    let output = output.expect("this test needs iproute2's `ip`: install it");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "this test needs root (CAP_SYS_ADMIN): ip {arguments:?}: {error}");
}

const LOOPBACK: SocketAddr = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0));

/// A temporary namespace, removed when dropped.
struct Made(String);

impl Made {
    fn name(test: &str) -> String {
        format!("sc-{test}-{}", std::process::id())
    }

    fn new(test: &str) -> Self {
        let made = Self(Self::name(test));
        ip(&["netns", "add", &made.0]);
        made
    }

    fn up(&self) {
        ip(&["-n", &self.0, "link", "set", "lo", "up"]);
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

/// Namespaces of all threads, except the threads that enter one.
fn namespaces() -> Vec<PathBuf> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
    // A thread may end during the listing.
    let seen = tasks.filter_map(|task| {
        let name = std::fs::read_to_string(task.join("comm")).ok()?;
        (name.trim() != "netns").then(|| std::fs::read_link(task.join("ns/net")).ok())?
    });
    seen.collect()
}

fn nobody_moved(home: &PathBuf) {
    let seen = namespaces();
    assert!(!seen.is_empty() && seen.iter().all(|namespace| namespace == home), "{seen:?}, home {home:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_inbound_serves_in_its_namespace_and_no_thread_moves() {
    within(async {
        let home = std::fs::read_link("/proc/self/ns/net").unwrap();
        let made = Made::new("in");
        made.up();
        let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server_port = server.local_addr().unwrap().port();
        let mut connection = Connection::new(FIXED);
        connection.serve(Outbounds::<Kubernetes>::new(
            &parse_list::<OutboundTag>(&format!("BOTH_PHASES:T:{server_port}")).unwrap(),
        ));
        for text in [made.0.clone(), format!("/run/netns/{}", made.0)] {
            let tag = parse_list::<InboundTag>(&format!("BOTH_PHASES:T:{text}:0")).unwrap().remove(0);
            let inbound = Inbound::bind(&tag).await.unwrap();
            nobody_moved(&home);
            let local: SocketAddr = inbound.local().parse().unwrap();
            let (links, links_seen) = watch::channel(Some(connection.adaptor.clone()));
            let serving = tokio::spawn(inbound.serve(links_seen));

            let outside = TcpStream::connect(local).await.map_err(|error| error.kind());
            assert_eq!(outside.unwrap_err(), ErrorKind::ConnectionRefused, "reachable outside");
            let mut inside = netns::connect(Some(&Namespace::new(&text)), local).await.unwrap();
            nobody_moved(&home);
            inside.write_all(b"from inside").await.unwrap();
            inside.shutdown().await.unwrap();
            let (mut served, _) = server.accept().await.unwrap();
            let mut got = String::new();
            served.read_to_string(&mut got).await.unwrap();
            assert_eq!(got, "from inside");
            serving.abort();
            drop(links);
        }
        nobody_moved(&home);
    })
    .await;
}

#[tokio::test]
async fn an_inbound_waits_until_its_namespace_is_made_and_up() {
    within(async {
        let name = Made::name("late");
        let tag = parse_list::<InboundTag>(&format!("BOTH_PHASES:T:{name}:0")).unwrap().remove(0);
        let binding = tokio::spawn({
            let tag = tag.clone();
            async move { Inbound::bind(&tag).await }
        });
        tokio::task::yield_now().await;
        // `ip netns add` makes the file, then mounts the namespace on it: so the first step is an ordinary file.
        std::fs::create_dir_all(netns::NAMED).unwrap();
        let path = format!("{}/{name}", netns::NAMED);
        std::fs::write(&path, "").unwrap();
        let early = netns::listen(Some(&Namespace::new(&name)), LOOPBACK).await.unwrap_err();
        assert!(matches!(early, NamespaceError::Enter { .. }), "{early}");
        std::fs::remove_file(&path).unwrap();
        let made = Made::new("late");
        drop(binding.await.unwrap().unwrap());

        // In a namespace with an interface that is up, like podns, no bind of 127.0.0.1 succeeds before `lo` is up.
        ip(&["-n", &name, "link", "add", "name", "v0", "type", "veth", "peer", "name", "v1"]);
        ip(&["-n", &name, "addr", "add", "192.0.2.1/24", "dev", "v0"]);
        ip(&["-n", &name, "link", "set", "v0", "up"]);
        ip(&["-n", &name, "link", "set", "v1", "up"]);
        let early = netns::listen(Some(&Namespace::new(&name)), LOOPBACK).await.unwrap_err();
        assert!(
            matches!(&early, NamespaceError::Io(error) if error.kind() == ErrorKind::AddrNotAvailable),
            "{early}"
        );
        let binding = tokio::spawn(async move { Inbound::bind(&tag).await });
        tokio::task::yield_now().await;
        made.up();
        binding.await.unwrap().unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_missing_or_invalid_namespace_is_an_error_with_its_path() {
    within(async {
        let error = netns::listen(Some(&Namespace::new("no-such-namespace")), LOOPBACK).await.unwrap_err();
        let expected = "opening network namespace /run/netns/no-such-namespace: No such file";
        assert!(error.to_string().starts_with(expected), "{error}");
        let error = netns::connect(Some(&Namespace::new("/etc/hostname")), LOOPBACK).await.unwrap_err();
        assert!(error.to_string().starts_with("entering network namespace /etc/hostname: "), "{error}");
    })
    .await;
}
