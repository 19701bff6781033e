//! Sources of bind mounts that may not be made: the agent is root, and has asked no policy.

use std::fs;
use std::os::unix::fs::symlink;

use anyhow::{Context as _, Result, bail, ensure};
use secure_comms_tests::harness::scene::PATIENCE;
use secure_comms_tests::simulators::kata_api::VOLUMES;
use secure_comms_tests::simulators::kata_api::ttrpc::Error;

use crate::{Pod, bind, container, without_network};

#[tokio::test(flavor = "multi_thread")]
async fn no_source_is_made_elsewhere_and_the_kata_agent_decides() -> Result<()> {
    let (pod, kata) = Pod::with_kata_agent().await?;
    let outside = tempfile::tempdir()?;
    // What a container may leave in a volume that the next one mounts a part of.
    let volume = pod.scene.path("volume");
    fs::create_dir(&volume)?;
    symlink(outside.path(), volume.join("link"))?;
    symlink(outside.path().join("dangling"), volume.join("dangling"))?;
    let (up, name) = (volume.join("../../"), outside.path().file_name().context("a name")?);
    let sources = [
        outside.path().join("plain"),
        volume.join("link/below"),
        volume.join("link/below/"),
        volume.join("dangling"),
        volume.join("dangling/below"),
        up.join(name).join("parent"),
        volume.join("new/../../x"),
    ];
    let mut sent = container("elsewhere", vec![]);
    sent.OCI.mut_or_insert_default().Mounts.extend(sources.iter().map(|source| bind(source)));
    let (arrived, _) = without_network(pod.arrives(&kata, &sent).await?);
    ensure!(arrived == sent, "{sent}\nbecame\n{arrived}");
    ensure!(fs::read_dir(outside.path())?.count() == 0, "something was made outside of the prefix");
    ensure!(fs::read_dir(&volume)?.count() == 2, "something was made in the volume");
    for why in ["not below -secure-comms-mount-prefixes", "leads through a link", "has a '..'"] {
        pod.agent.wait_for_text(why, PATIENCE).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_elsewhere_is_refused_with_the_reason() -> Result<()> {
    let (pod, kata) = Pod::with_kata_agent().await?;
    let outside = tempfile::tempdir()?;
    let volume = outside.path().join("volume");
    let mut sent = container("refused", vec![]);
    let spec = sent.OCI.mut_or_insert_default();
    spec.Mounts.push(bind(&volume));
    spec.Annotations.insert(VOLUMES.into(), volume.display().to_string());
    let runtime = pod.runtime().await?;
    match pod.within("CreateContainer", runtime.create_container(&sent)).await? {
        Err(Error::RpcStatus(status)) => ensure!(
            status.message.contains("missing and not made: it is not below -secure-comms-mount-prefixes"),
            "{}",
            status.message
        ),
        other => bail!("expected a refusal, found {other:?}"),
    }
    ensure!(!volume.exists() && !kata.has_container("refused"));
    // Once something in the VM has made and mounted it, the container starts: where it is does not matter.
    fs::create_dir(&volume)?;
    let _mounted = crate::Mounted::at(&volume)?;
    pod.arrives(&kata, &sent).await?;
    Ok(())
}
