//! Our nftables rules, in a network namespace of each test's own: root and nft are needed.
#![allow(clippy::unwrap_used)]

use std::os::fd::AsRawFd as _;
use std::process::Command;
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};
use secure_comms_node::caa::rules::{RulesSettings, RulesState, apply, inspect, keep, remove};
use secure_comms_node::health::Health;
use secure_comms_node::metrics::{Form, Metrics};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::timeout;

const SETTINGS: RulesSettings = RulesSettings { forwarder_port: 15150, listen_port: 15151 };
const IN_PLACE: RulesState = RulesState::InPlace { fenced: 0 };
/// Of a whole test: a busy machine takes long over its many processes, and the pauses between the repairs grow.
const LIMIT: Duration = Duration::from_secs(300);

/// Runs the test in a thread in a network namespace of its own, with loopback, and addresses in documentation ranges.
fn in_namespace<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send) {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            sh("ip link set lo up; ip link add vm type veth peer name line; ip link set vm up; ip link set line up; \
                ip addr add 192.0.2.1/24 dev vm; ip addr add 2001:db8::1/64 dev vm nodad");
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async { timeout(LIMIT, test()).await.unwrap() });
        });
        thread.join().unwrap();
    });
}

fn sh(script: &str) -> String {
    let output = Command::new("sh").args(["-ec", script]).output().unwrap();
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The kernel forgets the translations of all connections of this namespace, as with `conntrack -F`.
fn forget_translations() {
    let netfilter =
        socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkNetFilter)
            .unwrap();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        // NFNL_SUBSYS_CTNETLINK and IPCTNL_MSG_CT_DELETE, of linux/netfilter/nfnetlink_conntrack.h; NLM_F_REQUEST | NLM_F_ACK.
        let (length, kind, flags) = (20_u32, 1_u16 << 8 | 2, 1_u16 | 4);
        let head = [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), &flags.to_ne_bytes(), &[0; 8]].concat();
        let message = [head, vec![family as u8, 0, 0, 0]].concat();
        send(netfilter.as_raw_fd(), &message, MsgFlags::empty()).unwrap();
        let mut answer = [0; 64];
        let answered = recv(netfilter.as_raw_fd(), &mut answer, MsgFlags::empty()).unwrap();
        // NLMSG_ERROR with the error 0.
        assert!(answered >= 20 && answer[4] == 2 && answer[16..20] == [0; 4], "{answer:?}");
    }
}

/// Keeps the rules, in a task.
struct Kept {
    health: Health,
    metrics: Metrics,
    stop: watch::Sender<bool>,
    task: tokio::task::JoinHandle<()>,
}

impl Kept {
    fn start() -> Self {
        let (health, metrics, stop) = (Health::default(), Metrics::default(), watch::Sender::new(false));
        let task = tokio::spawn(keep(SETTINGS, health.clone(), metrics.clone(), stop.subscribe()));
        Self { health, metrics, stop, task }
    }

    async fn reports(&self, fault: Option<&str>) {
        let mut changes = self.health.subscribe();
        let as_expected = |found: &Option<String>| match (found, fault) {
            (Some(found), Some(fault)) => found.contains(fault),
            (found, fault) => found.as_deref() == fault,
        };
        changes.wait_for(|parts| parts.get("rules").is_some_and(as_expected)).await.unwrap();
    }

    fn put_back(&self) -> String {
        let text = self.metrics.counters(Form::Prometheus).unwrap();
        text.lines().find(|line| line.starts_with("secure_comms_rules_put_back_total")).unwrap().to_owned()
    }
}

/// Waits until the rules are as they should be. Each look is a process, so it does not spin. What nft 1.0.6 prints of a
/// dormant table cannot be read.
async fn in_place() {
    while !matches!(inspect(SETTINGS).await, Ok(RulesState::InPlace { .. })) {}
}

#[test]
fn dials_are_redirected_and_the_rest_is_fenced() {
    in_namespace(async || {
        apply(SETTINGS).await.unwrap();
        assert_eq!(inspect(SETTINGS).await.unwrap(), IN_PLACE);
        // Nothing has listened yet (a process that another test forks would hold a listener open): refused on this node, and never sent to the VM.
        let error = TcpStream::connect(("192.0.2.9", 15150)).await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
        // Addresses of VMs that do not exist: only the redirect makes them reachable.
        for (listen, vm) in [("127.0.0.1", "192.0.2.9"), ("::1", "2001:db8::9")] {
            let listener = TcpListener::bind((listen, 15151)).await.unwrap();
            let mut caa = TcpStream::connect((vm, 15150)).await.unwrap();
            caa.write_all(b"hello").await.unwrap();
            let mut bytes = [0; 5];
            listener.accept().await.unwrap().0.read_exact(&mut bytes).await.unwrap();
            assert_eq!(&bytes, b"hello");
        }
        // As after a change that takes the redirect away: the fence rejects.
        sh("nft flush chain inet secure-comms-adaptor to-adaptor");
        let error = TcpStream::connect(("192.0.2.9", 15150)).await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
        let state = inspect(SETTINGS).await.unwrap();
        assert!(matches!(&state, RulesState::Different { what } if what.contains("to-adaptor")), "{state:?}");
        // Other ports and the loopback addresses are not touched.
        let own = TcpListener::bind(("127.0.0.1", 15150)).await.unwrap();
        TcpStream::connect(own.local_addr().unwrap()).await.unwrap();
    });
}

#[test]
fn rules_that_are_removed_or_changed_are_put_back() {
    in_namespace(async || {
        sh("nft add table ip other");
        let kept = Kept::start();
        kept.reports(None).await;
        assert_eq!(inspect(SETTINGS).await.unwrap(), IN_PLACE);
        let repairs = || kept.put_back().rsplit(' ').next().unwrap().parse::<u32>().unwrap();
        let mut before = 0;
        for change in [
            "nft flush ruleset",
            "nft delete table inet secure-comms-adaptor",
            "nft flush chain inet secure-comms-adaptor fence",
            "nft add table inet secure-comms-adaptor '{ flags dormant; }'",
            "nft insert rule inet secure-comms-adaptor to-adaptor accept",
            "nft add table ip other; nft delete table ip other; nft flush ruleset",
        ] {
            sh(change);
            in_place().await;
            // A look may find a change half done: then there are two repairs.
            while repairs() == before {
                tokio::task::yield_now().await;
            }
            before = repairs();
        }
        // They stay at the end.
        kept.stop.send_replace(true);
        kept.task.await.unwrap();
        assert_eq!(inspect(SETTINGS).await.unwrap(), IN_PLACE);
    });
}

#[test]
fn a_second_start_finds_the_rules_and_a_live_stream_goes_on() {
    in_namespace(async || {
        let kept = Kept::start();
        kept.reports(None).await;
        let listener = TcpListener::bind(("127.0.0.1", 15151)).await.unwrap();
        let mut caa = TcpStream::connect(("192.0.2.9", 15150)).await.unwrap();
        let mut ours = listener.accept().await.unwrap().0;
        kept.stop.send_replace(true);
        kept.task.await.unwrap();
        let again = Kept::start();
        again.reports(None).await;
        assert_eq!(again.put_back(), "secure_comms_rules_put_back_total 0");
        // Replaced in one transaction, as after an update that changes them: the stream is still translated.
        apply(SETTINGS).await.unwrap();
        let mut byte = [0];
        caa.write_all(b"a").await.unwrap();
        ours.read_exact(&mut byte).await.unwrap();
        ours.write_all(b"b").await.unwrap();
        caa.read_exact(&mut byte).await.unwrap();
        assert_eq!(&byte, b"b");
    });
}

#[test]
fn a_forgotten_translation_ends_no_stream() {
    in_namespace(async || {
        apply(SETTINGS).await.unwrap();
        for (listen, vm) in [("127.0.0.1", "192.0.2.9"), ("::1", "2001:db8::9")] {
            let listener = TcpListener::bind((listen, 15151)).await.unwrap();
            let mut caa = TcpStream::connect((vm, 15150)).await.unwrap();
            let mut ours = listener.accept().await.unwrap().0;
            for _ in 0..3 {
                forget_translations();
                // The VM's side is the first to send, as an event of the kata agent; then comes the runtime's next check.
                let mut byte = [0];
                ours.write_all(b"e").await.unwrap();
                caa.write_all(b"c").await.unwrap();
                ours.read_exact(&mut byte).await.unwrap();
                assert_eq!(&byte, b"c");
                caa.read_exact(&mut byte).await.unwrap();
                assert_eq!(&byte, b"e");
            }
        }
    });
}

#[test]
fn removed_rules_are_gone_and_say_so() {
    in_namespace(async || {
        assert!(!remove().await.unwrap());
        assert_eq!(inspect(SETTINGS).await.unwrap(), RulesState::Missing);
        sh("nft add table ip other");
        apply(SETTINGS).await.unwrap();
        assert!(remove().await.unwrap());
        assert_eq!(inspect(SETTINGS).await.unwrap(), RulesState::Missing);
        assert_eq!(sh("nft list tables").trim(), "table ip other");
    });
}

#[test]
fn a_fault_is_reported_until_it_is_mended() {
    in_namespace(async || {
        // Another port: the table of another version of this program is replaced.
        apply(RulesSettings { forwarder_port: 1, listen_port: 2 }).await.unwrap();
        let state = inspect(SETTINGS).await.unwrap();
        assert!(matches!(state, RulesState::Different { .. }), "{state:?}");
        let kept = Kept::start();
        kept.reports(None).await;
        assert_eq!(inspect(SETTINGS).await.unwrap(), IN_PLACE);
    });
}

#[test]
fn the_rules_of_another_service_are_not_taken_for_ours() {
    in_namespace(async || {
        let kept = Kept::start();
        kept.reports(None).await;
        // It puts its own back whenever they have changed, as this one does: so each look may find either.
        let other = RulesSettings { listen_port: 16000, ..SETTINGS };
        let stop = watch::Sender::new(false);
        let others = tokio::spawn(keep(other, Health::default(), Metrics::default(), stop.subscribe()));
        let repairs = || kept.put_back().rsplit(' ').next().unwrap().parse::<u32>().unwrap();
        while repairs() < 3 {
            // Takes its time, so that this loop keeps no processor from nft.
            drop(inspect(SETTINGS).await);
        }
        stop.send_replace(true);
        others.await.unwrap();
        in_place().await;
        kept.reports(None).await;
    });
}
