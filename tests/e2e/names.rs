//! Host names lead to their servers, for outbounds, the VM and the KBS, whatever the name servers do for one kind of address.
//!
//! The programs see a resolv.conf and a hosts file of their own. CI runs this with the static agent that is shipped.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test's helpers fail as the test does"
)]

#[path = "../../tunnel/tests/harness/name_server.rs"]
#[allow(dead_code, reason = "shared with the tests of tunnel/, which use all of it")]
mod name_server;

use std::ffi::OsString;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::Result;
use name_server::{NameServer, Say, addresses};
use secure_comms_tests::harness::process::Child;
use secure_comms_tests::harness::scene::{PATIENCE, Scene, client, endpoint, scene, works};
use secure_comms_tests::simulators::kata::KataAgent;
use secure_comms_tests::simulators::kata::client::bulk_both_ways;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::process::Command;
use tokio::time::timeout;

/// What a name server may do for the other kind of address.
const BAD: [(&str, Option<u8>); 6] = [
    ("formerr", Some(1)),
    ("servfail", Some(2)),
    ("nxdomain", Some(3)),
    ("notimp", Some(4)),
    ("refused", Some(5)),
    ("silent", None),
];

/// The command with its own `/etc/resolv.conf` and `/etc/hosts`, which are files of the scene; other arguments by `edit`.
fn with_files(scene: &Scene, command: &Command, edit: impl Fn(&str) -> String) -> Command {
    let mut inside = Command::new("unshare");
    let script =
        r#"mount --bind "$0" /etc/resolv.conf && mount --bind "$1" /etc/hosts && shift && exec "$@""#;
    inside.args(["--mount", "sh", "-c", script]).arg(scene.path("resolv.conf")).arg(scene.path("hosts"));
    inside.arg(command.as_std().get_program());
    inside.args(command.as_std().get_args().map(|arg| OsString::from(edit(arg.to_str().unwrap()))));
    inside
}

/// A listener whose backlog is full: it drops what would open a connection, as a black hole does.
struct BlackHole {
    _listener: TcpListener,
    _clients: Vec<TcpStream>,
}

async fn black_hole(address: SocketAddr) -> BlackHole {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }.unwrap();
    socket.bind(address).unwrap();
    let listener = socket.listen(1).unwrap();
    let mut clients = Vec::new();
    while let Ok(client) = timeout(Duration::from_millis(200), TcpStream::connect(address)).await {
        clients.push(client.unwrap());
    }
    BlackHole { _listener: listener, _clients: clients }
}

fn rule(name: &str, v6: bool) -> Say {
    let (kind, rest) = name.split_once('-').unwrap_or((name, ""));
    let bad = BAD.iter().find(|(bad, _)| rest == format!("{bad}.test"));
    match (kind, bad) {
        ("four", Some(_)) if !v6 => return addresses(["127.0.0.1"]),
        ("six", Some(_)) if v6 => return addresses(["::1"]),
        (_, Some((_, code))) => return code.map_or(Say::Nothing, Say::Code),
        (_, None) => {}
    }
    let many = || (1..=40).map(|n| IpAddr::from([127, 0, 0, n])).collect();
    match (name, v6) {
        ("many.test", false) => Say::Truncated(many()),
        ("cut.test", false) => Say::TruncatedOnly(many()),
        ("dead.test" | "kbs.test", true) => addresses(["::1"]),
        ("dead.test", false) => addresses(["127.0.0.2", "127.0.0.1"]),
        ("kbs.test" | "vm.test" | "svc.ns.good.test" | "plain.example", false) => addresses(["127.0.0.1"]),
        ("vm.test", true) | ("svc.ns.bad.test", _) => Say::Code(2),
        _ => Say::Code(3),
    }
}

/// Tunnels whose names need a search list.
const LATE: [&str; 2] = ["SUFFIX", "ROOT"];

/// The tunnels, and the servers that the agent reaches through them, which listen on these ports of 127.0.0.1 and ::1.
fn tunnels(four: u16, six: u16) -> Vec<(String, String)> {
    let mut tunnels = Vec::new();
    for (bad, _) in BAD {
        for (kind, port) in [("four", four), ("six", six)] {
            tunnels.push((format!("{kind}{bad}"), format!("{kind}-{bad}.test:{port}")));
        }
    }
    for name in ["many.test", "cut.test", "dead.test", "in-the-file", "localhost", "127.0.0.1"] {
        tunnels.push((name.replace(['.', '-'], ""), format!("{name}:{four}")));
    }
    for (tunnel, name) in LATE.into_iter().zip(["svc.ns", "plain.example"]) {
        tunnels.push((tunnel.to_owned(), format!("{name}:{four}")));
    }
    tunnels
}

/// Bytes pass through an inbound of the adaptor, both ways.
async fn passes([agent, adaptor]: [&Child; 2], tunnel: &str) {
    let bulk = async { bulk_both_ways(client(endpoint(adaptor, tunnel).await?).await?, 4096, 3).await };
    let passed = timeout(Duration::from_secs(60), bulk)
        .await
        .unwrap_or_else(|_| panic!("{tunnel} hangs\n{}\n{}", adaptor.log(), agent.log()));
    passed.unwrap_or_else(|error| panic!("{tunnel}: {error:#}\n{}", adaptor.log()));
}

#[tokio::test(flavor = "multi_thread")]
async fn host_names_lead_to_their_servers() -> Result<()> {
    let mut scene = scene().await?;
    // A name server listens on port 53: an address of its own on the loopback.
    let [a, b, ..] = std::process::id().to_be_bytes()[2..] else { unreachable!() };
    let server = NameServer::start(SocketAddr::from(([127, 53, a, b], 53)), rule).await;
    let file = scene.path("resolv.conf");
    let resolv_conf = |more: &str| {
        std::fs::write(&file, format!("nameserver {}\n{more}\n", server.addr.ip())).unwrap();
    };
    resolv_conf("");
    std::fs::write(scene.path("hosts"), "127.0.0.1 localhost in-the-file\n")?;

    let (four, six) =
        (scene.vm_service.addr().unwrap(), KataAgent::tcp((Ipv6Addr::LOCALHOST, 0).into()).await?);
    let mut holes = Vec::new();
    let dead = ["127.0.0.2".parse()?, IpAddr::V6(Ipv6Addr::LOCALHOST)];
    for address in dead.map(|ip: IpAddr| SocketAddr::new(ip, four.port())) {
        holes.push(black_hole(address).await);
    }
    holes.push(black_hole((Ipv6Addr::LOCALHOST, scene.kbs.addr().port()).into()).await);

    let tunnels = tunnels(four.port(), six.addr().unwrap().port());
    let outbounds: String =
        tunnels.iter().map(|(name, to)| format!(",KUBERNETES_PHASE:{name}:{to}")).collect();
    let inbounds: String = tunnels.iter().map(|(name, _)| format!(",KUBERNETES_PHASE:{name}:0")).collect();
    scene.inbounds += &inbounds;
    scene.agent_outbounds += &outbounds;

    let agent = with_files(&scene, &scene.agent_command()?, |arg| {
        if arg.contains(":VMSERVICE:") { format!("{arg}{outbounds}") } else { arg.to_owned() }
    });
    let agent = Child::spawn("agent", agent)?;
    agent.wait_for_text("inbound NODESERVICE listens on", PATIENCE).await?;
    let (ssh, kbs) = (scene.ssh.to_string(), scene.kbs.addr().to_string());
    let adaptor = with_files(&scene, &scene.adaptor_command(&[scene.ssh])?, |arg| {
        let by_name = arg.replace(&kbs, &format!("kbs.test:{}", scene.kbs.addr().port()));
        by_name.replace(&ssh, &format!("vm.test:{}", scene.ssh.port()))
    });
    let adaptor = Child::spawn("adaptor", adaptor)?;
    works(&scene, &adaptor).await?;
    for (tunnel, _) in tunnels.iter().filter(|(tunnel, _)| !LATE.contains(&tunnel.as_str())) {
        passes([&agent, &adaptor], tunnel).await;
    }

    let long: String = (0..12).map(|n| format!(" a-suffix-that-is-rather-long-{n}.test")).collect();
    for search in ["bad.test good.test", "good.test", ".  bad.test good.test", &format!("{long} good.test")] {
        resolv_conf(&format!("search {search}\noptions ndots:5"));
        passes([&agent, &adaptor], LATE[0]).await;
    }
    for search in [".", "bad.test .", "bad.test", &long] {
        resolv_conf(&format!("search {search}\noptions ndots:5"));
        passes([&agent, &adaptor], LATE[1]).await;
    }
    Ok(())
}
