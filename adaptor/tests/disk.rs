//! A store whose disk is full or read-only: new pods are refused with the reason, known ones go on, and nothing is lost.
//!
//! Each test runs itself again on a small disk, in a mount namespace of its own, so it needs root.
#![allow(clippy::unwrap_used, clippy::panic, reason = "the helpers of a test fail loudly")]

mod support;

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use secure_comms_adaptor::pod::PodState;
use secure_comms_adaptor::store::StoreError;
use secure_comms_adaptor::{AdaptorError, Deadline, PodSpec, Stopped};
use secure_comms_protocol::PodId;
use support::agent::{Agent, Mode};
use support::{PATIENCE, World, addresses, echoes, pod};
use tokio::time::timeout;

const DISK: &str = "SECURE_COMMS_TEST_DISK";

/// The small disk; none if the test has run itself on one now.
fn disk(test: &str) -> Option<PathBuf> {
    if let Some(disk) = std::env::var_os(DISK) {
        return Some(disk.into());
    }
    let disk = tempfile::tempdir().unwrap();
    let script = r#"mount -t tmpfs -o size=1m,mode=700 tmpfs "$0" && exec "$@""#;
    let status = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", script])
        .arg(disk.path())
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(DISK, disk.path())
        .env("TMPDIR", disk.path())
        .status()
        .unwrap();
    assert!(status.success(), "{test} on a small disk: {status}; it needs root");
    None
}

fn remount(disk: &Path, how: &str) {
    let status = Command::new("mount").args(["-o", &format!("remount,{how}")]).arg(disk).status().unwrap();
    assert!(status.success(), "{status}");
}

fn fill(disk: &Path) -> PathBuf {
    let path = disk.join("fill");
    let mut file = fs::File::create(&path).unwrap();
    while file.write_all(&[0; 512]).is_ok() {}
    path
}

async fn up() -> (World, Agent, String) {
    let world = World::new("").await;
    let local = world.prepare().await;
    let agent = Agent::start(Mode::kubernetes(world.pod_key().await, world.node_key().await)).await;
    let deadline = Deadline::after(PATIENCE);
    world.adaptor.start(&pod(), &addresses(&[agent.address]), deadline).await.unwrap();
    echoes(&local).await;
    (world, agent, local)
}

async fn prepare_other(world: &World) -> Result<(), AdaptorError> {
    let other: PodId = "pod-2".parse().unwrap();
    world.adaptor.prepare(&other, PodSpec::default(), Deadline::after(PATIENCE)).await.map(|_| ())
}

async fn refuses_other(world: &World, reason: &str) {
    let error = prepare_other(world).await.unwrap_err();
    let AdaptorError::Store(store) = &error else { panic!("{error:?}") };
    assert!(store.is_unwritable(), "{error:?}");
    let StoreError::File(cause) = store else { panic!("{error:?}") };
    let text = std::error::Error::source(cause).map(ToString::to_string).unwrap_or_default();
    assert!(format!("{cause}: {text}").contains(reason), "{cause}: {text}");
}

#[tokio::test]
async fn a_full_disk_refuses_new_pods_and_ends_known_ones() {
    let Some(disk) = disk("a_full_disk_refuses_new_pods_and_ends_known_ones") else { return };
    let (world, _agent, local) = up().await;
    let filled = fill(&disk);
    refuses_other(&world, "No space left").await;
    echoes(&local).await;
    let stopped = timeout(PATIENCE, world.adaptor.end(&pod())).await.unwrap().unwrap();
    assert!(matches!(stopped, Stopped::Done), "{stopped:?}");
    fs::remove_file(filled).unwrap();
    prepare_other(&world).await.unwrap();
}

#[tokio::test]
async fn a_read_only_disk_keeps_the_end_until_it_can_be_written() {
    let Some(disk) = disk("a_read_only_disk_keeps_the_end_until_it_can_be_written") else { return };
    let (world, _agent, local) = up().await;
    remount(&disk, "ro");
    refuses_other(&world, "Read-only").await;
    echoes(&local).await;
    let stopped = timeout(PATIENCE, world.adaptor.end(&pod())).await.unwrap().unwrap();
    assert!(matches!(stopped, Stopped::Retried(AdaptorError::Store(_))), "{stopped:?}");
    assert!(world.published.count("DELETE /kbs/v0/resource/default/pp-pod-1/keys") > 0);
    let PodState::Ending { last_error: Some(error) } = world.state() else { panic!("{:?}", world.state()) };
    assert!(error.contains("Read-only"), "{error}");
    remount(&disk, "rw");
    let Some(mut now) = world.adaptor.subscribe(&pod()) else { return };
    timeout(PATIENCE, async { while now.changed().await.is_ok() {} }).await.unwrap();
    prepare_other(&world).await.unwrap();
}

#[tokio::test]
async fn a_read_only_disk_resumes_its_pods() {
    let Some(disk) = disk("a_read_only_disk_resumes_its_pods") else { return };
    let (world, _agent, local) = up().await;
    remount(&disk, "ro");
    drop(local);
    let world = world.restart("");
    assert_eq!(world.adaptor.resume_all().await.unwrap(), [pod()]);
    let mut now = world.adaptor.subscribe(&pod()).unwrap();
    let up = now.wait_for(|now| matches!(now.state, PodState::Up { .. }));
    timeout(PATIENCE, up).await.unwrap().unwrap();
    remount(&disk, "rw");
}
