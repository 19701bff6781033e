//! Faults of the network that only a kernel shows (TCP's backoff, dropped first packets, moved addresses, forgotten
//! translations): no stream of a session sees them. Each pod has a worker node, a router and a VM in network namespaces.
//!
//! The longest faults set the time of these tests, so pods with all faults are up at the same time.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use secure_comms_protocol::limits::SESSION_LINGER;
use secure_comms_tests::harness::busy_pod::BusyPod;
use secure_comms_tests::harness::routed_path::{Drops, RoutedPath};
use secure_comms_tests::harness::scene::{PATIENCE, up};
use secure_comms_tests::harness::session_pod::{RunningPod, SessionPod, TUNNELS};
use secure_comms_tests::harness::steady::Steady;
use secure_comms_tests::simulators::kata::client::bulk_both_ways;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// The runtime ends a pod that does not answer for 30 s.
const PATIENCE_OF_RUNTIME: Duration = Duration::from_secs(30);

/// Waits for the first error, or for the end of all.
async fn all(mut pods: JoinSet<Result<()>>) -> Result<()> {
    while let Some(ended) = pods.join_next().await {
        ended??;
    }
    Ok(())
}

async fn busy_on_a_path() -> Result<BusyPod> {
    BusyPod::new(RunningPod::on_a_path().await?).await
}

/// Drops these packets for this time, and then everything goes on.
async fn outlives(drops: Drops, lasts: Duration) -> Result<()> {
    let mut busy = busy_on_a_path().await?;
    let path = busy.pod.pod.path()?;
    path.drops(drops).await?;
    sleep(lasts).await;
    path.drops(Drops::Nothing).await?;
    let back = Instant::now();
    busy.works().await?;
    println!("{drops:?} for {lasts:?}: calls and streams work {:?} after it", back.elapsed());
    // Whatever was to replace the connections during the fault may come now.
    sleep(Duration::from_secs(3)).await;
    busy.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn no_stream_sees_a_silent_network() -> Result<()> {
    let mut pods = JoinSet::new();
    let faults = [1, 5, 9, 14, 16, 22].map(|seconds| (Drops::All, seconds));
    let one_sided = [Drops::ToVm, Drops::ToNode].map(|drops| [(drops, 9), (drops, 20)]);
    for (drops, seconds) in faults.into_iter().chain(one_sided.into_iter().flatten()) {
        let lasts = Duration::from_secs(seconds);
        ensure!(lasts < PATIENCE_OF_RUNTIME);
        pods.spawn(async move {
            outlives(drops, lasts).await.with_context(|| format!("{drops:?} for {lasts:?}"))
        });
    }
    pods.spawn(async { bytes_outlive(Duration::from_secs(50)).await.context("bytes, 50 s") });
    all(pods).await
}

/// Longer than a runtime waits: only byte streams, with a byte each way per second.
async fn bytes_outlive(lasts: Duration) -> Result<()> {
    let pod = RunningPod::on_a_path().await?;
    let mut steady = Vec::new();
    for (seed, tunnel) in (1..).zip(TUNNELS) {
        steady.push(Steady::start(pod.pod.client(tunnel).await?, Duration::from_secs(1), seed).await?);
        bulk_both_ways(pod.pod.client(tunnel).await?, 1000, seed).await?;
    }
    pod.pod.path()?.drops(Drops::All).await?;
    sleep(lasts).await;
    pod.pod.path()?.drops(Drops::Nothing).await?;
    for stream in steady {
        let bytes = stream.finish().await.with_context(|| pod.logs())?;
        ensure!(bytes >= lasts.as_secs(), "{bytes} bytes in {lasts:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn several_silences_in_a_row_cost_no_stream() -> Result<()> {
    let mut busy = busy_on_a_path().await?;
    for round in 0..6 {
        busy.pod.pod.path()?.drops(Drops::All).await?;
        sleep(Duration::from_millis(400 * (round % 3) + 200)).await;
        busy.pod.pod.path()?.drops(Drops::Nothing).await?;
        // Every other time it comes in the middle of what the one before has begun.
        if round % 2 == 0 {
            busy.works().await?;
        }
    }
    busy.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn no_stream_sees_a_translation_that_was_forgotten() -> Result<()> {
    let mut pods = JoinSet::new();
    for silent in [false, true] {
        pods.spawn(async move {
            let mut busy = busy_on_a_path().await?;
            for _ in 0..2 {
                busy.pod.pod.path()?.rebind(silent).await?;
                busy.works().await.with_context(|| format!("silent: {silent}"))?;
            }
            busy.finish().await.with_context(|| format!("silent: {silent}"))
        });
    }
    all(pods).await
}

#[tokio::test(flavor = "multi_thread")]
async fn no_stream_sees_a_worker_node_that_moves() -> Result<()> {
    let mut busy = busy_on_a_path().await?;
    busy.pod.pod.path()?.move_node()?;
    busy.works().await?;
    busy.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn no_stream_sees_a_vm_that_moves_between_its_addresses() -> Result<()> {
    let pod = SessionPod::on(RoutedPath::new().await?).await?;
    let agent = pod.agent().await?;
    let adaptor = pod.adaptor(&pod.path()?.agent()?)?;
    up(&adaptor).await?;
    let mut busy = BusyPod::new(RunningPod { agent, adaptor, line: None, pod }).await?;
    busy.pod.pod.path()?.move_vm()?;
    busy.works().await?;
    busy.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_without_an_adaptor_ends_after_its_time() -> Result<()> {
    let BusyPod { mut pod, runtime, steady, .. } = BusyPod::on_a_line().await?;
    let killed = Instant::now();
    pod.adaptor.kill9().await?;
    // The adaptor's own clients end with it.
    runtime.dies().await?;
    let mut steady = steady.into_iter();
    let (to_vm, to_node) = (steady.next().context("two")?, steady.next().context("two")?);
    to_vm.fails().await?;
    // The client in the VM sees silence until the session ends.
    timeout(PATIENCE, to_node.fails()).await?.with_context(|| pod.logs())?;
    ensure!(killed.elapsed() >= SESSION_LINGER, "it ended after {:?}\n{}", killed.elapsed(), pod.agent.log());
    let over = async {
        while pod.pod.vm_service.open() > 0 {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, over).await.with_context(|| format!("the server in the VM\n{}", pod.agent.log()))?;
    Ok(())
}
