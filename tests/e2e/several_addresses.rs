//! A pod with several addresses, or one that a stranger answers at first: what is said there is not proven, so it ends no
//! start, deletes nothing, and holds up no other address.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // a test's helpers fail as the test does

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use secure_comms_tests::attackers::front::{Face, Front};
use secure_comms_tests::harness::process::{Child, Signal};
use secure_comms_tests::harness::scene::{PATIENCE, Scene, says, scene, works};
use secure_comms_tests::simulators::guest::{Backend, Rest};
use tokio::sync::RwLock;

const LATCHED: &str = "Secure Comms agent in the Kubernetes phase, latched\r\n";
/// A finding takes three connections: a wrong host key, a refusal to attest, and the same wrong host key. The first one
/// needs one more, for a start tries to attest first.
const FINDING: usize = 3;

fn deleting_adaptor(scene: &Scene, at: &[SocketAddr]) -> Result<Child> {
    let mut command = scene.adaptor_command(at)?;
    command.arg("--delete-on-exit");
    Child::spawn("adaptor", command)
}

fn latched(banner: impl Into<String>, new_keys: bool) -> Face {
    Face::Latched { banner: banner.into(), new_keys }
}

fn kbs_has_the_pod(scene: &Scene) -> bool {
    let at = |name| scene.kbs.resource(&format!("default/pp-{}/{name}", scene.pod));
    ["privateKey", "keys"].into_iter().any(|name| at(name).is_some_and(|key| !key.is_empty()))
}

fn store_has_the_pod(scene: &Scene) -> Result<bool> {
    fn files(directory: &Path) -> Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir(directory)? {
            let path = entry?.path();
            if path.is_dir() {
                found.extend(files(&path)?);
            }
            found.push(path);
        }
        Ok(found)
    }
    Ok(files(&scene.path("store"))?.iter().any(|path| path.to_string_lossy().contains(&scene.pod)))
}

/// A signal deletes the pod: that is the operator's decision.
async fn a_signal_deletes(scene: &Scene, mut adaptor: Child) -> Result<()> {
    adaptor.signal(Signal::SIGTERM)?;
    ensure!(adaptor.wait_exit(PATIENCE).await?.success(), "{}", adaptor.log());
    ensure!(!kbs_has_the_pod(scene) && !store_has_the_pod(scene)?, "{}", adaptor.log());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forged_lost_vm_ends_no_start() -> Result<()> {
    let hostile =
        format!("{}\u{1b}[2J\u{2028}\r\nforged: all is well\r\n{}", LATCHED.trim(), "x".repeat(20_000));
    for face in [latched(LATCHED, false), latched(LATCHED, true), latched(hostile, false)] {
        let scene = scene().await?;
        let front = Front::start(face).await?;
        let adaptor = deleting_adaptor(&scene, &[front.address()])?;
        front.served(3 * FINDING + 1).await.with_context(|| adaptor.log())?;
        ensure!(kbs_has_the_pod(&scene) && store_has_the_pod(&scene)?, "{}", adaptor.log());
        front.becomes(Face::Relays(scene.ssh));
        let _agent = scene.agent().await?;
        works(&scene, &adaptor).await?;
        let log = adaptor.log();
        ensure!(!log.contains('\u{1b}') && !log.lines().any(|line| line.starts_with("forged")), "{log}");
        let longest = log.lines().map(str::len).max().unwrap_or_default();
        ensure!(longest < 2500, "a line of {longest} bytes\n{log}");
        a_signal_deletes(&scene, adaptor).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forgery_that_lasts_ends_the_start_and_deletes_nothing() -> Result<()> {
    let mut scene = scene().await?;
    scene.deadline = 30;
    let front = Front::start(latched(LATCHED, false)).await?;
    let mut adaptor = deleting_adaptor(&scene, &[front.address()])?;
    // At once, and with what to do.
    let line = adaptor.wait_for_text("it is lost to this pod", PATIENCE).await?;
    ensure!(line.contains("make a new VM") && line.contains("nothing of it is proven"), "{line}");
    ensure!(adaptor.wait_exit(PATIENCE).await?.code() == Some(1), "{}", adaptor.log());
    let log = adaptor.log();
    ensure!(log.contains(&format!("start pod {}: the VM answers with a host key", scene.pod)), "{log}");
    ensure!(log.contains("the keys are kept: an SSH server has answered at its address"), "{log}");
    ensure!(kbs_has_the_pod(&scene) && store_has_the_pod(&scene)?, "{log}");

    // The pod comes up when the stranger is gone, with the keys that its VM may have got in the meantime.
    front.becomes(Face::Relays(scene.ssh));
    let _agent = scene.agent().await?;
    let adaptor = deleting_adaptor(&scene, &[front.address()])?;
    works(&scene, &adaptor).await?;
    a_signal_deletes(&scene, adaptor).await
}

#[tokio::test(flavor = "multi_thread")]
async fn one_liar_does_not_overrule_an_address_that_is_not_up_yet() -> Result<()> {
    for liar_first in [true, false] {
        let mut scene = scene().await?;
        // With one address, the liar would end the start after 10 s.
        scene.deadline = 90;
        let liar = Front::start(latched(LATCHED, false)).await?;
        let mut at = vec![liar.address(), scene.ssh];
        if !liar_first {
            at.reverse();
        }
        let adaptor = deleting_adaptor(&scene, &at)?;
        // The pauses before the ninth finding are more than 10 s together.
        liar.served(9 * FINDING + 1).await.with_context(|| adaptor.log())?;
        let _agent = scene.agent().await?;
        works(&scene, &adaptor).await?;
        ensure!(!adaptor.log().contains("it is lost to this pod"), "{}", adaptor.log());
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_that_attests_first_holds_up_no_start() -> Result<()> {
    let keys = r#"{"keys":{"attempt":1,"error":"wait for me"}}"#.to_owned();
    let upgrade = r#"{"upgrade":{}}"#.to_owned();
    for lines in [vec![], vec![keys.clone()], vec![keys, upgrade]] {
        let scene = scene().await?;
        let stranger = Front::start(Face::Attests(lines)).await?;
        let adaptor = Child::spawn("adaptor", scene.adaptor_command(&[stranger.address(), scene.ssh])?)?;
        says(&adaptor, &format!("attestation: connected to {}", stranger.address())).await?;
        let _agent = scene.agent().await?;
        works(&scene, &adaptor).await?;
        let up = format!("kubernetes phase up at {}", scene.ssh);
        ensure!(adaptor.log().contains(&up), "{}", adaptor.log());
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn another_pods_waiting_vm_holds_up_no_start() -> Result<()> {
    let (scene, mut other) = (scene().await?, scene().await?);
    // A reused address: its VM is another pod's, and the KBS's policy denies it this pod's keys.
    let denial = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n".to_vec();
    other.guest =
        Rest::start((Ipv4Addr::LOCALHOST, 0).into(), Backend::Bytes(Arc::new(RwLock::new(denial)))).await?;
    let _other_agent = other.agent().await?;
    let adaptor = Child::spawn("adaptor", scene.adaptor_command(&[other.ssh, scene.ssh])?)?;
    says(&adaptor, &format!("attestation: connected to {}", other.ssh)).await?;
    says(&adaptor, "keys: attempt 1").await?;
    let _agent = scene.agent().await?;
    works(&scene, &adaptor).await.with_context(|| adaptor.log())
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_at_eight_addresses_do_not_keep_a_running_pod_down() -> Result<()> {
    let scene = scene().await?;
    let mut strangers = Vec::new();
    for _ in 0..8 {
        strangers.push(Front::start(Face::Closes).await?);
    }
    let front = Front::start(Face::Relays(scene.ssh)).await?;
    let mut at: Vec<_> = strangers.iter().map(Front::address).collect();
    at.push(front.address());
    let _agent = scene.agent().await?;
    let adaptor = Child::spawn("adaptor", scene.adaptor_command(&at)?)?;
    works(&scene, &adaptor).await?;
    // Each of them attests now, and the connection to the pod is cut.
    strangers.iter().for_each(|stranger| stranger.becomes(Face::Attests(vec![])));
    let mark = adaptor.mark();
    front.becomes(Face::Relays(scene.ssh));
    let up = format!("kubernetes phase up at {}", front.address());
    adaptor.wait_from(mark, |line| line.contains(&up), PATIENCE).await.with_context(|| adaptor.log())?;
    works(&scene, &adaptor).await
}
