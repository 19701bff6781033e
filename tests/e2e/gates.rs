//! The four defects of stock russh (docs/PROTOCOL.md, D1 to D4) must not affect users. With the real binaries.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // a test's helpers fail as the test does

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use secure_comms_protocol::limits::SILENCE;
use secure_comms_tests::harness::process::Child;
use secure_comms_tests::harness::scene::{PATIENCE, Scene, SceneOptions, client, endpoint, kata_client, up};
use secure_comms_tests::harness::test_namespace::TestNamespace;
use secure_comms_tests::simulators::kata::client::{
    EchoSession, bulk_both_ways, check_pattern, open_source, open_stall, read_source, write_pattern,
};
use secure_comms_tests::simulators::kata::framed::Framed;
use secure_comms_tests::simulators::tcp_proxy::TcpProxy;
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf};
use tokio::net::{TcpStream, UnixStream};
use tokio::task::JoinSet;
use tokio::time::timeout;

const MIB: u64 = 1024 * 1024;

struct Pod {
    scene: Scene,
    agent: Child,
    adaptor: Child,
    _cable: Option<TcpProxy>,
}

impl Pod {
    async fn up() -> Result<Self> {
        Self::up_with(&[], &[], Duration::ZERO).await
    }

    /// A pod in the Kubernetes phase with additional flags for its processes, and a delay in each direction of its path.
    async fn up_with(agent_flags: &[&str], adaptor_flags: &[&str], delay: Duration) -> Result<Self> {
        let scene = Scene::new(SceneOptions { user_data: true, ..SceneOptions::default() }).await?;
        scene.write_user_data().await?;
        let mut agent = scene.agent_command()?;
        agent.args(agent_flags).env("SECURE_COMMS_LOG", "debug");
        let agent = Child::spawn("agent", agent)?;
        let proxy = if delay.is_zero() { None } else { Some(TcpProxy::with_delay(scene.ssh, delay).await?) };
        let mut adaptor = scene.adaptor_command(&[proxy.as_ref().map_or(scene.ssh, TcpProxy::address)])?;
        adaptor.args(adaptor_flags).env("SECURE_COMMS_LOG", "debug");
        let adaptor = Child::spawn("adaptor", adaptor)?;
        up(&adaptor).await?;
        Ok(Self { scene, agent, adaptor, _cable: proxy })
    }

    /// Number of key exchanges so far.
    fn rekeys(&self) -> usize {
        self.adaptor.lines().iter().filter(|line| line.text.contains("new session keys")).count()
    }

    async fn kata(&self) -> Result<Framed<TcpStream>> {
        kata_client(endpoint(&self.adaptor, "KATAAGENT").await?).await
    }

    async fn vm_service(&self) -> Result<TcpStream> {
        client(endpoint(&self.adaptor, "VMSERVICE").await?).await
    }

    /// Checks that the channel has been up all the time: no failover hid a defect.
    fn never_down(&self) -> Result<()> {
        let down = self.adaptor.lines().into_iter().find(|line| line.text.contains("channel down"));
        ensure!(down.is_none(), "the channel went down: {}\n{}", down.unwrap().text, self.agent.log());
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stalled_reader_delays_no_other_stream_and_no_keepalive() -> Result<()> {
    let pod = Pod::up().await?;
    let mut stalled_here = pod.kata().await?;
    open_source(&mut stalled_here, 64 * MIB, 3).await?;
    let mut stalled_there = pod.kata().await?;
    open_stall(&mut stalled_there).await?;
    let (_keep, mut blocked) = tokio::io::split(stalled_there);
    let blocked = tokio::spawn(async move { write_pattern(&mut blocked, 64 * MIB, 4).await });

    // Longer than the lifetime of a connection whose keepalives do not arrive.
    let until = Instant::now() + SILENCE + Duration::from_secs(5);
    let mut session = EchoSession::open(pod.kata().await?).await?;
    let mut times = Vec::new();
    let mut opens = 0;
    while Instant::now() < until || times.len() < 1000 {
        times.push(timeout(PATIENCE, session.roundtrip(200, times.len() as u64)).await??);
        if times.len() % 50 == 0 {
            timeout(PATIENCE, read_source(pod.kata().await?, 1000, opens)).await??;
            opens += 1;
        }
        // Paced, so that the test measures requests and not the machine.
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    session.finish().await?;
    ensure!(!blocked.is_finished(), "64 MiB went into a reader that never reads: nothing is bounded");
    let echo = pod.vm_service().await?;
    timeout(PATIENCE, bulk_both_ways(echo, 8 * MIB, 5)).await??;
    times.sort_unstable();
    println!(
        "with two stalled readers: {} requests of 200 bytes, p50 {:?}, p99 {:?}; {opens} streams opened",
        times.len(),
        times[times.len() / 2],
        times[times.len() * 99 / 100]
    );
    // The reader resumes, and no byte was lost.
    timeout(PATIENCE, check_pattern(&mut stalled_here, 64 * MIB, 3)).await??;
    blocked.abort();
    pod.never_down()
}

async fn many_two_way_streams(pod: &Pod, streams: u64, bytes: u64) -> Result<()> {
    let mut all = JoinSet::new();
    for seed in 0..streams {
        // A third each over the three tunnels: both sides open streams, and both have servers.
        let other = match seed % 3 {
            0 => {
                let stream = pod.kata().await?;
                all.spawn(async move { bulk_both_ways(stream, bytes, seed).await });
                continue;
            }
            1 => pod.vm_service().await?,
            _ => client(pod.scene.node_inbound).await?,
        };
        all.spawn(async move { bulk_both_ways(other, bytes, seed).await });
    }
    timeout(PATIENCE, async {
        while let Some(done) = all.join_next().await {
            done??;
        }
        anyhow::Ok(())
    })
    .await
    .with_context(|| format!("{streams} two-way streams hang\n{}\n{}", pod.agent.log(), pod.adaptor.log()))?
}

#[tokio::test(flavor = "multi_thread")]
async fn sixteen_two_way_bulk_streams_deliver_every_byte() -> Result<()> {
    let pod = Pod::up().await?;
    many_two_way_streams(&pod, 16, 8 * MIB).await?;
    pod.never_down()
}

#[tokio::test(flavor = "multi_thread")]
async fn thirty_two_two_way_bulk_streams_deliver_every_byte() -> Result<()> {
    let pod = Pod::up().await?;
    many_two_way_streams(&pod, 32, 8 * MIB).await?;
    pod.never_down()
}

/// Over kernel buffers of a few KiB, as on a real path: there, two sessions that do not read while they write soon
/// deadlock (D2). Everything is in a network namespace of its own; the servers are unix sockets.
#[tokio::test(flavor = "multi_thread")]
async fn bulk_streams_complete_over_small_socket_buffers() -> Result<()> {
    let narrow = TestNamespace::new("narrow")?;
    for (name, value) in [("tcp_wmem", "4096 16384 16384"), ("tcp_rmem", "4096 16384 16384")] {
        let set = format!("echo '{value}' > /proc/sys/net/ipv4/{name}");
        let set = narrow.command("sh").args(["-c", &set]).output().await?;
        ensure!(set.status.success(), "setting {name}: {}", String::from_utf8_lossy(&set.stderr));
    }
    let scene = Scene::new(SceneOptions { user_data: true, ..SceneOptions::default() }).await?;
    scene.write_user_data().await?;
    let kata = scene.path("kata.sock");
    let (here, there) = (scene.path("here.sock"), scene.path("there.sock"));
    let mut agent = narrow.command(&scene.binaries().agent);
    agent
        .args(["-secure-comms", "-secure-comms-user-data", "all", "-pod-namespace", ""])
        .arg("-kata-agent-socket")
        .arg(&kata)
        .arg("-config")
        .arg(scene.path("apf.json"))
        .arg("-secure-comms-state-dir")
        .arg(scene.path("agent-state"))
        .arg("-secure-comms-state-dir-on-disk")
        .arg("-secure-comms-inbounds")
        .arg(format!("KUBERNETES_PHASE:NODESERVICE:{}", there.display()));
    let agent = Child::spawn("agent", agent)?;
    agent.wait_for_text("inbound NODESERVICE listens on", PATIENCE).await?;
    let mut adaptor = narrow.command(&scene.binaries().adaptor);
    adaptor
        .args(["connect", "--no-trustee", "--pod-id", &scene.pod, "--address", "127.0.0.1"])
        .arg("--store")
        .arg(scene.path("store"))
        .args(["--pp-inbounds", &format!("KUBERNETES_PHASE:NODESERVICE:{}", there.display())])
        .arg("--kata-agent-socket")
        .arg(&kata)
        .arg("--inbounds")
        .arg(format!("KUBERNETES_PHASE:KATAAGENT:{}", here.display()))
        .arg("--outbounds")
        .arg(format!("KUBERNETES_PHASE:NODESERVICE:{}", kata.display()));
    let adaptor = Child::spawn("adaptor", adaptor)?;
    up(&adaptor).await?;
    let mut all = JoinSet::new();
    for seed in 0..32 {
        let stream = Framed::new(UnixStream::connect(if seed % 2 == 0 { &here } else { &there }).await?);
        all.spawn(async move { bulk_both_ways(stream, 4 * MIB, seed).await });
    }
    let finish = async {
        while let Some(done) = all.join_next().await {
            done??;
        }
        anyhow::Ok(())
    };
    timeout(PATIENCE, finish)
        .await
        .with_context(|| format!("they hang\n{}{}", agent.log(), adaptor.log()))??;
    ensure!(!adaptor.log().contains("channel down"), "{}", adaptor.log());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rekey_under_load_from_either_side_loses_nothing() -> Result<()> {
    let limit = (4 * MIB).to_string();
    for (agent, adaptor) in [(None, Some(&limit)), (Some(&limit), None), (Some(&limit), Some(&limit))] {
        let agent = agent.map_or(vec![], |limit| vec!["-secure-comms-rekey-bytes", limit]);
        let adaptor = adaptor.map_or(vec![], |limit| vec!["--rekey-bytes", limit]);
        let pod = Pod::up_with(&agent, &adaptor, Duration::ZERO).await?;
        many_two_way_streams(&pod, 16, 8 * MIB).await?;
        pod.never_down()?;
        let rekeys = pod.rekeys();
        println!("{rekeys} new session keys under load (agent {agent:?}, adaptor {adaptor:?})");
        ensure!(
            rekeys > 3,
            "the load was to run into new session keys, and met {rekeys}\n{}",
            pod.adaptor.log()
        );
    }
    Ok(())
}

/// Over a long path, where much is in flight when a side starts a rekey (D3: more than russh's default allows).
#[tokio::test(flavor = "multi_thread")]
async fn a_rekey_with_megabytes_in_flight_loses_nothing() -> Result<()> {
    let limit = (16 * MIB).to_string();
    let flags = (["-secure-comms-rekey-bytes", &limit], ["--rekey-bytes", &limit]);
    let pod = Pod::up_with(&flags.0, &flags.1, Duration::from_millis(100)).await?;
    many_two_way_streams(&pod, 32, 6 * MIB).await?;
    pod.never_down()?;
    println!("{} new session keys over a long path", pod.rekeys());
    ensure!(pod.rekeys() > 3, "{}", pod.adaptor.log());
    Ok(())
}

/// A client that writes, until nothing more fits, to a server that does not read.
async fn blocked_writer(
    pod: &Pod,
) -> Result<(tokio::task::JoinHandle<std::io::Result<()>>, ReadHalf<Framed<TcpStream>>)> {
    let mut stream = pod.kata().await?;
    open_stall(&mut stream).await?;
    let (read, mut write) = tokio::io::split(stream);
    let writer = tokio::spawn(async move { write_pattern(&mut write, 1024 * MIB, 9).await });
    Ok((writer, read))
}

/// The writer's socket is closed, and its write fails.
async fn wakes(
    writer: tokio::task::JoinHandle<std::io::Result<()>>,
    mut read: ReadHalf<Framed<TcpStream>>,
) -> Result<()> {
    let written = timeout(PATIENCE, writer).await.context("the writer never woke")??;
    ensure!(written.is_err(), "1 GiB went into a reader that never reads");
    let end = timeout(PATIENCE, read.read(&mut [0; 16])).await.context("the socket was never closed")?;
    ensure!(matches!(end, Ok(0) | Err(_)), "bytes from a reader that never reads");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blocked_writer_fails_when_the_peer_closes_the_channel() -> Result<()> {
    let mut pod = Pod::up().await?;
    EchoSession::open(pod.kata().await?).await?.finish().await?;
    let before = pod.adaptor.open_files()?;
    let agent_before = pod.agent.open_files()?;
    let (writer, read) = blocked_writer(&pod).await?;
    // Blocked for certain: the stream's whole credit is used.
    let mut session = EchoSession::open(pod.kata().await?).await?;
    for seed in 0..200 {
        session.roundtrip(200, seed).await?;
    }
    ensure!(!writer.is_finished(), "the writer is not blocked");
    session.finish().await?;
    // The kata agent restarts, which resets its connections.
    let socket = pod.scene.path("kata.sock");
    let other = secure_comms_tests::simulators::kata::KataAgent::unix(pod.scene.path("other.sock"))?;
    drop(std::mem::replace(&mut pod.scene.kata, other));
    wakes(writer, read).await?;
    pod.adaptor.wait_for_files(before, PATIENCE).await?;
    pod.agent.wait_for_files(agent_before, PATIENCE).await?;
    pod.scene.kata = secure_comms_tests::simulators::kata::KataAgent::unix(socket)?;
    timeout(PATIENCE, bulk_both_ways(pod.kata().await?, MIB, 1)).await??;
    pod.never_down()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_writer_wakes_and_its_socket_closes_when_the_peer_restarts() -> Result<()> {
    let mut pod = Pod::up().await?;
    EchoSession::open(pod.kata().await?).await?.finish().await?;
    let (writer, read) = blocked_writer(&pod).await?;
    let mut idle = pod.kata().await?;
    idle.write_all(&[1]).await?;
    // Both are open for certain: a stream that is being opened waits for the next agent.
    let mut session = EchoSession::open(pod.kata().await?).await?;
    for seed in 0..200 {
        session.roundtrip(200, seed).await?;
    }
    pod.agent.kill9().await?;
    // Until another agent is there, the session could go on.
    pod.agent = pod.scene.agent().await?;
    wakes(writer, read).await?;
    let end = timeout(PATIENCE, idle.read(&mut [0; 16])).await.context("an idle client was never closed")?;
    ensure!(matches!(end, Ok(0) | Err(_)), "bytes from a dead peer");
    Ok(())
}
