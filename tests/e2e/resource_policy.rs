//! The shipped resource policy in front of the keys: which VM becomes the pod. With the real binaries; the KBS simulator
//! evaluates the policy as Trustee does.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // a test's helpers fail as the test does

use anyhow::{Result, ensure};
use secure_comms_protocol::{InitDataDigest, resource};
use secure_comms_resource_policy::SHIPPED;
use secure_comms_tests::harness::process::Child;
use secure_comms_tests::harness::scene::{PATIENCE, Scene, SceneOptions, scene, up, works};
use serde_json::{Value, json};

/// Digests of the init-data that the worker node gave the VM, and of one that an attacker wrote for a VM of his own. The
/// attacker's names the pod and allows everything: nothing in it counts.
const EXPECTED: &str = "5f2a3e1c9b7d4860f1e2d3c4b5a69788796a5b4c3d2e1f00112233445566778a";
const ATTACKERS: &str = "5f2a3e1c9b7d4860f1e2d3c4b5a69788796a5b4c3d2e1f00112233445566778b";

/// The claims of a genuine VM with the image that the KBS expects.
fn claims(init_data: &str, pod: &str) -> Value {
    json!({ "submods": { "cpu0": {
        "ear.status": "affirming",
        "ear.veraison.annotated-evidence": {
            "snp": {},
            "init_data": init_data,
            "init_data_claims": { "secure-comms.toml": format!("sc-pod-id = '{pod}'") },
        },
    } } })
}

/// A scene whose KBS has the policy, and whose VM shows evidence for `evidence` and says that its init-data is `says`.
async fn vm(evidence: &str, says: &str) -> Result<(Scene, Child, Child)> {
    let mut scene = scene().await?;
    scene.kbs.enforce(SHIPPED, claims(evidence, &scene.pod));
    let digest = scene.path("initdata.digest");
    std::fs::write(&digest, says)?;
    let flags = ["-secure-comms-init-data-digest".to_owned(), digest.display().to_string()];
    scene.agent_flags.extend(flags);
    let agent = scene.agent().await?;
    let mut adaptor = scene.adaptor_command(&[scene.ssh])?;
    adaptor.args(["--init-data-digest", EXPECTED]);
    let adaptor = Child::spawn("adaptor", adaptor)?;
    Ok((scene, agent, adaptor))
}

fn path(scene: &Scene, digest: &str) -> String {
    let digest: InitDataDigest = digest.parse().unwrap();
    resource::pod_keys(&scene.pod.parse().unwrap(), Some(&digest))
}

async fn asked_for(scene: &Scene, digest: &str) -> Result<()> {
    let path = format!("/kbs/v0/resource/{}", path(scene, digest));
    scene.kbs.wait_for_request(|request| request.path == path, PATIENCE).await?;
    Ok(())
}

#[tokio::test]
async fn a_vm_with_the_expected_init_data_becomes_the_pod() -> Result<()> {
    let (scene, _agent, adaptor) = vm(EXPECTED, EXPECTED).await?;
    up(&adaptor).await?;
    works(&scene, &adaptor).await
}

#[tokio::test]
async fn an_attackers_vm_that_claims_the_digest_gets_no_key() -> Result<()> {
    let (scene, agent, adaptor) = vm(ATTACKERS, EXPECTED).await?;
    asked_for(&scene, EXPECTED).await?;
    agent.wait_for_text("status 500", PATIENCE).await?;
    ensure!(scene.kbs.resource(&path(&scene, EXPECTED)).is_some(), "the keys are published");
    ensure!(scene.cdh.fetch(&path(&scene, EXPECTED)).await.is_err(), "the attacker's own request is refused");
    ensure!(scene.kata.connections() == 0, "no client reached the attacker's VM");
    // Its own digest is no way around: there is nothing.
    ensure!(
        scene.cdh.fetch(&path(&scene, ATTACKERS)).await.is_err(),
        "nothing was published for the attacker"
    );
    // The honest VM, at the same address: only the evidence differs.
    scene.kbs.enforce(SHIPPED, claims(EXPECTED, &scene.pod));
    up(&adaptor).await?;
    works(&scene, &adaptor).await
}

#[tokio::test]
async fn a_vm_with_other_init_data_asks_for_what_is_not_there() -> Result<()> {
    let (scene, agent, _adaptor) = vm(ATTACKERS, ATTACKERS).await?;
    asked_for(&scene, ATTACKERS).await?;
    agent.wait_for_text("status 500", PATIENCE).await?;
    ensure!(scene.kata.connections() == 0, "no client reached the VM");
    Ok(())
}

#[tokio::test]
async fn keys_without_expected_init_data_are_refused() -> Result<()> {
    let scene = Scene::new(SceneOptions::default()).await?;
    scene.kbs.enforce(SHIPPED, claims(EXPECTED, &scene.pod));
    let agent = scene.agent().await?;
    let _adaptor = scene.adaptor()?;
    agent.wait_for_text("status 500", PATIENCE).await?;
    ensure!(scene.kata.connections() == 0, "no client reached the VM");
    Ok(())
}
