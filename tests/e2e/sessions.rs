//! A session outlives its connections (docs/PROTOCOL.md 7.1): whatever ends them, and wherever in the protocol, no stream
//! sees it. With the real binaries, over a line that is cut to the byte. Faults that only a kernel shows are in
//! `session_faults.rs`.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // a test's helpers fail as the test does

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use secure_comms_tests::harness::busy_pod::BusyPod;
use secure_comms_tests::harness::process::Signal;
use secure_comms_tests::harness::scene::{PATIENCE, says, says_after, up};
use secure_comms_tests::harness::session_pod::{Client, RunningPod, SessionPod, TUNNELS, Tunnel};
use secure_comms_tests::simulators::kata::KataAgent;
use secure_comms_tests::simulators::kata::client::{
    EchoSession, bulk_both_ways, check_pattern, open_source, write_pattern, write_sink,
};
use secure_comms_tests::simulators::line::{Act, Direction, How, Trap};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;
use tokio::time::{interval, timeout};

const MIB: u64 = 1024 * 1024;
/// The adaptor's log, where the agent does not know the session.
const AGENT_RESTARTED: &str = "session over: the agent does not have it any more (it was restarted";
/// Both logs, where another adaptor, or the next process of the same, has begun a session.
const NEWER_SESSION: &str = "replaced by a newer connection of the worker node";
/// The adaptor's log, where the agent ends the session.
const AGENT_STOPS: &str = "channel down: the agent said bye: the agent stops";
/// The agent's log, where the adaptor does.
const ADAPTOR_STOPS: &str = "session: ended: the adaptor said bye";
/// Records after which a cut must have come past the end of what is cut.
const RECORDS_MAX: u64 = 200;

/// Waits for the first error, or for the end of all.
async fn all(mut tasks: JoinSet<Result<()>>) -> Result<()> {
    while let Some(ended) = tasks.join_next().await {
        ended??;
    }
    Ok(())
}

/// Waits until a server has this many connections. There is no event to await, so it polls.
async fn has_open(server: &KataAgent, wanted: u64, what: &str) -> Result<()> {
    let poll = async {
        while server.open() != wanted {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let late = || format!("{what}: {} connections instead of {wanted}", server.open());
    timeout(PATIENCE, poll).await.with_context(late)
}

/// The stream ends: by end of file, or by a reset.
async fn ends(client: &mut Client, what: &str) -> Result<()> {
    let rest = timeout(PATIENCE, client.read(&mut [0; 64])).await.with_context(|| format!("{what} stays"))?;
    ensure!(matches!(rest, Ok(0) | Err(_)), "{what}: bytes instead of an end");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_is_reset_costs_no_stream() -> Result<()> {
    let mut busy = BusyPod::on_a_line().await?;
    for round in 0..30 {
        let how = if round % 2 == 0 { How::Reset } else { How::Close };
        busy.pod.line()?.end_all(how);
        busy.works().await.with_context(|| format!("round {round}"))?;
    }
    // As fast as they come back, so also before they are anything.
    for _ in 0..30 {
        let line = busy.pod.line()?;
        let exists = line.wait_for(|connections| !connections.is_empty());
        timeout(PATIENCE, exists).await.context("no connection comes")?;
        line.end_all(How::Reset);
    }
    busy.finish().await
}

/// What happens at which record, and in what.
#[derive(Clone, Copy, Debug)]
struct Cuts {
    direction: Direction,
    bytes: usize,
    act: Act,
    /// Whether the records of a connection that comes back are cut, too; otherwise those of calls and streams only.
    resumes: bool,
}

/// Cuts at the first record, at the second, and so on, until there are no more.
async fn cut_at_every_record(cuts: Cuts) -> Result<u64> {
    let pod = RunningPod::on_a_line().await?;
    let mut runtime = pod.pod.runtime().await?;
    let mut long = Vec::new();
    for tunnel in TUNNELS {
        long.push(EchoSession::open(pod.pod.client(tunnel).await?).await?);
    }
    for round in 1..RECORDS_MAX {
        let Cuts { direction, bytes, act, resumes } = cuts;
        if resumes {
            pod.line()?.end_all(How::Reset);
        }
        pod.line()?.arm(Trap { direction, records: round, bytes, act });
        let script = async {
            runtime.exchange(500).await?;
            for tunnel in TUNNELS {
                bulk_both_ways(pod.pod.client(tunnel).await?, 700, round).await?;
            }
            for stream in &mut long {
                stream.roundtrip(600, round).await?;
            }
            anyhow::Ok(())
        };
        let context = || format!("{cuts:?}, record {round}\n{}", pod.logs());
        timeout(PATIENCE, script)
            .await
            .with_context(|| format!("it hangs: {}", context()))?
            .with_context(context)?;
        if pod.line()?.disarm() {
            for stream in long {
                timeout(PATIENCE, stream.finish()).await.with_context(context)?.with_context(context)?;
            }
            runtime.finish().await.with_context(context)?;
            return Ok(round);
        }
    }
    anyhow::bail!("{cuts:?}: {RECORDS_MAX} records were not all")
}

async fn cut_at_every_record_of(all_cuts: &[Cuts], least: u64) -> Result<()> {
    let mut pods = JoinSet::new();
    for &cuts in all_cuts {
        pods.spawn(async move {
            let records = cut_at_every_record(cuts).await?;
            println!("{records} records cut: {cuts:?}");
            ensure!(records > least, "{cuts:?}: only {records} records were cut");
            Ok(())
        });
    }
    all(pods).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_at_any_record_of_a_call_loses_no_byte() -> Result<()> {
    use Direction::{ToAdaptor, ToAgent};
    let cuts = |direction, bytes, act| Cuts { direction, bytes, act, resumes: false };
    cut_at_every_record_of(
        &[
            cuts(ToAgent, 0, Act::EndAll(How::Close)),
            cuts(ToAgent, 9, Act::EndOne(How::Reset)),
            cuts(ToAdaptor, 0, Act::EndOne(How::Close)),
            cuts(ToAdaptor, 9, Act::EndAll(How::Reset)),
        ],
        5,
    )
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_at_any_record_of_a_resume_loses_no_byte() -> Result<()> {
    use Direction::{ToAdaptor, ToAgent};
    let cuts = |direction, bytes, act| Cuts { direction, bytes, act, resumes: true };
    cut_at_every_record_of(
        &[
            cuts(ToAgent, 0, Act::EndOne(How::Close)),
            cuts(ToAgent, 9, Act::EndAll(How::Reset)),
            cuts(ToAdaptor, 0, Act::EndAll(How::Close)),
            cuts(ToAdaptor, 9, Act::EndOne(How::Reset)),
        ],
        15,
    )
    .await
}

/// 16 streams through each tunnel and calls of a MiB at KATAAGENT, as long as the connections are cut, and to their ends.
async fn bulk_under_cuts(pod: RunningPod) -> Result<RunningPod> {
    let mut runtime = pod.pod.runtime().await?;
    let cutting = Arc::new(AtomicBool::new(true));
    let mut streams = JoinSet::new();
    for number in 0..32 {
        let tunnel = if number % 2 == 0 { Tunnel::ToVm } else { Tunnel::ToNode };
        let (socket, cutting) = (pod.pod.inbound(tunnel), Arc::clone(&cutting));
        streams.spawn(async move {
            for round in 0.. {
                let client = SessionPod::connect(&socket).await?;
                let bulk = bulk_both_ways(client, MIB, number << 32 | round).await;
                bulk.with_context(|| format!("{tunnel:?}, stream {number}, round {round}"))?;
                if !cutting.load(Ordering::Relaxed) {
                    break;
                }
            }
            Ok(())
        });
    }
    let cuts = async {
        let mut ticks = interval(Duration::from_millis(300));
        for round in 0..20 {
            ticks.tick().await;
            pod.line()?.end_all(if round % 2 == 0 { How::Reset } else { How::Close });
        }
        cutting.store(false, Ordering::Relaxed);
        anyhow::Ok(())
    };
    let calls = async {
        while cutting.load(Ordering::Relaxed) {
            runtime.exchange(1024 * 1024).await?;
        }
        runtime.finish().await
    };
    let everything = async { tokio::try_join!(cuts, calls, all(streams)) };
    let ended = timeout(PATIENCE, everything).await.with_context(|| format!("it hangs\n{}", pod.logs()))?;
    ended.with_context(|| pod.logs())?;
    Ok(pod)
}

#[tokio::test(flavor = "multi_thread")]
async fn bulk_streams_lose_no_byte_under_cuts_all_the_time() -> Result<()> {
    bulk_under_cuts(RunningPod::on_a_line().await?).await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn bulk_streams_lose_no_byte_under_cuts_and_rekeys() -> Result<()> {
    let mut pod = SessionPod::new().await?;
    pod.agent_flags = ["-secure-comms-rekey-bytes", "1048576"].map(str::to_owned).to_vec();
    pod.adaptor_flags = ["--rekey-bytes", "1048576"].map(str::to_owned).to_vec();
    let pod = bulk_under_cuts(pod.run().await?).await?;
    let rekeys = pod.adaptor.lines().iter().filter(|line| line.text.contains("new session keys")).count();
    println!("{rekeys} new session keys");
    ensure!(rekeys > 3, "{rekeys} new session keys\n{}", pod.adaptor.log());
    Ok(())
}

/// Ends all connections, and lets none come back.
fn cut_for_now(pod: &RunningPod) -> Result<()> {
    pod.line()?.admit(0);
    pod.line()?.end_all(How::Reset);
    Ok(())
}

fn come_back(pod: &RunningPod) -> Result<()> {
    pod.line()?.admit(usize::MAX);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_during_a_cut_leaves_its_server() -> Result<()> {
    let busy = BusyPod::on_a_line().await?;
    let pod = &busy.pod;
    for tunnel in TUNNELS {
        let server = pod.pod.server(tunnel);
        // The steady stream.
        has_open(server, 1, "before").await?;
        let (mut leaves, mut resets) =
            (EchoSession::open(pod.pod.client(tunnel).await?).await?, pod.pod.client(tunnel).await?);
        leaves.roundtrip(100, 1).await?;
        open_source(&mut resets, 1000, 1).await?;
        resets.read_u8().await?;
        has_open(server, 3, "with two more").await?;
        cut_for_now(pod)?;
        // The second one has unread bytes, so its socket is reset.
        drop((leaves, resets));
        // A client that comes and goes within the cut, with what it said.
        let mut short = pod.pod.client(tunnel).await?;
        let before = server.connections();
        write_pattern(&mut short, 100, 1).await?;
        drop(short);
        ensure!(server.open() == 3, "its server knew of it during the cut");
        come_back(pod)?;
        has_open(server, 1, "after the cut").await.with_context(|| pod.logs())?;
        ensure!(server.connections() <= before + 1);
    }
    busy.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_leaves_during_a_cut_leaves_its_client() -> Result<()> {
    let mut pod = RunningPod::on_a_line().await?;
    let runtime = pod.pod.runtime().await?;
    let mut clients = Vec::new();
    for tunnel in TUNNELS {
        let mut client = pod.pod.client(tunnel).await?;
        EchoSession::open(&mut client).await?.roundtrip(100, 1).await?;
        clients.push(client);
    }
    cut_for_now(&pod)?;
    for name in ["vm-service", "node-service"] {
        let service = if name == "vm-service" { &mut pod.pod.vm_service } else { &mut pod.pod.node_service };
        *service = KataAgent::unix(pod.pod.scene.path(&format!("other-{name}")))?;
    }
    come_back(&pod)?;
    for mut client in clients {
        ends(&mut client, "a client of a server that left").await.with_context(|| pod.logs())?;
    }
    runtime.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn half_closed_streams_stay_so_across_a_cut() -> Result<()> {
    const BYTES: u64 = 300_000;
    let busy = BusyPod::on_a_line().await?;
    let pod = &busy.pod;
    for tunnel in TUNNELS {
        // Closed for writing before the cut, with bytes to read after it.
        let mut reads = pod.pod.client(tunnel).await?;
        open_source(&mut reads, BYTES, 3).await?;
        reads.shutdown().await?;
        check_pattern(&mut reads, 1, 3).await?;
        // Written before and during the cut, and closed for writing in it.
        let mut writes = EchoSession::open(pod.pod.client(tunnel).await?).await?;
        writes.roundtrip(BYTES, 4).await?;
        cut_for_now(pod)?;
        let (mut read, mut write) = writes.into_halves();
        write_pattern(&mut write, 1000, 5).await?;
        write.shutdown().await?;
        // All of it in a cut: opened, written and closed for writing.
        let whole = pod.pod.client(tunnel).await?;
        let whole = tokio::spawn(async move { write_sink(whole, 1000, 6).await });
        come_back(pod)?;
        let rest = async {
            check_pattern(&mut read, 1000, 5).await?;
            ensure!(read.read(&mut [0]).await? == 0, "bytes after the last");
            let mut all = Vec::new();
            reads.read_to_end(&mut all).await?;
            ensure!(all.len() as u64 == BYTES - 1, "{} bytes of {BYTES}", all.len() + 1);
            whole.await?.map(drop)
        };
        let rest = timeout(PATIENCE, rest).await.with_context(|| format!("it hangs\n{}", pod.logs()))?;
        rest.with_context(|| pod.logs())?;
    }
    busy.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_opened_during_a_cut_are_served_after_it() -> Result<()> {
    let mut busy = BusyPod::on_a_line().await?;
    for round in 0..5 {
        cut_for_now(&busy.pod)?;
        let mut early = JoinSet::new();
        for seed in 0..16 {
            let tunnel = if seed % 2 == 0 { Tunnel::ToVm } else { Tunnel::ToNode };
            let client = busy.pod.pod.client(tunnel).await?;
            early.spawn(async move { bulk_both_ways(client, 100_000, seed).await.map(drop) });
        }
        come_back(&busy.pod)?;
        // Cut again while they are being opened, and once more.
        for _ in 0..2 {
            let line = busy.pod.line()?;
            line.arm(Trap {
                direction: Direction::ToAgent,
                records: 10 + round,
                bytes: 0,
                act: Act::EndAll(How::Reset),
            });
            timeout(PATIENCE, line.happened()).await.context("no records to cut at")?;
        }
        timeout(PATIENCE, all(early))
            .await
            .with_context(|| busy.pod.logs())?
            .with_context(|| busy.pod.logs())?;
        busy.works().await?;
    }
    busy.finish().await
}

/// All that was open has ended.
async fn is_over(busy: BusyPod) -> Result<RunningPod> {
    let BusyPod { pod, runtime, steady, .. } = busy;
    runtime.dies().await.with_context(|| pod.logs())?;
    for steady in steady {
        steady.fails().await.with_context(|| pod.logs())?;
    }
    Ok(pod)
}

/// New streams of the tunnels work.
async fn tunnels_work(pod: &RunningPod) -> Result<()> {
    for tunnel in TUNNELS {
        let bulk = async { bulk_both_ways(pod.pod.client(tunnel).await?, 100_000, 7).await };
        timeout(PATIENCE, bulk).await.with_context(|| pod.logs())??;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_restarts_ends_the_streams_with_the_reason() -> Result<()> {
    let mut busy = BusyPod::on_a_line().await?;
    busy.pod.agent.kill9().await?;
    busy.pod.agent = busy.pod.pod.agent().await?;
    let pod = is_over(busy).await?;
    says(&pod.adaptor, AGENT_RESTARTED).await?;
    tunnels_work(&pod).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adaptor_that_restarts_ends_the_old_session() -> Result<()> {
    let mut busy = BusyPod::on_a_line().await?;
    busy.pod.adaptor.kill9().await?;
    let mut client = busy.pod.pod.client(Tunnel::ToNode).await?;
    // The session lingers, and its streams with it.
    has_open(&busy.pod.pod.vm_service, 1, "the steady stream").await?;
    busy.steady.iter_mut().nth(1).context("a stream of the VM")?.lives()?;
    let address = busy.pod.line()?.address();
    busy.pod.adaptor = busy.pod.pod.adaptor(&[address])?;
    up(&busy.pod.adaptor).await?;
    let pod = is_over(busy).await?;
    says(&pod.agent, NEWER_SESSION).await?;
    has_open(&pod.pod.vm_service, 0, "streams of the old session").await.with_context(|| pod.logs())?;
    // It came between the sessions: its stream was never opened, and belongs to the next peer or to none.
    drop(client.shutdown().await);
    tunnels_work(&pod).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_of_another_adaptor_ends_the_session() -> Result<()> {
    let busy = BusyPod::on_a_line().await?;
    let mut copy = tokio::process::Command::new("cp");
    let (store, other) = (busy.pod.pod.scene.path("store"), busy.pod.pod.scene.path("other"));
    let copied = copy.arg("-a").arg(store).arg(other).status().await?;
    ensure!(copied.success(), "copying the store: {copied}");
    let other = busy.pod.pod.adaptor_with("other", &[busy.pod.pod.ssh()?])?;
    let pod = is_over(busy).await?;
    says(&pod.adaptor, NEWER_SESSION).await?;
    says(&pod.agent, NEWER_SESSION).await?;
    up(&other).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stale_connection_that_comes_back_does_no_harm() -> Result<()> {
    let mut busy = BusyPod::on_a_line().await?;
    for _ in 0..3 {
        let old = busy.pod.line()?.connections();
        busy.pod.line()?.hold_all();
        // Over new connections: nothing passes on the old ones.
        busy.works().await?;
        ensure!(
            busy.pod.line()?.connections().iter().any(|number| !old.contains(number)),
            "it worked over connections that carry nothing"
        );
        busy.pod.line()?.release();
        busy.works().await?;
    }
    busy.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_that_hangs_and_comes_back_late_does_no_harm() -> Result<()> {
    let mut pods = JoinSet::new();
    for (direction, records) in [
        (Direction::ToAgent, 2),
        (Direction::ToAgent, 6),
        (Direction::ToAgent, 9),
        (Direction::ToAdaptor, 4),
        (Direction::ToAdaptor, 8),
    ] {
        pods.spawn(async move {
            let mut busy = BusyPod::on_a_line().await?;
            busy.pod.line()?.arm(Trap { direction, records, bytes: 0, act: Act::HoldOne });
            busy.pod.line()?.end_all(How::Reset);
            let context = || format!("held {direction:?} after {records} records");
            busy.works().await.with_context(context)?;
            busy.pod.line()?.release();
            busy.works().await.with_context(context)?;
            busy.finish().await.with_context(context)
        });
    }
    all(pods).await
}

/// Numbers of the connections of both lanes: the older one is `main`.
async fn lanes(pod: &RunningPod) -> Result<(u64, u64)> {
    let both = pod.line()?.wait_for(|connections| connections.len() == 2);
    let both = timeout(PATIENCE, both).await.context("there are not two connections")?;
    Ok((both[0], both[1]))
}

#[tokio::test(flavor = "multi_thread")]
async fn each_lane_is_cut_and_comes_back_by_itself() -> Result<()> {
    let mut busy = BusyPod::on_a_line().await?;
    let (main, mut data) = lanes(&busy.pod).await?;
    for _ in 0..5 {
        busy.pod.line()?.end(data, How::Reset);
        busy.works().await?;
        let (same, other) = lanes(&busy.pod).await?;
        ensure!(same == main && other != data, "{main}, {data} became {same}, {other}");
        data = other;
    }
    let mut main = main;
    for _ in 0..5 {
        busy.pod.line()?.end(main, How::Reset);
        busy.works().await?;
        // The lane that stayed is now the older connection.
        let (same, other) = lanes(&busy.pod).await?;
        ensure!(same == data && other != main, "{main}, {data} became {other}, {same}");
        main = other;
    }
    busy.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_data_lane_delays_no_call_of_the_runtime() -> Result<()> {
    let mut busy = BusyPod::on_a_line().await?;
    let (_, data) = lanes(&busy.pod).await?;
    busy.pod.line()?.hold(data);
    // None of these waits for the other lane to be given up.
    for _ in 0..20 {
        busy.runtime.exchange(3000).await?;
    }
    busy.works().await?;
    busy.pod.line()?.release();
    busy.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_of_a_lane_that_cannot_be_had_go_over_main() -> Result<()> {
    let pod = RunningPod::on_a_line().await?;
    pod.line()?.admit(1);
    let mut busy = BusyPod::new(pod).await?;
    ensure!(busy.pod.line()?.connections().len() == 1, "{}", busy.pod.logs());
    busy.works().await?;
    // It can be had again, and comes when a stream needs it.
    busy.pod.line()?.admit(usize::MAX);
    busy.works().await?;
    busy.finish().await?;

    // The same for streams whose lane was there before.
    let mut busy = BusyPod::on_a_line().await?;
    let (_, data) = lanes(&busy.pod).await?;
    busy.pod.line()?.admit(1);
    busy.pod.line()?.end(data, How::Reset);
    busy.works().await?;
    ensure!(busy.pod.line()?.connections().len() == 1, "{}", busy.pod.logs());
    busy.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_of_either_side_ends_the_session_at_once() -> Result<()> {
    for agent in [true, false] {
        let busy = BusyPod::on_a_line().await?;
        let marks = (busy.pod.agent.mark(), busy.pod.adaptor.mark());
        let stops = if agent { &busy.pod.agent } else { &busy.pod.adaptor };
        stops.signal(Signal::SIGTERM)?;
        let mut pod = is_over(busy).await?;
        if agent {
            says_after(&pod.adaptor, marks.1, AGENT_STOPS).await?;
            pod.agent.wait_exit(PATIENCE).await?;
        } else {
            says_after(&pod.agent, marks.0, ADAPTOR_STOPS).await?;
            pod.adaptor.wait_exit(PATIENCE).await?;
        }
    }
    Ok(())
}
