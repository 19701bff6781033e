//! Who of the worker node's processes reaches a pod's kata agent. With the real binaries, as root.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // a test's helpers fail as the test does

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use secure_comms_tests::harness::process::{Child, Signal};
use secure_comms_tests::harness::scene::{
    PATIENCE, Scene, endpoint, kata_socket_client, says, scene, socket, up,
};
use secure_comms_tests::simulators::kata::client::echo_roundtrip;
use tempfile::TempDir;
use tokio::process::Command;
use tokio::time::timeout;

/// The user and group that own nothing.
const NOBODY: u32 = 65534;

/// A scene whose adaptor has the default inbound KATAAGENT, under a directory that every user may search.
async fn default_scene() -> Result<(Scene, TempDir)> {
    let mut scene = scene().await?;
    let directory = tempfile::tempdir()?;
    std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755))?;
    scene.run_dir = directory.path().join("run");
    scene.kata_inbound = None;
    Ok((scene, directory))
}

/// Runs a line of perl, which every Debian has, as the user that owns nothing; what it prints.
async fn as_nobody(script: &str) -> Result<String> {
    let mut perl = Command::new("perl");
    perl.args(["-MSocket", "-e", script]).uid(NOBODY).gid(NOBODY).current_dir("/");
    let output = timeout(PATIENCE, perl.output()).await.context("perl hangs")??;
    Ok(String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
}

async fn connects(path: &Path) -> Result<String> {
    let path = path.display();
    as_nobody(&format!(
        "socket(S, AF_UNIX, SOCK_STREAM, 0) or die; print connect(S, pack_sockaddr_un('{path}')) ? 'connected' : $!"
    ))
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn another_user_cannot_reach_the_kata_agent() -> Result<()> {
    let (scene, directory) = default_scene().await?;
    let agent = scene.agent().await?;
    let mut adaptor = scene.adaptor()?;
    up(&adaptor).await.with_context(|| agent.log())?;
    let path = socket(&adaptor, "KATAAGENT").await?;
    let pods = directory.path().join("run/pods");
    assert_eq!(path, pods.join(&scene.pod).join("agent.ttrpc"));
    timeout(PATIENCE, echo_roundtrip(&mut kata_socket_client(&path).await?, 200, 1)).await??;
    let served = scene.kata.connections();
    assert_eq!(connects(&path).await?, "Permission denied");
    let mode = |path: &Path| std::fs::metadata(path).unwrap().mode() & 0o7777;
    assert_eq!((mode(&path), mode(&pods.join(&scene.pod)), mode(&pods)), (0o600, 0o700, 0o700));
    let list = format!("opendir(D, '{}') ? print 'listed' : print $!", pods.display());
    assert_eq!(as_nobody(&list).await?, "Permission denied");
    // Not only by the directories.
    for directory in [directory.path().join("run"), pods.clone(), pods.join(&scene.pod)] {
        std::fs::set_permissions(directory, std::fs::Permissions::from_mode(0o755))?;
    }
    assert_eq!(connects(&path).await?, "Permission denied");
    assert_eq!(scene.kata.connections(), served);
    adaptor.signal(Signal::SIGTERM)?;
    ensure!(adaptor.wait_exit(PATIENCE).await?.success(), "{}", adaptor.log());
    ensure!(pods.exists() && !pods.join(&scene.pod).exists(), "the pod's directory is left");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tcp_port_is_there_where_a_tag_asks_for_it() -> Result<()> {
    let scene = scene().await?;
    let _agent = scene.agent().await?;
    let adaptor = scene.adaptor()?;
    up(&adaptor).await?;
    let port = endpoint(&adaptor, "KATAAGENT").await?.port();
    // As documented: every user of the node has the kata agent there.
    let connect = format!(
        "socket(S, AF_INET, SOCK_STREAM, 0) or die; print connect(S, pack_sockaddr_in({port}, INADDR_LOOPBACK)) ? 'connected' : $!"
    );
    assert_eq!(as_nobody(&connect).await?, "connected");
    ensure!(!scene.run_dir.join("pods").exists(), "a directory without a socket");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_adaptors_socket_does_not_stop_the_next_one() -> Result<()> {
    let (scene, _directory) = default_scene().await?;
    let agent = scene.agent().await?;
    let mut adaptor = scene.adaptor()?;
    up(&adaptor).await.with_context(|| agent.log())?;
    let path = socket(&adaptor, "KATAAGENT").await?;
    adaptor.kill9().await?;
    ensure!(path.exists());
    let adaptor = scene.adaptor()?;
    up(&adaptor).await?;
    timeout(PATIENCE, echo_roundtrip(&mut kata_socket_client(&path).await?, 200, 1)).await??;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_directory_that_is_not_ours_alone_is_refused() -> Result<()> {
    let (scene, directory) = default_scene().await?;
    let pods = directory.path().join("run/pods");
    std::fs::create_dir_all(&pods)?;
    std::fs::set_permissions(&pods, std::fs::Permissions::from_mode(0o777))?;
    let mut adaptor = scene.adaptor()?;
    says(&adaptor, "run chmod 0700 on it; or choose another directory (--run-dir for").await?;
    assert_eq!(adaptor.wait_exit(PATIENCE).await?.code(), Some(1));
    // A user who may not write there.
    let mut command = Command::new(&scene.binaries().adaptor);
    let store = directory.path().join("store");
    std::fs::create_dir(&store)?;
    std::os::unix::fs::chown(&store, Some(NOBODY), Some(NOBODY))?;
    let program = directory.path().join("adaptor");
    // By another process: one that a parallel test starts could hold our file, open for writing, and keep it from being run.
    let copied = Command::new("cp").args([&scene.binaries().adaptor, &program]).status().await?;
    ensure!(copied.success(), "cp: {copied}");
    let mut unprivileged = Command::new(&program);
    unprivileged.args(["connect", "--pod-id", &scene.pod, "--address", "127.0.0.1:1", "--store"]);
    unprivileged.arg(&store).args(["--run-dir", "/run/sc-denied"]).uid(NOBODY).gid(NOBODY);
    let mut unprivileged = Child::spawn("adaptor", unprivileged)?;
    says(&unprivileged, "Permission denied").await?;
    says(&unprivileged, "choose another directory (--run-dir for the built-in KATAAGENT)").await?;
    assert_eq!(unprivileged.wait_exit(PATIENCE).await?.code(), Some(1));
    command.args(["connect", "--pod-id", &"a".repeat(128), "--address", "127.0.0.1:1", "--store"]);
    command.arg(scene.path("store"));
    let mut long = Child::spawn("adaptor", command)?;
    says(&long, "bytes, and a socket's may have 107: choose a shorter one (--run-dir for").await?;
    assert_eq!(long.wait_exit(PATIENCE).await?.code(), Some(1));
    Ok(())
}
