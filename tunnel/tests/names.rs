//! A host name is resolved whatever its name servers do for one kind of address, one suffix or one server.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

#[path = "harness/name_server.rs"]
mod name_server;

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use name_server::{NameServer, Say, addresses};
use secure_comms_protocol::limits::{ADDRESSES_MAX, NAME_LOOKUP};
use secure_comms_protocol::tag::Host;
use secure_comms_tunnel::{Resolver, dial};
use tempfile::TempDir;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::time::{Instant, timeout};

const ANY: &str = "127.0.0.1:0";
/// Longer than any pause of a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A resolver with files of its own.
struct Site {
    dir: TempDir,
    resolver: Resolver,
}

impl Site {
    fn new(resolv_conf: &str, hosts: &str, port: u16) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let resolver = Resolver::with_files(dir.path().join("hosts"), dir.path().join("resolv.conf"), port);
        let site = Self { dir, resolver };
        site.write("resolv.conf", resolv_conf);
        site.write("hosts", hosts);
        site
    }

    fn write(&self, file: &str, text: &str) {
        std::fs::write(self.dir.path().join(file), text).unwrap();
    }

    /// The addresses of a name, or why there are none.
    async fn lookup(&self, name: &str) -> String {
        let start = Instant::now();
        let found = self.resolver.lookup(name, 7).await;
        assert!(start.elapsed() < NAME_LOOKUP + PATIENCE, "it hangs: {:?}", start.elapsed());
        match found {
            Ok(found) => {
                assert!(found.iter().all(|address| address.port() == 7));
                found.iter().map(|address| address.ip().to_string()).collect::<Vec<_>>().join(" ")
            }
            Err(error) => error.to_string(),
        }
    }
}

/// Does it until it takes less than `limit`, at most five times: what waits for a dead server takes that long each time, and a
/// busy machine does not slow all of them that much.
async fn is_quick(limit: Duration, what: &str, mut attempt: impl AsyncFnMut()) {
    let mut took = Vec::new();
    while took.len() < 5 {
        let start = Instant::now();
        attempt().await;
        if start.elapsed() < limit {
            return;
        }
        took.push(start.elapsed());
    }
    panic!("{what}: {took:?}");
}

/// A name server with the rule, and a resolver that asks it, with more lines in its resolv.conf.
async fn site(more: &str, rule: impl Fn(&str, bool) -> Say + Send + Sync + 'static) -> (Site, NameServer) {
    let server = NameServer::start(ANY.parse().unwrap(), rule).await;
    let resolv_conf = format!("nameserver 127.0.0.1\n{more}\n");
    (Site::new(&resolv_conf, "127.0.0.9 other\n", server.addr.port()), server)
}

#[tokio::test]
async fn one_good_kind_of_address_is_enough() {
    for bad in [
        Say::Code(1),
        Say::Code(2),
        Say::Code(3),
        Say::Code(4),
        Say::Code(5),
        Say::Nothing,
        Say::Garbage,
        Say::Addresses(vec![]),
    ] {
        let kind = format!("{bad:?}");
        let (site, _server) = site("", move |name, v6| match (name, v6) {
            ("four", false) => addresses(["10.0.0.4"]),
            ("six", true) => addresses(["fd00::6"]),
            _ => bad.clone(),
        })
        .await;
        is_quick(NAME_LOOKUP, &kind, async || {
            assert_eq!(site.lookup("four").await, "10.0.0.4", "{kind}");
            assert_eq!(site.lookup("six").await, "fd00::6", "{kind}");
        })
        .await;
    }
}

#[tokio::test]
async fn both_kinds_alternate_and_are_bounded_in_number() {
    let (site, _server) = site("", |name, v6| match (name, v6) {
        ("mixed", false) => addresses(["10.0.0.1", "10.0.0.2", "10.0.0.3"]),
        ("mixed", true) => addresses(["fd00::1"]),
        (_, false) => Say::Addresses((0..200).map(|n| IpAddr::from([10, 0, 0, n])).collect()),
        _ => Say::Code(2),
    })
    .await;
    assert_eq!(site.lookup("mixed").await, "fd00::1 10.0.0.1 10.0.0.2 10.0.0.3");
    assert_eq!(site.lookup("many").await.split(' ').count(), ADDRESSES_MAX);
}

#[tokio::test]
async fn a_suffix_that_fails_does_not_fail_the_name() {
    for bad in [Say::Code(2), Say::Code(3), Say::Code(4), Say::Code(5), Say::Nothing, Say::Addresses(vec![])]
    {
        let kind = format!("{bad:?}");
        let (site, server) = site("search bad.test good.test\noptions ndots:5", move |name, v6| match name {
            "kbs.ns.good.test" if !v6 => addresses(["10.0.0.1"]),
            "kbs.ns.good.test" => Say::Addresses(vec![]),
            _ => bad.clone(),
        })
        .await;
        assert_eq!(site.lookup("kbs.ns").await, "10.0.0.1", "{kind}: {:?}", server.asked());
    }
}

#[tokio::test]
async fn addresses_of_two_suffixes_are_not_mixed() {
    let (site, _server) = site("search a.test b.test", |name, v6| match (name, v6) {
        ("kbs.a.test", false) => addresses(["10.0.0.1"]),
        ("kbs.b.test", true) => addresses(["fd00::bad"]),
        _ => Say::Addresses(vec![]),
    })
    .await;
    assert_eq!(site.lookup("kbs").await, "10.0.0.1");
}

#[tokio::test]
async fn a_search_list_of_any_length_is_used() {
    let long: Vec<String> = (0..12).map(|n| format!("a-suffix-that-is-rather-long-{n}.test")).collect();
    let more = format!("search {}\noptions ndots:5", long.join(" "));
    assert!(more.len() > 256);
    let (site, _server) = site(&more, |name, v6| match (name, v6) {
        ("kbs.x.a-suffix-that-is-rather-long-11.test", false) => addresses(["10.0.0.1"]),
        _ => Say::Code(3),
    })
    .await;
    assert_eq!(site.lookup("kbs.x").await, "10.0.0.1");
}

#[tokio::test]
async fn the_root_as_a_suffix_and_a_dot_at_the_end_are_understood() {
    let rule = |name: &str, v6: bool| match (name, v6) {
        ("kbs.example", false) => addresses(["10.0.0.1"]),
        _ => Say::Code(3),
    };
    for more in ["search .\noptions ndots:5", "search . a.test\noptions ndots:15", "search a.test .", ""] {
        let (site, server) = site(more, rule).await;
        for name in ["kbs.example", "kbs.example.", "KBS.Example"] {
            assert_eq!(site.lookup(name).await, "10.0.0.1", "{more:?} {name}: {:?}", server.asked());
        }
    }
}

#[tokio::test]
async fn an_answer_that_does_not_fit_is_fetched_over_tcp() {
    let all: Vec<IpAddr> = (0..60).map(|n| IpAddr::from([10, 0, 0, n])).collect();
    let (site, server) = site("", move |name, v6| match (name, v6) {
        ("whole", false) => Say::Truncated(all.clone()),
        ("cut", false) => Say::TruncatedOnly(all.clone()),
        ("silent", false) => Say::TruncatedSilent(all.clone()),
        _ => Say::Addresses(vec![]),
    })
    .await;
    assert!(site.lookup("whole").await.starts_with("10.0.0.0 10.0.0.1 "));
    assert!(server.asked().contains(&"tcp whole A".to_owned()), "{:?}", server.asked());
    assert!(site.lookup("cut").await.starts_with("10.0.0.0 10.0.0.1 "), "a server without TCP");
    assert!(site.lookup("silent").await.starts_with("10.0.0.0 10.0.0.1 "), "a server behind a firewall");
}

#[tokio::test]
async fn options_are_honoured() {
    let (site, server) = site("options use-vc no-aaaa", |_, _| addresses(["10.0.0.1"])).await;
    assert_eq!(site.lookup("kbs").await, "10.0.0.1");
    assert_eq!(server.asked(), ["tcp kbs A"]);
}

#[tokio::test]
async fn a_dead_name_server_costs_little() {
    let good = |name: &str, v6: bool| match (name, v6) {
        ("kbs.x", false) => addresses(["10.0.0.1"]),
        _ => Say::Code(3),
    };
    for bad in
        [Say::Nothing, Say::Code(2), Say::Code(5), Say::Garbage, Say::Forged("10.0.0.66".parse().unwrap())]
    {
        let kind = format!("{bad:?}");
        let first = NameServer::start(ANY.parse().unwrap(), move |_, _| bad.clone()).await;
        let port = first.addr.port();
        let second = NameServer::start(SocketAddr::from(([127, 0, 0, 2], port)), good).await;
        // 127.0.0.3 refuses.
        let resolv_conf = "nameserver 127.0.0.3\nnameserver 127.0.0.1\nnameserver 127.0.0.2\n\
                           search a.test b.test c.test d.test e.test\noptions ndots:5";
        let site = Site::new(resolv_conf, "", port);
        is_quick(NAME_LOOKUP, &kind, async || {
            assert_eq!(site.lookup("kbs.x").await, "10.0.0.1", "{kind}: {:?}", second.asked());
        })
        .await;
    }
}

#[tokio::test]
async fn a_failed_lookup_says_why_and_is_bounded() {
    let (site, _server) = site("search a.test", |name, _| match name {
        "refused" | "refused.a.test" => Say::Code(5),
        "broken" => Say::Code(2),
        "silent" | "silent.a.test" => Say::Nothing,
        _ => Say::Code(3),
    })
    .await;
    assert_eq!(site.lookup("nosuch").await, "the host name nosuch has no address");
    let refused = "looking up the host name refused: name server 127.0.0.1: REFUSED";
    assert_eq!(site.lookup("refused").await, refused);
    let broken = "looking up the host name broken: name server 127.0.0.1: SERVFAIL";
    assert_eq!(site.lookup("broken").await, broken);
    let silent = site.lookup("silent").await;
    assert!(silent.starts_with("looking up the host name silent: no answer within "), "{silent}");
    let deaf = Site::new("nameserver 127.0.0.3", "", 9).lookup("kbs").await;
    assert_eq!(
        deaf,
        "looking up the host name kbs: name server 127.0.0.3: Connection refused (os error 111)"
    );
}

#[tokio::test]
async fn files_are_read_again_and_hosts_come_first() {
    let (site, server) = site("", |_, v6| if v6 { Say::Code(3) } else { addresses(["10.0.0.1"]) }).await;
    assert_eq!(site.lookup("kbs").await, "10.0.0.1");
    // Once for each kind of address; more if an answer came late.
    let first = server.asked().len();
    assert!(first >= 2);
    site.write("hosts", "10.0.0.2 kbs\nfd00::2 x\n");
    assert_eq!(site.lookup("KBS.").await, "10.0.0.2");
    site.write("hosts", "");
    site.write("resolv.conf", "nameserver 127.0.0.3\n");
    assert!(site.lookup("kbs").await.contains("127.0.0.3: Connection refused"));
    assert_eq!(server.asked().len(), first, "it was asked again");
    std::fs::remove_file(site.dir.path().join("resolv.conf")).unwrap();
    std::fs::remove_file(site.dir.path().join("hosts")).unwrap();
    assert_eq!(site.lookup("kbs").await, "10.0.0.1", "this machine is the default name server");
    assert!(server.asked().len() >= first + 2);
}

#[tokio::test]
async fn addresses_and_localhost_need_no_name_server() {
    let site = Site::new("nameserver 127.0.0.3", "", 9);
    for (name, found) in [
        ("10.0.0.1", "10.0.0.1"),
        ("fd00::1", "fd00::1"),
        ("localhost", "::1 127.0.0.1"),
        ("LOCALHOST.", "::1 127.0.0.1"),
        ("a.localhost", "::1 127.0.0.1"),
    ] {
        assert_eq!(site.lookup(name).await, found, "{name}");
    }
    site.write("hosts", "127.0.0.1 localhost\n");
    assert_eq!(site.lookup("localhost").await, "127.0.0.1", "the file says so");
    for never in ["a..b", &"x".repeat(64), "."] {
        assert_eq!(site.lookup(never).await, format!("the host name {never} has no address"));
    }
}

/// A server whose backlog is full: it drops what would open a connection, as a black hole does.
struct BlackHole {
    _listener: TcpListener,
    _clients: Vec<TcpStream>,
}

async fn black_hole(address: SocketAddr) -> BlackHole {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_reuseaddr(true).unwrap();
    socket.bind(address).unwrap();
    let listener = socket.listen(1).unwrap();
    let mut clients = Vec::new();
    while let Ok(client) = timeout(Duration::from_millis(200), TcpStream::connect(address)).await {
        clients.push(client.unwrap());
    }
    BlackHole { _listener: listener, _clients: clients }
}

#[tokio::test]
async fn dead_addresses_do_not_hold_up_the_good_one() {
    let good = TcpListener::bind("127.0.0.5:0").await.unwrap();
    let port = good.local_addr().unwrap().port();
    let at = |last: u8| SocketAddr::from(([127, 0, 0, last], port));
    let _first = black_hole(at(2)).await;
    let _second = black_hole(at(3)).await;
    // Nothing listens at 127.0.0.4.
    for dead in [
        "",
        "127.0.0.2",
        "127.0.0.2 127.0.0.3",
        "127.0.0.4",
        "127.0.0.2 127.0.0.4 127.0.0.3",
        "::1 127.0.0.2",
    ] {
        let mut hosts: Vec<String> = dead.split_whitespace().map(|ip| format!("{ip} kbs\n")).collect();
        hosts.push("127.0.0.5 kbs\n".to_owned());
        let site = Site::new("", &hosts.concat(), 9);
        is_quick(Duration::from_secs(4), dead, async || {
            let stream = dial::connect(&site.resolver, &Host::Name("kbs".into()), port).await.unwrap();
            assert_eq!(stream.peer_addr().unwrap(), at(5), "{dead:?}");
        })
        .await;
    }
}

/// Runs `test` on a thread in a network namespace with the addresses fd00::1, 10.9.0.1 and a link on which nothing answers.
fn in_a_namespace<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    let ip = |arguments: &str| {
        let status = std::process::Command::new("ip").args(arguments.split(' ')).status().unwrap();
        assert!(status.success(), "ip {arguments}");
    };
    let thread = std::thread::spawn(move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        ip("link set lo up");
        ip("link add hole type veth peer name end");
        ip("link set hole up");
        ip("link set end up");
        for own in ["10.9.0.1/24 dev hole", "fd00::1/64 dev hole nodad"] {
            ip(&format!("addr add {own}"));
        }
        for dead in ["10.9.0.2", "10.9.0.3", "fd00::2", "fd00::3"] {
            ip(&format!("neigh add {dead} lladdr 02:00:00:00:00:02 dev hole"));
        }
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test());
    });
    thread.join().unwrap();
}

#[test]
fn black_holes_in_ipv6_and_ipv4_do_not_hold_up_the_good_address() {
    in_a_namespace(async || {
        let good = TcpListener::bind("10.9.0.1:0").await.unwrap();
        let port = good.local_addr().unwrap().port();
        let good6 = TcpListener::bind(("fd00::1", port)).await.unwrap();
        for (addresses, reached) in [
            ("fd00::2 10.9.0.1", &good),
            ("fd00::2 fd00::3 10.9.0.1", &good),
            ("fd00::2 fd00::3 10.9.0.2 10.9.0.3 10.9.0.1", &good),
            ("10.9.0.2 10.9.0.1", &good),
            ("10.9.0.2 10.9.0.3 fd00::1", &good6),
            // No route.
            ("fd99::1 192.0.2.1 10.9.0.1", &good),
        ] {
            let hosts: String = addresses.split(' ').map(|ip| format!("{ip} kbs\n")).collect();
            let site = Site::new("", &hosts, 9);
            // The first data of a KBS stream may take 5 s.
            is_quick(Duration::from_secs(4), addresses, async || {
                let stream = dial::connect(&site.resolver, &Host::Name("kbs".into()), port).await.unwrap();
                assert_eq!(stream.peer_addr().unwrap(), reached.local_addr().unwrap(), "{addresses}");
            })
            .await;
        }
    });
}

#[tokio::test]
async fn the_error_has_the_cause_at_each_address() {
    // Held, and without a listener: another test gets no server there.
    let closed = TcpSocket::new_v4().unwrap();
    closed.bind("127.0.0.2:0".parse().unwrap()).unwrap();
    let port = closed.local_addr().unwrap().port();
    let hosts = "127.0.0.2 kbs\n127.0.0.3 kbs\n";
    let site = Site::new("", hosts, 9);
    let error = dial::connect(&site.resolver, &Host::Name("kbs".into()), port).await.unwrap_err();
    let refused = "Connection refused (os error 111)";
    assert_eq!(error.to_string(), format!("127.0.0.2: {refused}, 127.0.0.3: {refused}"));
    let hosts: String = (1..=6).map(|n| format!("127.0.1.{n} kbs\n")).collect();
    let site = Site::new("", &hosts, 9);
    let error = dial::connect(&site.resolver, &Host::Name("kbs".into()), port).await.unwrap_err().to_string();
    assert!(error.ends_with(" and 2 more"), "{error}");
}
