//! The pod's network: the real agent in a VM that is a namespace, and a VXLAN peer at the worker node.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // a test's helpers fail as the test does

#[path = "pod_network/caa.rs"]
mod caa;
#[path = "pod_network/secondary.rs"]
mod secondary;
#[path = "pod_network/strangers.rs"]
mod strangers;

use std::os::unix::net::UnixDatagram;
use std::process::Output;

use secure_comms_tests::harness::pod_site::{
    ID, POD_HARDWARE, PORT, Plan, PodSite, V4, V4_OVER_V6, V6, V6_OVER_V4, is_up,
};
use secure_comms_tests::harness::process::{Child, Signal, ensure_built};
use secure_comms_tests::harness::scene::PATIENCE;
use secure_comms_tests::harness::test_namespace::TestNamespace;
use serde_json::{Value, json};
use tokio::process::Command;

/// Stops an agent in good order.
async fn end(mut agent: Child) {
    agent.signal(Signal::SIGTERM).unwrap();
    assert!(agent.wait_exit(PATIENCE).await.unwrap().success(), "{}", agent.log());
    assert!(agent.log().contains("pod network: undone"), "{}", agent.log());
}

fn with(plan: &Plan, changes: &[(&str, Value)]) -> Value {
    let mut spec = plan.pod_network();
    for (key, value) in changes {
        spec[key] = value.clone();
    }
    spec
}

async fn traffic(site: &PodSite, plan: &Plan) {
    let (pod, gateway) = (Plan::bare(plan.pod), Plan::bare(plan.gateway));
    site.pod.ping(gateway).await.unwrap();
    site.node.ping(pod).await.unwrap();
    site.pod.exchange(&site.node, gateway).await.unwrap();
    site.node.exchange(&site.pod, pod).await.unwrap();
}

/// The interface that the agent made.
fn tunnel(site: &PodSite) -> Value {
    site.pod.show(["link", "show", "dev", "eth0"]).unwrap()[0].clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn pod_and_worker_node_reach_each_other_until_a_clean_stop() {
    for (plan, mtu) in [(V4, 1450), (V6, 1430), (V4_OVER_V6, 1430), (V6_OVER_V4, 1450)] {
        let site = PodSite::new(&plan).unwrap();
        let before = site.state().unwrap();
        let agent = site.up(&plan.pod_network()).await.unwrap();
        traffic(&site, &plan).await;
        let link = tunnel(&site);
        assert_eq!((&link["mtu"], &link["address"]), (&json!(mtu), &json!(POD_HARDWARE)), "{link}");
        let info = &link["linkinfo"]["info_data"];
        assert_eq!((&info["id"], &info["port"]), (&json!(ID), &json!(PORT)), "{link}");
        end(agent).await;
        assert_eq!(site.state().unwrap(), before, "{plan:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn routes_neighbours_and_the_mtu_are_those_of_the_spec() {
    let site = PodSite::new(&V4).unwrap();
    // As Calico configures it: a /32, with its gateway on the link and a permanent neighbour.
    let changes = [
        ("podip", json!("10.244.1.7/32")),
        ("mtu", json!(1300)),
        (
            "routes",
            json!([
                {"dst": "", "gw": "169.254.1.1", "dev": "eth0", "protocol": 3, "scope": 0},
                {"dst": "10.100.0.0/16", "gw": "169.254.1.1", "dev": "", "protocol": 4},
                {"dst": "169.254.1.1/32", "gw": "", "dev": "eth0", "protocol": 3, "scope": 253},
            ]),
        ),
        (
            "neighbors",
            json!([{"ip": "169.254.1.1", "hw-addr": "ee:ee:ee:ee:ee:ee", "dev": "eth0", "state": 128}]),
        ),
    ];
    let agent = site.up(&with(&V4, &changes)).await.unwrap();
    let mut routes: Vec<String> = Vec::new();
    for route in site.pod.show(["-4", "route"]).unwrap().as_array().unwrap() {
        routes
            .push(format!("{} {} {} {}", route["dst"], route["gateway"], route["protocol"], route["scope"]));
    }
    routes.sort();
    let expected = [
        r#""10.100.0.0/16" "169.254.1.1" "static" "global""#,
        r#""169.254.1.1" null "boot" "link""#,
        r#""default" "169.254.1.1" "boot" "global""#,
    ];
    assert_eq!(routes, expected);
    let neighbours = site.pod.show(["neigh", "show", "nud", "permanent"]).unwrap();
    assert_eq!(neighbours.as_array().unwrap().len(), 1, "{neighbours}");
    assert_eq!(
        (&neighbours[0]["dst"], &neighbours[0]["lladdr"]),
        (&json!("169.254.1.1"), &json!("ee:ee:ee:ee:ee:ee"))
    );
    assert_eq!(tunnel(&site)["mtu"], 1300);
    end(agent).await;

    // The pod's address has a network around it, but the kernel's own route to that is missing.
    let none = with(&V4, &[("routes", json!([]))]);
    let agent = site.up(&none).await.unwrap();
    assert_eq!(site.pod.show(["-4", "route"]).unwrap(), json!([]));
    end(agent).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_agent_reaches_the_same_network_state() {
    let site = PodSite::new(&V4).unwrap();
    let before = site.state().unwrap();
    let mut agent = site.up(&V4.pod_network()).await.unwrap();
    let up = site.state().unwrap();
    agent.kill9().await.unwrap();
    // Half made, and under another name.
    site.pod.ip(["link", "set", "eth0", "down"]).unwrap();
    site.pod.ip(["link", "set", "eth0", "name", "other"]).unwrap();
    let mut agent = site.up(&V4.pod_network()).await.unwrap();
    assert_eq!(site.state().unwrap(), up);
    agent.kill9().await.unwrap();
    // The interface of another pod.
    let changed =
        with(&V4, &[("vxlan-id", json!(ID + 1)), ("podip", json!("10.244.2.9/24")), ("routes", json!([]))]);
    let mut agent = site.up(&changed).await.unwrap();
    assert_eq!(tunnel(&site)["linkinfo"]["info_data"]["id"], ID + 1);
    agent.kill9().await.unwrap();
    let agent = site.up(&V4.pod_network()).await.unwrap();
    assert_eq!(site.state().unwrap(), up);
    traffic(&site, &V4).await;
    end(agent).await;
    assert_eq!(site.state().unwrap(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_late_default_route_and_address_are_noticed() {
    let site = PodSite::bare().unwrap();
    site.node.address("cable", V4.node).unwrap();
    site.node_end(&V4).unwrap();
    let agent = site.agent(&V4.pod_network()).await.unwrap();
    agent.wait_for_text("pod network: waiting: no default route for IPv4", PATIENCE).await.unwrap();
    // The default route exists before the address does.
    site.vm.ip(["route", "add", "default", "dev", "ens3"]).unwrap();
    agent.wait_for_text("pod network: waiting: 'ens3' has no IPv4 address", PATIENCE).await.unwrap();
    site.vm.address("ens3", V4.vm).unwrap();
    is_up(&agent).await.unwrap();
    traffic(&site, &V4).await;
    end(agent).await;

    let site = PodSite::bare().unwrap();
    let mut command = site.agent_command(&V4.pod_network()).await.unwrap();
    command.args(["-host-interface", "ens4"]);
    let agent = Child::spawn("agent", command).unwrap();
    agent.wait_for_text("pod network: waiting: no interface 'ens4'", PATIENCE).await.unwrap();
    site.vm.veth("ens4", &site.node, "cable2").unwrap();
    agent.wait_for_text("pod network: waiting: 'ens4' has no IPv4 address", PATIENCE).await.unwrap();
    // An agent that waits for the network can be stopped.
    end(agent).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_tunnel_leaves_by_the_interface_that_the_flag_names() {
    let site = PodSite::new(&V4).unwrap();
    let other = TestNamespace::new("other").unwrap();
    site.vm.veth("ens4", &other, "cable").unwrap();
    site.vm.address("ens4", "10.8.0.1/24").unwrap();
    site.vm.ip(["route", "change", "default", "via", "10.8.0.2", "dev", "ens4"]).unwrap();
    let spec = with(&V4, &[("dedicated", json!(true))]);
    let mut command = site.agent_command(&spec).await.unwrap();
    command.args(["-host-interface", "ens3"]);
    let agent = Child::spawn("agent", command).unwrap();
    let line = is_up(&agent).await.unwrap();
    assert!(line.contains("from 10.9.0.1 ('ens3')"), "{line}");
    traffic(&site, &V4).await;
    end(agent).await;

    // The VM's only interface can't be the dedicated one; the agent reports that, retries, and serves.
    let agent = site.agent(&spec).await.unwrap();
    agent.wait_for_text("'ens4' has the VM's default route; give -host-interface", PATIENCE).await.unwrap();
    site.vm.ip(["route", "change", "default", "via", "10.9.0.2", "dev", "ens3"]).unwrap();
    end(agent).await;
}

/// Runs `nft` in a namespace; returns its output.
async fn nft(netns: &TestNamespace, arguments: &[&str]) -> String {
    let output = netns.command("nft").args(arguments).output().await.unwrap();
    assert!(output.status.success(), "nft {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_tunnel_is_not_tracked_and_its_rules_go_with_it() {
    for plan in [V4, V6] {
        let site = PodSite::new(&plan).unwrap();
        let agent = site.up(&plan.pod_network()).await.unwrap();
        // From now on the VM tracks connections, and counts the tunnel's packets that it tracks.
        let port = PORT.to_string();
        nft(&site.vm, &["add", "table", "inet", "t"]).await;
        for (chain, hook) in [("in", "input"), ("out", "output")] {
            let base = format!("{{ type filter hook {hook} priority 0; }}");
            nft(&site.vm, &["add", "chain", "inet", "t", chain, &base]).await;
            for state in ["untracked", "new,established"] {
                let rule = [
                    "add", "rule", "inet", "t", chain, "udp", "dport", &port, "ct", "state", state, "counter",
                ];
                nft(&site.vm, &rule).await;
            }
        }
        traffic(&site, &plan).await;
        let counted = nft(&site.vm, &["list", "table", "inet", "t"]).await;
        let lines = |state: &str| {
            counted.lines().filter(|line| line.contains(state)).map(str::to_owned).collect::<Vec<_>>()
        };
        let (untracked, tracked) = (lines("untracked"), lines("established"));
        assert_eq!((untracked.len(), tracked.len()), (2, 2), "{counted}");
        assert!(untracked.iter().all(|line| !line.contains("packets 0 ")), "{counted}");
        assert!(tracked.iter().all(|line| line.contains("packets 0 ")), "{counted}");
        end(agent).await;
        assert_eq!(nft(&site.vm, &["list", "tables"]).await, "table inet t\n");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_node_out_of_reach_is_no_failure() {
    let site = PodSite::bare().unwrap();
    site.vm.address("ens3", V4.vm).unwrap();
    site.vm.ip(["route", "add", "default", "dev", "ens3"]).unwrap();
    let away = with(&V4, &[("worker-node-ip", json!("192.0.2.1/24"))]);
    let agent = site.up(&away).await.unwrap();
    end(agent).await;
}

/// The routes of the pod, sorted, as `ip` prints them.
fn pod_routes(site: &PodSite, family: &str) -> Vec<String> {
    let arguments = ["-n", site.pod.name(), family, "route"];
    let output = std::process::Command::new("ip").args(arguments).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    let mut routes: Vec<_> = text.lines().map(|line| line.trim().to_owned()).collect();
    routes.sort();
    routes
}

/// The agent's warnings that a route or a neighbour is left out.
fn left_out(agent: &Child) -> Vec<String> {
    agent.log().lines().filter(|line| line.contains("left out")).map(str::to_owned).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_set_up_is_left_out_alone() {
    let site = PodSite::new(&V4).unwrap();
    site.pod.ip(["link", "add", "lost", "type", "veth", "peer", "name", "found"]).unwrap();
    let before = site.state().unwrap();
    let routes = json!([
        {"dst": "::ffff:0.0.0.0/0", "gw": "10.244.1.1", "dev": "eth0", "protocol": "boot"},
        {"dst": "10.244.1.0/24", "gw": "", "dev": "eth0", "protocol": "kernel", "scope": "link"},
        {"dst": "192.0.2.0/24", "gw": "", "dev": "net1", "protocol": "kernel", "scope": "link"},
        {"dst": "198.51.100.0/24", "gw": "10.99.0.1", "dev": "eth0", "protocol": "boot"},
        {"dst": "0.0.0.0/0", "gw": "10.244.1.2", "dev": "eth0"},
        // Its interface is down.
        {"dst": "10.50.0.0/16", "dev": "lost"},
        {"dst": "10.51.0.0/16", "gw": "fd00::1", "dev": "eth0"},
        {"dst": "10.52.0.0/16", "gw": "10.244.1.1", "dev": "eth0", "protocol": "foo"},
        // Twice, in two forms.
        {"dst": "0.0.0.0/0", "gw": "10.244.1.1", "dev": "", "protocol": "static"},
    ]);
    let neighbours = json!([
        {"ip": "10.244.1.1", "hw-addr": "ee:ee:ee:ee:ee:ee", "dev": "net1", "state": "permanent"},
        {"ip": "10.244.1.9", "hw-addr": "ee:ee:ee:ee:ee:09", "dev": "eth0", "state": "permanent"},
        {"ip": "10.244.1.9", "hw-addr": "ee:ee:ee:ee:ee:09", "dev": "eth0", "state": "permanent"},
    ]);
    let spec = with(&V4, &[("routes", routes), ("neighbors", neighbours)]);
    let agent = site.up(&spec).await.unwrap();
    traffic(&site, &V4).await;
    assert_eq!(
        pod_routes(&site, "-4"),
        [
            "10.244.1.0/24 dev eth0 proto kernel scope link",
            "10.52.0.0/16 via 10.244.1.1 dev eth0",
            "default via 10.244.1.1 dev eth0",
        ]
    );
    let neighbours = site.pod.show(["neigh", "show", "nud", "permanent"]).unwrap();
    assert_eq!(neighbours.as_array().unwrap().len(), 1, "{neighbours}");
    agent.wait_for_text("neighbour 10.244.1.1 is left out", PATIENCE).await.unwrap();
    let lines = left_out(&agent);
    for part in [
        "route 192.0.2.0/24 is left out: the pod's namespace has no interface 'net1'",
        "route 198.51.100.0/24 by 10.99.0.1 is left out: ",
        "no route without a gateway leads to its gateway",
        "route 0.0.0.0/0 by 10.244.1.2 is left out: another route has this destination",
        "route 10.50.0.0/16 is left out: Network is down",
        "'routes[6].gw': fd00::1 is not of the family of dst 10.51.0.0/16",
        "neighbour 10.244.1.1 is left out: the pod's namespace has no interface 'net1'",
    ] {
        assert_eq!(lines.iter().filter(|line| line.contains(part)).count(), 1, "{part}: {lines:#?}");
    }
    assert_eq!(lines.len(), 6, "{lines:#?}");
    agent.wait_for_text("\"foo\" is no routing protocol; 'boot' is taken", PATIENCE).await.unwrap();
    end(agent).await;
    assert_eq!(site.state().unwrap(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_route_that_exists_already_is_enough() {
    let site = PodSite::new(&V4).unwrap();
    site.pod.veth("net1", &site.node, "net1").unwrap();
    // The kernel makes the one, an agent that was killed half-way left the other.
    site.pod.address("net1", "10.50.0.1/16").unwrap();
    site.pod.ip(["route", "add", "10.51.0.0/16", "dev", "net1"]).unwrap();
    let routes = json!([{"dst": "10.50.0.0/16", "dev": "net1"}, {"dst": "10.51.0.0/16", "dev": "net1"}]);
    let spec = with(&V4, &[("routes", routes)]);
    for _ in 0..2 {
        let mut agent = site.up(&spec).await.unwrap();
        assert_eq!(left_out(&agent), [""; 0]);
        let kernel = "10.50.0.0/16 dev net1 proto kernel scope link src 10.50.0.1";
        assert!(pod_routes(&site, "-4").contains(&kernel.to_owned()), "{:?}", pod_routes(&site, "-4"));
        agent.kill9().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_is_undone_and_reported_and_tried_again() {
    let site = PodSite::new(&V4).unwrap();
    // The kernel has one VXLAN link of an id and a port.
    let (id, port) = (ID.to_string(), PORT.to_string());
    let other = ["link", "add", "other", "type", "vxlan", "id", &id, "dstport", &port, "dev", "ens3"];
    site.vm.ip(other).unwrap();
    let before = site.state().unwrap();
    let systemd = UnixDatagram::bind(site.path("notify")).unwrap();
    systemd.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut command = site.agent_command(&V4.pod_network()).await.unwrap();
    command.env("NOTIFY_SOCKET", site.path("notify"));
    let agent = Child::spawn("agent", command).unwrap();
    let line = agent.wait_for_text("setting up the pod network: ", PATIENCE).await.unwrap();
    for part in ["making VXLAN link 'eth0', id 555001, port 4790", "no other link with this id and port"] {
        assert!(line.contains(part), "{part:?} is not in {line:?}");
    }
    let mut buffer = [0; 4096];
    let status = loop {
        let length = systemd.recv(&mut buffer).unwrap();
        let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
        if text.contains("making VXLAN link") {
            break text;
        }
    };
    assert!(
        status
            .starts_with("STATUS=Attestation phase: waiting for a worker node; setting up the pod network: "),
        "{status}"
    );
    end(agent).await;
    assert_eq!(site.state().unwrap(), before);
    site.vm.ip(["link", "del", "other"]).unwrap();

    // Interfaces of others are not changed, and once they are gone the network comes up.
    site.pod.ip(["link", "add", "eth0", "type", "veth", "peer", "name", "peer"]).unwrap();
    let agent = site.agent(&V4.pod_network()).await.unwrap();
    agent.wait_for_text("has a 'eth0' already that is no VXLAN link", PATIENCE).await.unwrap();
    site.pod.ip(["link", "del", "eth0"]).unwrap();
    is_up(&agent).await.unwrap();
    traffic(&site, &V4).await;
    end(agent).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_namespace_that_comes_late_gets_its_network() {
    let site = PodSite::new(&V4).unwrap();
    let late = Made(format!("sc-late-{}", std::process::id()));
    let path = format!("/run/netns/{}", late.0);
    let mut command = site.agent_command(&V4.pod_network()).await.unwrap();
    command.args(["-pod-namespace", &path]);
    let agent = Child::spawn("agent", command).unwrap();
    agent.wait_for_text(&format!("opening network namespace {path}"), PATIENCE).await.unwrap();
    assert!(make(&path, &[]).await.status.success());
    is_up(&agent).await.unwrap();
    // The interface may disappear before the agent stops.
    assert!(Command::new("ip").args(["netns", "del", &late.0]).status().await.unwrap().success());
    end(agent).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_pod_network_ends_the_agent_with_every_fault() {
    let site = PodSite::bare().unwrap();
    let wrong = with(
        &V4,
        &[("podip", json!("10.244.1.7")), ("tunnel-type", json!("routing")), ("mtu", json!("big"))],
    );
    let mut agent = site.agent(&wrong).await.unwrap();
    assert_eq!(agent.wait_exit(PATIENCE).await.unwrap().code(), Some(1));
    let log = agent.log();
    for part in
        ["'podip': '10.244.1.7'", "'tunnel-type': 'routing'", "'mtu': \"big\"", "correct the VM's user data"]
    {
        assert!(log.contains(part), "{part:?} is not in {log}");
    }
}

/// Runs the agent to make a namespace.
async fn make(path: &str, more: &[&str]) -> Output {
    let mut command = Command::new(&ensure_built().await.unwrap().agent);
    command.env("JOURNAL_STREAM", "1:1").env_remove("SECURE_COMMS_BIN_DIR");
    command.args(["-pod-namespace", path, "-create-pod-namespace-only"]).args(more);
    command.output().await.unwrap()
}

/// A named namespace that is removed when dropped.
struct Made(String);

impl Drop for Made {
    fn drop(&mut self) {
        // It may not exist.
        let _ = std::process::Command::new("ip").args(["netns", "del", &self.0]).output();
    }
}

#[tokio::test]
async fn a_missing_pod_namespace_is_made_and_an_existing_one_kept() {
    let made = Made(format!("sc-made-{}", std::process::id()));
    let path = format!("/run/netns/{}", made.0);
    let said = make(&path, &[]).await;
    assert!(said.status.success() && String::from_utf8_lossy(&said.stderr).contains(": made"), "{said:?}");
    let inside = || async {
        let mut command = Command::new("ip");
        command.args([
            "netns",
            "exec",
            &made.0,
            "sh",
            "-c",
            "readlink /proc/self/ns/net; ip -o link show up",
        ]);
        let output = command.output().await.unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let first = inside().await;
    assert!(first.contains(": lo: <LOOPBACK,UP"), "{first}");
    assert!(!first.contains(std::fs::read_link("/proc/self/ns/net").unwrap().to_str().unwrap()));
    let again = make(&path, &[]).await;
    assert!(again.status.success() && again.stderr.is_empty(), "{again:?}");
    assert_eq!(inside().await, first);

    // A route of the pod's network to that address does not count: packets to it stay in the namespace.
    for _ in 0..2 {
        let said = make(&path, &["-pod-namespace-address", "169.254.169.254/32"]).await;
        assert!(said.status.success() && said.stderr.is_empty(), "{said:?}");
    }
    let routes = "ip link add pod0 type veth peer name pod1; ip link set pod1 up; ip link set pod0 up; ip addr add 10.244.1.7/24 dev pod0; \
                  ip route add default via 10.244.1.1; ip route add 169.254.169.254 via 10.244.1.1; ip route get 169.254.169.254";
    let shell = ["netns", "exec", &made.0, "sh", "-ec", routes];
    let route = Command::new("ip").args(shell).output().await.unwrap();
    assert!(String::from_utf8_lossy(&route.stdout).starts_with("local 169.254.169.254 dev lo"), "{route:?}");

    // A file that a crash or a lost mount left.
    std::fs::File::create(&path).map(drop).unwrap_or_default();
    let unmounted = Command::new("umount").arg(&path).status().await.unwrap();
    assert!(unmounted.success() && std::fs::metadata(&path).unwrap().len() == 0);
    let repaired = make(&path, &[]).await;
    assert!(repaired.status.success(), "{repaired:?}");
    assert!(String::from_utf8_lossy(&repaired.stderr).contains("repaired"), "{repaired:?}");
    assert_ne!(inside().await, first);
    let deleted = Command::new("ip").args(["netns", "del", &made.0]).status().await.unwrap();
    assert!(deleted.success() && !std::path::Path::new(&path).exists());
}

#[tokio::test]
async fn a_pod_namespace_replaces_no_other_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("deep/podns");
    let text = path.to_str().unwrap();
    assert!(make(text, &[]).await.status.success());
    let output =
        Command::new("nsenter").arg(format!("--net={text}")).args(["ip", "-o", "link"]).output().await;
    let links = String::from_utf8(output.unwrap().stdout).unwrap();
    assert_eq!(links.lines().count(), 1, "only lo: {links}");
    assert!(Command::new("umount").arg(&path).status().await.unwrap().success());

    let file = directory.path().join("notes");
    std::fs::write(&file, "mine").unwrap();
    for path in [&file, &directory.path().to_owned()] {
        let said = make(path.to_str().unwrap(), &[]).await;
        assert_eq!(said.status.code(), Some(1));
        let error = String::from_utf8_lossy(&said.stderr).into_owned();
        assert!(error.contains("the path is neither a namespace nor an empty file; remove it"), "{error}");
    }
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "mine");
}
