//! Floods of connections: the real adaptor still gets through, its streams continue, and the agent stays small.
//!
//! `FLOOD=100000` in the environment sets the number of connections of each kind, `FLOOD_AT_ONCE=5000` those at a time.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // a test's helpers fail as the test does

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use secure_comms_protocol::limits::{ATTESTATION_PEERS_MAX, UNAUTHENTICATED_MAX};
use secure_comms_tests::attackers::attacked_agent::{AttackedAgent, RSS_MAX_KIB};
use secure_comms_tests::attackers::flood::{Flood, Kind};
use secure_comms_tests::attackers::raw::{Offer, Raw};
use secure_comms_tests::harness::scene::{PATIENCE, Scene, SceneOptions, endpoint, kata_client, up};
use secure_comms_tests::simulators::kata::client::EchoSession;
use tokio::sync::Mutex;
use tokio::time::{sleep, timeout};

/// Connections of each flood, by default.
const CONNECTIONS: u64 = 10_000;
/// Connections at a time, by default.
const AT_ONCE: u64 = 1000;
/// The adaptor has 5 s; a busy machine gets more.
const THROUGH: Duration = Duration::from_secs(120);

/// Limit of the agent's memory after a flood, with the adaptor connected, in KiB.
const AFTER_MAX_KIB: u64 = 12 * 1024;

/// One flood at a time, so that its size is the intended one.
static TURN: Mutex<()> = Mutex::const_new(());

fn number(variable: &str, otherwise: u64) -> Result<u64> {
    match std::env::var(variable) {
        Ok(number) => number.parse().with_context(|| format!("{variable}={number}")),
        Err(_) => Ok(otherwise),
    }
}

/// Sends requests to the kata agent, one after the other, as long as the flood lasts and at least this many.
async fn requests(
    attacked: &AttackedAgent,
    adaptor: &secure_comms_tests::harness::process::Child,
    flood: &Flood,
    until: u64,
) -> Result<Vec<Duration>> {
    let mut session = EchoSession::open(kata_client(endpoint(adaptor, "KATAAGENT").await?).await?).await?;
    let mut times = Vec::new();
    while times.len() < 200 || flood.opened() < until {
        times.push(timeout(PATIENCE, session.roundtrip(200, times.len() as u64)).await??);
        attacked.holds()?;
        // Paced, so that the test measures requests and not the machine.
        sleep(Duration::from_millis(2)).await;
    }
    session.finish().await?;
    times.sort_unstable();
    Ok(times)
}

async fn withstands(kind: Kind) -> Result<()> {
    let _turn = TURN.lock().await;
    let (total, at_once) = (number("FLOOD", CONNECTIONS)?, number("FLOOD_AT_ONCE", AT_ONCE)?);
    let scene = Scene::new(SceneOptions::default()).await?;
    // At the default log level, as in a VM: connections are not logged one by one.
    let agent = scene.agent().await?;
    let attacked = AttackedAgent { scene, agent };
    attacked.holds_and_attests().await?;
    let (files, before) = (attacked.agent.open_files()?, attacked.agent.rss_kib()?);

    let flood = Flood::begin(kind, attacked.scene.ssh, at_once);
    let began = Instant::now();
    flood.reaches(total / 2).await;
    let (rate, attested) = (flood.opened() as f64 / began.elapsed().as_secs_f64(), flood.got_far());
    attacked.holds()?;

    let start = Instant::now();
    let adaptor = attacked.scene.adaptor()?;
    adaptor.wait_for_text("attestation: connected", PATIENCE).await.with_context(|| adaptor.log())?;
    let through = start.elapsed();
    up(&adaptor).await.with_context(|| adaptor.log())?;
    let all_up = start.elapsed();
    ensure!(through < THROUGH, "{kind:?}: the adaptor took {through:?} to get through");

    let times = requests(&attacked, &adaptor, &flood, total).await?;
    attacked.carries(&adaptor).await?;
    ensure!(!adaptor.log().contains("channel down"), "{}", adaptor.log());
    let (opened, got_far) = (flood.opened(), flood.got_far());
    let (during, peak) = (attacked.agent.rss_kib()?, attacked.agent.peak_kib()?);
    flood.end().await;
    // Other open files of the adaptor: its connection, and a stream or two.
    attacked.agent.wait_for_files(files + 8, PATIENCE).await?;
    let after = attacked.agent.rss_kib()?;
    println!(
        "{kind:?}: {opened} connections ({got_far} got far, {attested} before the adaptor), {rate:.0}/s; adaptor through in {through:.2?}, up in {all_up:.2?}; \
         {} requests of 200 bytes: p50 {:.2?}, p99 {:.2?}, max {:.2?}; RSS {before} KiB before, {during} during, peak {peak}, {after} after",
        times.len(),
        times[times.len() / 2],
        times[times.len() * 99 / 100],
        times[times.len() - 1],
    );
    ensure!(peak < RSS_MAX_KIB, "{kind:?}: the agent took {peak} KiB");
    // The allocator keeps its peak, which must be small.
    ensure!(after <= AFTER_MAX_KIB, "{kind:?}: {before} KiB before, {after} KiB after");
    attacked.holds()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_that_says_nothing_keeps_nobody_out() -> Result<()> {
    withstands(Kind::Silent).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_that_drips_a_byte_a_second_keeps_nobody_out() -> Result<()> {
    withstands(Kind::Drips).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_that_fails_to_authenticate_keeps_nobody_out() -> Result<()> {
    withstands(Kind::FailsToAuthenticate).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_that_opens_channels_keeps_no_peer_out() -> Result<()> {
    withstands(Kind::OpensChannels).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_that_attests_and_never_reads_keeps_nobody_out() -> Result<()> {
    withstands(Kind::NeverReads).await
}

/// A flood of 24 sources that offer the KBS and bring no answer from it, while the real adaptor comes from an address of its
/// own. The adaptor must be up while the flood goes on.
async fn withstands_peers_that_offer_the_kbs(kind: Kind, at_once: u64) -> Result<()> {
    let _turn = TURN.lock().await;
    let scene = Scene::new(SceneOptions::default()).await?;
    let agent = scene.agent().await?;
    let attacked = AttackedAgent { scene, agent };
    let flood = Flood::begin(kind, attacked.scene.ssh, at_once);
    let began = Instant::now();
    flood.reaches(2 * at_once).await;
    let rate = flood.got_far() as f64 / began.elapsed().as_secs_f64();
    attacked.holds()?;
    let start = Instant::now();
    let adaptor = attacked.scene.adaptor()?;
    up(&adaptor).await.with_context(|| format!("{}\n{}", adaptor.log(), attacked.agent.log()))?;
    println!("{kind:?}: {rate:.0} logins/s; the adaptor was up in {:.1?}", start.elapsed());
    // It still goes on.
    flood.reaches(flood.opened() + at_once).await;
    attacked.carries(&adaptor).await?;
    flood.end().await;
    attacked.holds()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_that_leaves_kbs_streams_unanswered_keeps_nobody_out() -> Result<()> {
    withstands_peers_that_offer_the_kbs(Kind::OffersKbs, 96).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_that_confirms_kbs_streams_in_silence_keeps_nobody_out() -> Result<()> {
    withstands_peers_that_offer_the_kbs(Kind::ConfirmsKbs, 96).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crowd_that_offers_the_kbs_calmly_keeps_nobody_out() -> Result<()> {
    withstands_peers_that_offer_the_kbs(Kind::OffersKbsCalmly, 24).await
}

/// As many as are admitted, so none is evicted: each makes the agent write until it blocks, and read ahead.
#[tokio::test(flavor = "multi_thread")]
async fn strangers_that_never_read_use_limited_memory() -> Result<()> {
    let _turn = TURN.lock().await;
    let scene = Scene::new(SceneOptions::default()).await?;
    let agent = scene.agent().await?;
    let attacked = AttackedAgent { scene, agent };
    let peers = u64::try_from(ATTESTATION_PEERS_MAX)?;
    let flood = Flood::begin(Kind::NeverReads, attacked.scene.ssh, peers);
    flood.reaches(peers).await;
    let mut halves = Vec::new();
    for _ in 0..UNAUTHENTICATED_MAX {
        let mut raw = Raw::secured(attacked.scene.ssh, Offer::default()).await?;
        raw.write(&262_000_u32.to_be_bytes()).await?;
        halves.push(raw);
    }
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(8) {
        attacked.holds()?;
        sleep(Duration::from_millis(50)).await;
    }
    println!(
        "{peers} peers that never read and {} half packets: peak {} KiB",
        halves.len(),
        attacked.agent.peak_kib()?
    );
    flood.end().await;
    drop(halves);
    attacked.comes_up().await.map(drop)
}
