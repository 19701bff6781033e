//! Who may send into the tunnel: the worker node, and no other address, whatever id and port it uses.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::process::Stdio;

use secure_comms_tests::harness::pod_site::{ID, POD_HARDWARE, PORT, Plan, PodSite, V4, V4_OVER_V6, is_up};
use secure_comms_tests::harness::scene::PATIENCE;
use secure_comms_tests::harness::test_namespace::TestNamespace;
use secure_comms_tunnel::netns::Namespace;
use serde_json::json;
use tokio::io::AsyncWriteExt;

use crate::{end, nft, tunnel, with};

/// Larger than the VM's packets: it comes in fragments.
const LARGE: usize = 4000;

fn octets(address: &str) -> [u8; 4] {
    Plan::bare(address).parse::<Ipv4Addr>().unwrap().octets()
}

/// The one's complement sum of RFC 1071.
fn checksum(header: &[u8]) -> [u8; 2] {
    let mut sum: u32 = header.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

/// A VXLAN packet for the pod: from its gateway, a UDP datagram to `port` with this content.
fn packet(plan: &Plan, id: u32, port: u16, content: &[u8]) -> Vec<u8> {
    let hardware: Vec<u8> =
        POD_HARDWARE.split(':').map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
    let length = |bytes: usize| u16::try_from(bytes).unwrap().to_be_bytes();
    let mut ip = vec![0x45, 0];
    ip.extend(length(28 + content.len()));
    ip.extend([0, 0, 0, 0, 64, 17, 0, 0]);
    ip.extend(octets(plan.gateway));
    ip.extend(octets(plan.pod));
    let sum = checksum(&ip);
    ip[10..12].copy_from_slice(&sum);
    let mut out = vec![8, 0, 0, 0];
    out.extend(&id.to_be_bytes()[1..]);
    out.push(0);
    out.extend(hardware);
    out.extend([2, 0, 0, 0, 0, 9, 8, 0]);
    out.extend(ip);
    // A UDP checksum of 0 is none.
    out.extend([length(9), length(usize::from(port)), length(8 + content.len()), [0; 2]].concat());
    out.extend(content);
    out
}

async fn socket(netns: &TestNamespace, address: SocketAddr) -> UdpSocket {
    let bind = move || {
        let socket = UdpSocket::bind(address)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok(socket)
    };
    Namespace::new(netns.name()).run(bind).await.unwrap()
}

/// A site whose pod listens to UDP, whose worker node has a stranger's addresses as well, and whose VM counts the stranger's
/// packets: those that came, and those that passed.
struct Exposed {
    site: PodSite,
    plan: Plan,
}

/// The stranger's addresses.
const STRANGER: [&str; 2] = ["10.9.0.66/24", "fd09::66/64"];

impl Exposed {
    async fn new(plan: Plan) -> Self {
        let site = PodSite::new(&plan).unwrap();
        // Both families, whichever the tunnel uses.
        let other = if plan.vm.contains(':') { V4 } else { V4_OVER_V6 };
        site.vm.address("ens3", other.vm).unwrap();
        for address in STRANGER.iter().chain([&other.node]) {
            site.node.address("cable", address).unwrap();
        }
        nft(&site.vm, &["add", "table", "inet", "count"]).await;
        for (chain, hook, priority) in [("came", "prerouting", "-450"), ("passed", "input", "0")] {
            let base = format!("{{ type filter hook {hook} priority {priority}; }}");
            nft(&site.vm, &["add", "chain", "inet", "count", chain, &base]).await;
            for (family, address) in ["ip", "ip6"].into_iter().zip(STRANGER) {
                let rule = [family, "saddr", Plan::bare(address), "meta", "l4proto", "udp", "counter"];
                nft(&site.vm, &[&["add", "rule", "inet", "count", chain][..], &rule].concat()).await;
            }
            // Fragments behind the first of IPv6 have no transport protocol to match.
            let rule = ["add", "rule", "inet", "count", chain, "exthdr", "frag", "exists", "counter"];
            nft(&site.vm, &rule).await;
        }
        Self { site, plan }
    }

    /// Packets of the stranger in this chain of the VM, of both families.
    async fn counted(&self, chain: &str) -> usize {
        let text = nft(&self.site.vm, &["list", "chain", "inet", "count", chain]).await;
        let after = text.split("counter packets ").skip(1);
        after.map(|rest| rest.split(' ').next().unwrap().parse::<usize>().unwrap()).sum()
    }

    /// Sends from `source` to the VM's address of the same family.
    async fn send(&self, source: &str, packet: &[u8]) {
        let source: IpAddr = Plan::bare(source).parse().unwrap();
        let plan = if source.is_ipv4() { V4 } else { V4_OVER_V6 };
        let vm = Plan::bare(plan.vm).parse().unwrap();
        let socket = socket(&self.site.node, SocketAddr::new(source, 0)).await;
        assert_eq!(socket.send_to(packet, SocketAddr::new(vm, PORT)).unwrap(), packet.len());
    }

    /// Waits until the VM has seen more than `before` packets of the stranger.
    async fn until_came(&self, before: usize) {
        let more = async {
            while self.counted("came").await <= before {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(PATIENCE, more).await.unwrap();
    }

    /// Asserts that the pod gets what the worker node sends, and nothing of what a stranger sends first.
    async fn check(&self) {
        let pod = socket(&self.site.pod, SocketAddr::new(IpAddr::from(octets(self.plan.pod)), 0)).await;
        let port = pod.local_addr().unwrap().port();
        let large = vec![b'f'; LARGE];
        for content in [b"forged".as_slice(), &large] {
            for source in STRANGER {
                let before = self.counted("came").await;
                self.send(source, &packet(&self.plan, ID, port, content)).await;
                self.until_came(before).await;
            }
        }
        let (worker_node, genuine) = (self.plan.node, vec![b'g'; LARGE]);
        self.send(worker_node, &packet(&self.plan, ID + 7, port, b"another tunnel's")).await;
        for content in [b"genuine".as_slice(), &genuine] {
            self.send(worker_node, &packet(&self.plan, ID, port, content)).await;
            let mut buffer = [0; 2 * LARGE];
            let (length, _) = pod.recv_from(&mut buffer).unwrap();
            assert_eq!(
                String::from_utf8_lossy(&buffer[..length.min(20)]),
                String::from_utf8_lossy(&content[..content.len().min(20)])
            );
            assert_eq!(length, content.len());
        }
        pod.set_nonblocking(true).unwrap();
        assert!(pod.recv_from(&mut [0; 9]).is_err(), "the pod got more than the worker node sent");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_worker_node_can_send_into_the_tunnel() {
    for plan in [V4, V4_OVER_V6] {
        let exposed = Exposed::new(plan).await;
        let mut agent = exposed.site.up(&plan.pod_network()).await.unwrap();
        exposed.check().await;
        // The tunnel outlives the agent, and so does its firewall.
        agent.kill9().await.unwrap();
        exposed.check().await;
        let agent = exposed.site.up(&plan.pod_network()).await.unwrap();
        exposed.check().await;
        end(agent).await;
        assert_eq!(nft(&exposed.site.vm, &["list", "tables"]).await, "table inet count\n");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_address_of_the_other_family_is_a_stranger_too() {
    // The worker node's own addresses in the family that the tunnel does not use.
    for (plan, other) in [(V4, V4_OVER_V6.node), (V4_OVER_V6, V4.node)] {
        let exposed = Exposed::new(plan).await;
        let agent = exposed.site.up(&plan.pod_network()).await.unwrap();
        let (family, address) = (if other.contains(':') { "ip6" } else { "ip" }, Plan::bare(other));
        for chain in ["came", "passed"] {
            let rule = [
                "add", "rule", "inet", "count", chain, family, "saddr", address, "meta", "l4proto", "udp",
                "counter",
            ];
            nft(&exposed.site.vm, &rule).await;
        }
        exposed.send(other, &packet(&plan, ID, 9, b"forged")).await;
        exposed.until_came(0).await;
        assert_eq!(exposed.counted("passed").await, 0);
        end(agent).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_firewall_follows_the_spec() {
    let site = PodSite::new(&V4).unwrap();
    let rules = async || nft(&site.vm, &["list", "table", "inet", "secure-comms"]).await;
    let mut agent = site.up(&V4.pod_network()).await.unwrap();
    let before = rules().await;
    assert!(before.contains("udp dport 4790 drop") && before.contains("10.9.0.2"), "{before}");
    agent.kill9().await.unwrap();
    let moved = with(&V4, &[("vxlan-port", json!(4791)), ("worker-node-ip", json!("10.9.0.9/24"))]);
    let agent = site.up(&moved).await.unwrap();
    let after = rules().await;
    assert_eq!(after, before.replace("4790", "4791").replace("10.9.0.2", "10.9.0.9"));
    end(agent).await;
    assert_eq!(nft(&site.vm, &["list", "tables"]).await, "");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_its_firewall_there_is_no_tunnel() {
    let site = PodSite::new(&V4).unwrap();
    // A program that owns the table: the kernel lets no other change it, until the owner ends.
    let mut owner = site.vm.command("nft");
    owner.arg("-i").stdin(Stdio::piped()).stdout(Stdio::null()).kill_on_drop(true);
    let mut owner = owner.spawn().unwrap();
    let mut to_owner = owner.stdin.take().unwrap();
    to_owner.write_all(b"add table inet secure-comms { flags owner; }\n").await.unwrap();
    let owned = async {
        while !nft(&site.vm, &["list", "tables"]).await.contains("secure-comms") {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, owned).await.unwrap();
    let agent = site.agent(&V4.pod_network()).await.unwrap();
    let line = agent.wait_for_text("setting up the pod network: ", PATIENCE).await.unwrap();
    assert!(line.contains("dropping packets to port 4790 that are not from 10.9.0.2: "), "{line}");
    assert_eq!(site.pod.show(["link", "show", "type", "vxlan"]).unwrap(), json!([]), "no tunnel");
    drop(to_owner);
    assert!(owner.wait().await.unwrap().success());
    is_up(&agent).await.unwrap();
    assert_eq!(tunnel(&site)["ifname"], "eth0");
    end(agent).await;
}
