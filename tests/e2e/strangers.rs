//! Strangers in the Attestation phase, where anyone may connect: they can delay a pod, and make an empty VM useless, but
//!  no more. With the real binaries.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // a test's helpers fail as the test does

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use secure_comms_protocol::Control;
use secure_comms_protocol::limits::{ATTESTATION_PEERS_MAX, UNAUTHENTICATED_MAX, WAITING_MAX};
use secure_comms_tests::attackers::raw::{Offer, Packet, Raw, message};
use secure_comms_tests::attackers::stranger::{Answer, Stranger};
use secure_comms_tests::harness::pod_keys::PodKeys;
use secure_comms_tests::harness::process::Child;
use secure_comms_tests::harness::scene::{PATIENCE, Scene, pod_id, scene, works};
use secure_comms_tests::simulators::kata::client::bulk_both_ways;
use secure_comms_tests::simulators::kata::framed::Framed;
use secure_comms_tests::simulators::kbs::{Kbs, KbsOptions};
use secure_comms_tests::simulators::openssh::OpenSsh;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

const MIB: u64 = 1024 * 1024;

/// A stranger with its own KBS, which hands out its own keys for a pod.
struct Impostor {
    kbs: Kbs,
    keys: PodKeys,
    pod: String,
}

impl Impostor {
    async fn new(scene: &Scene) -> Result<Self> {
        let kbs = Kbs::start(KbsOptions::default()).await?;
        let keys = PodKeys::make(scene.path("x").parent().unwrap(), "impostor").await?;
        let pod = pod_id()?;
        keys.publish(&kbs, &pod)?;
        Ok(Self { kbs, keys, pod })
    }

    /// Plays the KBS to the VM until the VM has these keys.
    async fn feed(&self, agent: SocketAddr) -> Result<()> {
        let stranger = Stranger::attest(agent, &self.pod, Answer::Relays(self.kbs.addr())).await?;
        stranger.hears(|message| matches!(message, Control::Upgrade(_))).await?;
        stranger.ends().await
    }
}

/// Strangers in every slot: silent sockets, idle peers, and misbehaving ones.
async fn in_every_slot(agent: SocketAddr) -> Result<(Vec<Stranger>, Vec<TcpStream>)> {
    let mut peers = Vec::new();
    for answer in [Answer::Silent, Answer::Garbage, Answer::Closes, Answer::Refuses] {
        peers.push(Stranger::attest(agent, &pod_id()?, answer).await?);
    }
    while peers.len() < ATTESTATION_PEERS_MAX {
        peers.push(Stranger::attestation(agent, Answer::Silent).await?);
    }
    let mut sockets = Vec::new();
    for _ in 0..UNAUTHENTICATED_MAX {
        sockets.push(TcpStream::connect(agent).await?);
    }
    Ok((peers, sockets))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_pod_comes_up_with_strangers_in_every_slot() -> Result<()> {
    let scene = scene().await?;
    let agent = scene.agent().await?;
    let strangers = in_every_slot(scene.ssh).await?;
    let adaptor = scene.adaptor()?;
    works(&scene, &adaptor).await.with_context(|| agent.log())?;
    drop(strangers);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn once_strangers_that_took_every_slot_leave_the_pod_comes_up() -> Result<()> {
    let scene = scene().await?;
    let agent = scene.agent().await?;
    let mut strangers = Vec::new();
    for _ in 0..ATTESTATION_PEERS_MAX {
        strangers.push(Stranger::attest(scene.ssh, &pod_id()?, Answer::Silent).await?);
    }
    agent.wait_for_text("getting the keys from the KBS through", PATIENCE).await?;
    let adaptor = scene.adaptor()?;
    adaptor.wait_for_text("attestation: connected", PATIENCE).await?;
    drop(strangers);
    works(&scene, &adaptor).await.with_context(|| agent.log())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_pod_comes_up_while_strangers_keep_reconnecting() -> Result<()> {
    let scene = scene().await?;
    let _agent = scene.agent().await?;
    let (mut flood, cuts) = (JoinSet::new(), watch::Sender::new(0));
    // More than may wait, so that some are evicted.
    for _ in 0..WAITING_MAX + 100 {
        let cuts = cuts.clone();
        flood.spawn(async move {
            loop {
                if let Ok(mut socket) = TcpStream::connect(scene.ssh).await {
                    // Reads the agent's first line, then waits until the agent ends the connection.
                    while matches!(socket.read(&mut [0; 256]).await, Ok(1..)) {}
                    cuts.send_modify(|cuts| *cuts += 1);
                }
            }
        });
    }
    // These connect before the adaptor does.
    timeout(PATIENCE, cuts.subscribe().wait_for(|cuts| *cuts > 100))
        .await
        .context("the flood was none")??;
    let adaptor = scene.adaptor()?;
    works(&scene, &adaptor).await.with_context(|| adaptor.log())?;
    flood.shutdown().await;
    println!("{} connections of the flood were cut until the pod was up", *cuts.borrow());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_that_answer_garbage_cost_an_attempt_each() -> Result<()> {
    let scene = scene().await?;
    let agent = scene.agent().await?;
    let mut strangers = Vec::new();
    let mut attempts = 0;
    for answer in [Answer::Garbage, Answer::Closes, Answer::Refuses, Answer::NoPlace] {
        let mark = agent.mark();
        let stranger = Stranger::attest(scene.ssh, &pod_id()?, answer).await?;
        agent
            .wait_from(mark, |line| line.contains("getting the keys from the KBS through"), PATIENCE)
            .await?;
        // The log has earlier attempts, too; this one is the stranger's own.
        let failed = |message: &Control| matches!(message, Control::Keys(keys) if keys.error.is_some() && keys.attempt > attempts);
        let heard = stranger.hears(failed).await.with_context(|| format!("{answer:?}\n{}", agent.log()))?;
        if let Control::Keys(keys) = heard {
            attempts = keys.attempt;
        }
        strangers.push(stranger);
    }
    let adaptor = scene.adaptor()?;
    works(&scene, &adaptor).await.with_context(|| agent.log())?;
    ensure!(scene.cdh.most_at_once() <= 1, "two fetches were concurrent");
    Ok(())
}

/// Reconnects as soon as its attempt has failed, and so is a newcomer every time. Never returns.
async fn reconnects_all_the_time(agent: SocketAddr, failed: watch::Sender<u64>) -> Result<()> {
    let mut last = 0;
    loop {
        // It may be evicted by another.
        let Ok(stranger) = Stranger::attest(agent, &pod_id()?, Answer::Closes).await else { continue };
        let own = |message: &Control| matches!(message, Control::Keys(keys) if keys.error.is_some() && keys.attempt > last);
        let heard = stranger.hears(own).await;
        if let Ok(Control::Keys(keys)) = heard {
            last = keys.attempt;
            failed.send_modify(|failed| *failed += 1);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_that_reconnect_do_not_starve_a_peer_that_failed() -> Result<()> {
    let scene = scene().await?;
    let agent = scene.agent().await?;
    scene.kbs.deny(&scene.keys());
    let adaptor = scene.adaptor()?;
    adaptor.wait_for_text("keys: attempt", PATIENCE).await?;
    let (mut strangers, failed) = (JoinSet::new(), watch::Sender::new(0));
    for _ in 0..3 {
        strangers.spawn(reconnects_all_the_time(scene.ssh, failed.clone()));
    }
    timeout(PATIENCE, failed.subscribe().wait_for(|failed| *failed > 10))
        .await
        .context("the strangers had no attempts")??;
    scene.kbs.allow(&scene.keys());
    works(&scene, &adaptor).await.with_context(|| agent.log())?;
    strangers.shutdown().await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_strangers_lose_their_attempt_with_a_reason() -> Result<()> {
    let scene = scene().await?;
    let agent = scene.agent().await?;
    let mut strangers = Vec::new();
    for answer in [Answer::Silent, Answer::Unanswered] {
        strangers.push(Stranger::attest(scene.ssh, &pod_id()?, answer).await?);
    }
    agent.wait_for_text("getting the keys from the KBS through", PATIENCE).await?;
    let adaptor = scene.adaptor()?;
    works(&scene, &adaptor).await.with_context(|| agent.log())?;
    for stranger in &strangers {
        let bye = stranger.hears(|message| matches!(message, Control::Bye(_))).await?;
        // Both limits are the same, so either may be reached first.
        let reasons = ["brings no answer", "took long, and another has come"];
        let reason_logged =
            matches!(&bye, Control::Bye(bye) if reasons.iter().any(|reason| bye.reason.contains(reason)));
        ensure!(reason_logged, "{bye:?}");
        stranger.ends().await?;
    }
    ensure!(scene.cdh.most_at_once() <= 1, "two fetches were concurrent");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_with_an_endless_answer_loses_its_attempt() -> Result<()> {
    let scene = scene().await?;
    let agent = scene.agent().await?;
    let stranger = Stranger::attest(scene.ssh, &pod_id()?, Answer::Drips).await?;
    agent.wait_for_text("getting the keys from the KBS through", PATIENCE).await?;
    let adaptor = scene.adaptor()?;
    works(&scene, &adaptor).await.with_context(|| agent.log())?;
    stranger.ends().await?;
    ensure!(agent.log().contains("took long, and another has come"), "{}", agent.log());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_honest_peer_that_leaves_costs_only_its_attempt() -> Result<()> {
    let scene = scene().await?;
    let agent = scene.agent().await?;
    for _ in 0..3 {
        let mark = agent.mark();
        let stranger = Stranger::attest(scene.ssh, &pod_id()?, Answer::Silent).await?;
        agent.wait_from(mark, |line| line.contains("getting the keys"), PATIENCE).await?;
        drop(stranger);
        agent.wait_from(mark, |line| line.contains("in the middle of its attempt"), PATIENCE).await?;
    }
    let adaptor = scene.adaptor()?;
    works(&scene, &adaptor).await.with_context(|| agent.log())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_adaptor_reports_a_vm_lost_to_a_stranger() -> Result<()> {
    let mut scene = scene().await?;
    scene.deadline = 30;
    let agent = scene.agent().await?;
    let impostor = Impostor::new(&scene).await?;
    impostor.feed(scene.ssh).await?;
    let owner = Stranger::kubernetes(scene.ssh, &impostor.keys.node).await?;
    agent.wait_for_text("Kubernetes phase, latched", PATIENCE).await?;
    timeout(PATIENCE, bulk_both_ways(Framed::new(owner.open("KATAAGENT").await?), MIB, 1)).await??;

    let mut adaptor = scene.adaptor()?;
    let status = adaptor.wait_exit(PATIENCE).await?;
    ensure!(status.code() == Some(1), "{status}");
    let log = adaptor.log();
    for words in ["host key that is not this pod's", "refuses attestation", "lost", "make a new VM", "HTTPS"]
    {
        ensure!(log.contains(words), "no {words:?} in {log}");
    }
    ensure!(!log.contains("kubernetes phase up"), "{log}");
    // Before the deadline of 30 s, which the adaptor would name.
    ensure!(log.contains(&format!("start pod {}: the VM answers", scene.pod)), "{log}");
    ensure!(!log.contains("within 30 s") && !log.contains("deadline"), "{log}");
    ensure!(!agent.log().contains(&format!("adaptor identified; pod {}", scene.pod)), "{}", agent.log());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_of_a_stranger_without_a_login_do_not_last() -> Result<()> {
    let scene = scene().await?;
    let agent = scene.agent().await?;
    let impostor = Impostor::new(&scene).await?;
    impostor.feed(scene.ssh).await?;
    let adaptor = scene.adaptor()?;
    agent.wait_for_text("attestation is open again", PATIENCE).await?;
    works(&scene, &adaptor).await.with_context(|| format!("{}\n{}", agent.log(), adaptor.log()))?;
    // The earlier keys are worthless now.
    ensure!(Stranger::kubernetes(scene.ssh, &impostor.keys.node).await.is_err(), "the stranger got in");
    works(&scene, &adaptor).await
}

#[tokio::test(flavor = "multi_thread")]
async fn no_stranger_gets_into_a_latched_vm_after_a_restart() -> Result<()> {
    let scene = scene().await?;
    let mut agent = scene.agent().await?;
    let waiting = Stranger::attest(scene.ssh, &pod_id()?, Answer::Refuses).await?;
    let adaptor = scene.adaptor()?;
    works(&scene, &adaptor).await?;
    waiting.ends().await?;
    let impostor = Impostor::new(&scene).await?;
    let (fetches, connections) = (scene.cdh.fetches(), scene.kbs.connections());
    for restarted in [false, true] {
        if restarted {
            let mark = adaptor.mark();
            agent.kill9().await?;
            agent = scene.agent().await?;
            agent.wait_for_text("latched earlier in this boot", PATIENCE).await?;
            adaptor.wait_from(mark, |line| line.contains("kubernetes phase up"), PATIENCE).await?;
        }
        ensure!(impostor.feed(scene.ssh).await.is_err(), "a stranger attested, restarted: {restarted}");
        let mut stranger = Stranger::connect(scene.ssh, Answer::Refuses).await?;
        ensure!(!stranger.handle().authenticate_none("attestation").await?.success());
        ensure!(stranger.banner().contains("Kubernetes phase"), "{:?}", stranger.banner());
        for key in [&impostor.keys.node, &impostor.keys.host] {
            ensure!(Stranger::kubernetes(scene.ssh, key).await.is_err(), "a stranger logged in");
        }
        works(&scene, &adaptor).await?;
    }
    ensure!(scene.cdh.fetches() == fetches, "the VM attested again\n{}", agent.log());
    ensure!(scene.kbs.connections() == connections, "the VM asked the KBS again\n{}", agent.log());
    ensure!(impostor.kbs.connections() == 0, "the VM asked a stranger's KBS");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_with_keys_from_user_data_attests_to_no_stranger() -> Result<()> {
    let mut scene = scene().await?;
    scene.user_data_mode = "tunnels";
    let keys = PodKeys::make(scene.path("x").parent().unwrap(), "own").await?;
    let mut user_data = keys.user_data()?;
    user_data.as_object_mut().unwrap().retain(|key, _| key == "sc-wn-pub");
    std::fs::write(scene.path("apf.json"), user_data.to_string())?;
    let _agent = scene.agent().await?;
    ensure!(Stranger::attestation(scene.ssh, Answer::Silent).await.is_err(), "it attests without a key");
    let other = PodKeys::make(scene.path("x").parent().unwrap(), "other").await?;
    let ssh = OpenSsh::new(scene.ssh)?.identity_file(&other.node);
    let refused = ssh.command("attestation", &["-s"], &["secure-comms"]).output().await?;
    let stderr = String::from_utf8_lossy(&refused.stderr);
    ensure!(stderr.contains("Permission denied (publickey)"), "{stderr}");
    let ssh = OpenSsh::new(scene.ssh)?.identity_file(&keys.node);
    let attests = Child::spawn("ssh -s", ssh.command("attestation", &["-s"], &["secure-comms"]))?;
    attests.wait_for_text("\"phase\":\"attestation\"", PATIENCE).await?;
    Ok(())
}

/// What a stranger sends before it goes silent.
enum Junk {
    /// These bytes, on a new connection.
    Plain(Vec<u8>),
    /// A byte now and then, without end.
    Drip,
    /// These bytes, after the key exchange.
    Secured(Vec<u8>),
    /// These packets, after authentication.
    Packets(Vec<Packet>),
    /// Half of a packet, after authentication.
    HalfPacket,
    /// A packet that was tampered with, after authentication.
    Tampered,
}

async fn send(agent: SocketAddr, junk: Junk) -> Result<Raw> {
    let raw = match junk {
        Junk::Plain(bytes) => {
            let mut raw = Raw::connect(agent).await?;
            // The agent may end the connection before it has read everything.
            drop(raw.write(&bytes).await);
            raw
        }
        Junk::Drip => {
            let mut raw = Raw::connect(agent).await?;
            while raw.write(b"S").await.is_ok() {
                sleep(Duration::from_millis(200)).await;
            }
            raw
        }
        Junk::Secured(bytes) => {
            let mut raw = Raw::secured(agent, Offer::default()).await?;
            raw.write(&bytes).await?;
            raw
        }
        Junk::Packets(packets) => {
            let mut raw = Raw::attestation(agent).await?;
            for packet in packets {
                drop(raw.send(&packet).await);
            }
            raw
        }
        Junk::HalfPacket | Junk::Tampered => {
            let mut raw = Raw::attestation(agent).await?;
            let mut bytes = raw.seal(&Packet::global("unheard-of").bytes(&[0; 1000]))?;
            match junk {
                Junk::Tampered => bytes[500] ^= 1,
                _ => bytes.truncate(500),
            }
            raw.write(&bytes).await?;
            raw
        }
    };
    Ok(raw)
}

#[tokio::test(flavor = "multi_thread")]
async fn junk_ends_its_connection_and_leaves_nothing_open() -> Result<()> {
    let scene = scene().await?;
    let agent = scene.debugged_agent().await?;
    // One good connection first, so that the agent has opened all files that it keeps open.
    drop(Stranger::attest(scene.ssh, &pod_id()?, Answer::Refuses).await?);
    let mark = agent.mark();
    agent.wait_from(0, |line| line.contains(": ended") || line.contains(": closed"), PATIENCE).await?;
    let before = agent.open_files()?;
    let after_id = |bytes: &[u8]| Junk::Plain([b"SSH-2.0-Junk\r\n", bytes].concat());
    let mut noise = vec![0; 4096];
    ring::rand::SecureRandom::fill(&ring::rand::SystemRandom::new(), &mut noise).unwrap();
    let channel_data = Packet::new(message::CHANNEL_DATA).uint(0).uint(u32::MAX);
    let junk = [
        ("nothing", Junk::Plain(vec![])),
        ("HTTP", Junk::Plain(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec())),
        ("noise", Junk::Plain(noise.clone())),
        ("an endless version", Junk::Plain([b"SSH-2.0-".as_slice(), &[b'x'; 300_000]].concat())),
        ("an old version", Junk::Plain(b"SSH-1.5-Old\r\n".to_vec())),
        ("a version and silence", after_id(b"")),
        ("half a packet", after_id(&[0, 0, 4, 0, 6, message::KEXINIT, 1, 2, 3])),
        ("a huge packet", after_id(&[0xff, 0xff, 0xff, 0xff, 6, message::KEXINIT])),
        ("an empty packet", after_id(&[0; 64])),
        ("noise after the version", after_id(&noise)),
        ("a drip", Junk::Drip),
        ("silence after the key exchange", Junk::Secured(vec![])),
        ("half a packet after the key exchange", Junk::Secured(vec![0, 0, 0, 32, 1, 2, 3])),
        ("noise after the key exchange", Junk::Secured(noise.clone())),
        ("half a packet after authentication", Junk::HalfPacket),
        ("a tampered packet", Junk::Tampered),
        ("a cut field", Junk::Packets(vec![Packet::new(message::CHANNEL_OPEN).string("session").byte(0)])),
        ("a field that overruns", Junk::Packets(vec![Packet::open("session", 1), channel_data])),
        (
            "a name that is no text",
            Junk::Packets(vec![
                Packet::global("\u{0}").bytes(b""),
                Packet::new(message::GLOBAL_REQUEST).string([0xff; 8]).byte(1),
            ]),
        ),
        (
            "a confirmation of nothing",
            Junk::Packets(vec![
                Packet::new(message::CHANNEL_OPEN_CONFIRMATION).uint(99).uint(0).uint(1).uint(1),
            ]),
        ),
        ("a late key exchange that never ends", Junk::Packets(vec![Packet::new(message::KEXINIT)])),
    ];
    // A few at a time: more would evict each other.
    let mut pending = junk.into_iter().peekable();
    while pending.peek().is_some() {
        let mut batch = JoinSet::new();
        for (what, junk) in pending.by_ref().take(UNAUTHENTICATED_MAX / 2 - 1) {
            let address = scene.ssh;
            batch.spawn(async move {
                let mut raw = send(address, junk).await.with_context(|| what.to_owned())?;
                let own = raw.address();
                raw.ends().await.with_context(|| what.to_owned())?;
                anyhow::Ok((what, own?))
            });
        }
        while let Some(done) = batch.join_next().await {
            let (what, own) = done??;
            let words = format!("connection from {own}: ");
            let reason = |line: &str| {
                line.contains(&words) && !line.contains("authenticated for") && !line.contains("make room")
            };
            agent.wait_from(mark, reason, PATIENCE).await.with_context(|| what.to_owned())?;
        }
    }
    agent.wait_for_files(before, PATIENCE).await?;
    let adaptor = scene.adaptor()?;
    works(&scene, &adaptor).await
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_attestation_connections_leave_nothing_behind() -> Result<()> {
    let scene = scene().await?;
    let agent = scene.agent().await?;
    let come_and_go = async |times: usize| {
        for _ in 0..times {
            let stranger = Stranger::attest(scene.ssh, &pod_id()?, Answer::Closes).await?;
            stranger.hears(|message| matches!(message, Control::Hello(_))).await?;
        }
        anyhow::Ok(())
    };
    let files = agent.open_files()?;
    come_and_go(50).await?;
    // A fetch may be in progress, and has an open file.
    agent.wait_for_files(files, PATIENCE).await?;
    let warm = agent.rss_kib()?;
    come_and_go(200).await?;
    agent.wait_for_files(files, PATIENCE).await?;
    let after = agent.rss_kib()?;
    println!("RSS of the agent: {warm} KiB after 50 attestation connections, {after} KiB after 200 more");
    ensure!(after < warm + 4096, "the agent grew from {warm} to {after} KiB\n{}", agent.log());
    let adaptor = scene.adaptor()?;
    works(&scene, &adaptor).await
}
