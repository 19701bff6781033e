//! The node's nftables rules are removed by another program.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use secure_comms_tests::harness::scene::PATIENCE;
use secure_comms_tests::simulators::caa::FORWARDER_PORT;
use secure_comms_tunnel::netns::{self, Namespace};
use tokio::time::{sleep, timeout};

use crate::Scene;

const TABLE: &str = "table inet secure-comms-adaptor";

impl Scene {
    async fn has_rules(&self) -> Result<bool> {
        let mut command = self.node.namespace.command("nft");
        let output = command.args(["list", "ruleset"]).stdin(Stdio::null()).output().await?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let listed = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok(listed.contains(TABLE) && listed.contains("to-adaptor") && listed.contains("fence"))
    }

    async fn gets_rules(&self) -> Result<()> {
        let back = async {
            while !self.has_rules().await? {
                sleep(Duration::from_millis(20)).await;
            }
            anyhow::Ok(())
        };
        timeout(PATIENCE, back).await.context("the rules are not put back")?
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rules_that_are_flushed_are_put_back_and_reported() -> Result<()> {
    let scene = Scene::new(PATIENCE).await?;
    let test = async {
        ensure!(scene.has_rules().await?, "there were no rules");
        for flush in ["flush ruleset", "delete table inet secure-comms-adaptor"] {
            let mark = scene.serve.mark();
            scene.node.nft(flush).await?;
            scene.gets_rules().await?;
            scene.serve.wait_from(mark, |line| line.contains("rules"), PATIENCE).await?;
            scene.another_pod_works("next").await?;
        }
        Ok(())
    };
    scene.within(test).await
}

#[tokio::test(flavor = "multi_thread")]
async fn rules_stay_and_reject_when_serve_has_ended() -> Result<()> {
    let mut scene = Scene::new(PATIENCE).await?;
    // While it runs they are not removed: it would put them back, and the pod's stream could end.
    let mut command = scene.node.serve_command().await?;
    let refused = command.arg("--remove-rules").output().await?;
    let said = String::from_utf8_lossy(&refused.stderr);
    ensure!(!refused.status.success() && said.contains("something listens at port"), "{said}");
    ensure!(scene.has_rules().await?, "the rules are removed while serve runs");
    scene.serve.kill9().await?;
    ensure!(scene.has_rules().await?, "the rules went with serve");
    let address = scene.node.cloud.vm(&scene.bystander.id)?.address;
    let namespace = Namespace::new(scene.node.namespace.name());
    let dialled = netns::connect(Some(&namespace), (address, FORWARDER_PORT).into()).await;
    ensure!(dialled.is_err(), "a dial got through");
    let mut command = scene.node.serve_command().await?;
    let removed = command.arg("--remove-rules").output().await?;
    ensure!(removed.status.success(), "{}", String::from_utf8_lossy(&removed.stderr));
    ensure!(!scene.has_rules().await?, "--remove-rules left them");
    Ok(())
}
