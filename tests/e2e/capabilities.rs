//! The real agent, as root with all capabilities, gives them up once its keys are final, and still does all its work.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // a test's helpers fail as the test does

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use secure_comms_tests::harness::pod_site::{PodSite, V4, is_up};
use secure_comms_tests::harness::process::{Child, Signal, ensure_built};
use secure_comms_tests::harness::scene::{PATIENCE, Scene, says_after, scene, works};
use secure_comms_tests::harness::test_namespace::TestNamespace;
use serde_json::{Value, json};
use tokio::process::Command;
use tokio::time::{Instant, sleep};

const NET_ADMIN: u64 = 1 << 12;
const SYS_ADMIN: u64 = 1 << 21;
/// The lines of a thread's status that name capabilities which it has, or can get.
const SETS: [&str; 5] = ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"];

/// All capabilities of all threads of a process, and whether each thread can get new ones by executing a program.
fn capabilities(process: &Child) -> Result<(u64, bool)> {
    let (mut all, mut new) = (0, false);
    for thread in fs::read_dir(format!("/proc/{}/task", process.pid()))? {
        // The thread may have ended.
        let Ok(status) = fs::read_to_string(thread?.path().join("status")) else { continue };
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        for set in SETS {
            all |= u64::from_str_radix(field(set).with_context(|| format!("no {set}"))?, 16)?;
        }
        new |= field("NoNewPrivs:") != Some("1");
    }
    Ok((all, new))
}

/// Waits until the process has these capabilities and no others.
async fn has_only(process: &Child, expected: u64) -> Result<()> {
    let start = Instant::now();
    loop {
        let found = capabilities(process)?;
        if found == (expected, false) {
            return Ok(());
        }
        ensure!(
            start.elapsed() < Duration::from_secs(60),
            "{:#x} instead of {expected:#x}, can get new ones: {}\n{}",
            found.0,
            found.1,
            process.log()
        );
        // No event shows this from outside.
        sleep(Duration::from_millis(50)).await;
    }
}

fn is_powerful(process: &Child) -> Result<()> {
    let (found, _) = capabilities(process)?;
    ensure!(found & SYS_ADMIN != 0 && found & NET_ADMIN != 0, "the test must run as root: {found:#x}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_latched_agent_has_no_capability_and_serves_on() -> Result<()> {
    let scene = scene().await?;
    let mut agent = scene.agent().await?;
    is_powerful(&agent)?;
    let mut adaptor = scene.adaptor()?;
    works(&scene, &adaptor).await?;
    has_only(&agent, 0).await?;
    agent.wait_for_text("capabilities: none from now on", PATIENCE).await?;

    // A new adaptor is let in, and everything is served, without them.
    adaptor.kill9().await?;
    let adaptor = scene.adaptor()?;
    works(&scene, &adaptor).await?;
    has_only(&agent, 0).await?;

    // One that starts latched gives them up before any login.
    let mark = adaptor.mark();
    adaptor.stop()?;
    agent.kill9().await?;
    let mut agent = scene.agent().await?;
    has_only(&agent, 0).await?;
    adaptor.cont()?;
    says_after(&adaptor, mark, "kubernetes phase up").await?;
    works(&scene, &adaptor).await?;
    agent.signal(Signal::SIGTERM)?;
    ensure!(agent.wait_exit(PATIENCE).await?.success(), "{}", agent.log());
    Ok(())
}

/// Puts the keys of a pod that has latched into the state directory of another agent.
async fn latch(state: &Path) -> Result<()> {
    let scene: Scene = scene().await?;
    let (_agent, adaptor) = (scene.agent().await?, scene.adaptor()?);
    works(&scene, &adaptor).await?;
    fs::create_dir(state)?;
    fs::set_permissions(state, fs::Permissions::from_mode(0o700))?;
    fs::copy(scene.path("agent-state/keys"), state.join("keys")).context("copying the latched keys")?;
    Ok(())
}

/// Stops an agent in good order.
async fn end(mut agent: Child) -> Result<()> {
    agent.signal(Signal::SIGTERM)?;
    ensure!(agent.wait_exit(PATIENCE).await?.success(), "{}", agent.log());
    ensure!(agent.log().contains("pod network: undone"), "{}", agent.log());
    Ok(())
}

fn external() -> Value {
    let mut spec = V4.pod_network();
    spec["external-net-via-pod-vm"] = json!(true);
    spec
}

#[tokio::test(flavor = "multi_thread")]
async fn with_a_pod_network_the_right_to_undo_it_remains() -> Result<()> {
    let site = PodSite::new(&V4)?;
    let outside = TestNamespace::new("outside")?;
    site.vm.veth("ens4", &outside, "cable")?;
    site.vm.address("ens4", "10.77.0.2/24")?;
    latch(&site.path("state")).await?;
    let before = site.state()?;

    let moved = "'ens4' is the pod's, with its addresses and routes";
    let mut agent = site.up(&external()).await?;
    has_only(&agent, NET_ADMIN).await?;
    agent.wait_for_text("capabilities: only CAP_NET_ADMIN from now on", PATIENCE).await?;
    agent.wait_for_text(moved, PATIENCE).await?;
    let up = site.state()?;
    ensure!(up != before, "the pod network changed nothing");
    // What a killed agent left behind is repaired.
    agent.kill9().await?;
    let agent = site.up(&external()).await?;
    agent.wait_for_text(moved, PATIENCE).await?;
    has_only(&agent, NET_ADMIN).await?;
    ensure!(site.state()? == up, "a restarted agent reaches another state");
    end(agent).await?;
    ensure!(site.state()? == before, "not undone: {:?}", site.state()?);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_pod_network_is_retried_without_them() -> Result<()> {
    let site = PodSite::bare()?;
    site.node.address("cable", V4.node)?;
    site.node_end(&V4)?;
    latch(&site.path("state")).await?;
    let agent = site.agent(&V4.pod_network()).await?;
    agent.wait_for_text("pod network: waiting: no default route for IPv4", PATIENCE).await?;
    has_only(&agent, NET_ADMIN).await?;
    site.vm.address("ens3", V4.vm)?;
    site.vm.ip(["route", "add", "default", "dev", "ens3"])?;
    is_up(&agent).await?;
    end(agent).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_that_comes_late_is_still_entered() -> Result<()> {
    let site = PodSite::new(&V4)?;
    latch(&site.path("state")).await?;
    // Not made yet; its name is free once the first is gone.
    let path = TestNamespace::new("late")?.path();
    let mut command = site.agent_command(&V4.pod_network()).await?;
    command.arg("-pod-namespace").arg(&path);
    let agent = Child::spawn("agent", command)?;
    agent.wait_for_text("setting up the pod network: opening network namespace", PATIENCE).await?;
    is_powerful(&agent)?;
    let mut make = Command::new(&ensure_built().await?.agent);
    make.env("JOURNAL_STREAM", "1:1").args(["-create-pod-namespace-only", "-pod-namespace"]).arg(&path);
    ensure!(make.output().await?.status.success(), "no namespace was made");
    let up = is_up(&agent).await;
    let dropped = has_only(&agent, NET_ADMIN).await;
    let removed = Command::new("ip").args(["netns", "del"]).arg(path.file_name().unwrap()).status().await?;
    ensure!(removed.success(), "the namespace stays");
    up.and(dropped.map(|()| String::new()))?;
    end(agent).await
}
