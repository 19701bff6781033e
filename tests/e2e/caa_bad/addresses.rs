//! Sandboxes that CAA has given up, and addresses that are used again.

use anyhow::{Result, ensure};
use secure_comms_tests::simulators::caa::Line;

use crate::{SHORT, Scene};

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_while_held_is_parked_and_then_forgotten() -> Result<()> {
    let scene = Scene::new(SHORT).await?;
    let test = async {
        let shim = scene.node.shim("stopped")?;
        shim.create_vm().await?;
        let mut starting = scene.node.start_held(&shim).await?;
        shim.stop_vm().await?;
        // CAA says nothing: its connection stays as it is, until its timeout.
        ensure!(matches!(&*starting.line.borrow(), Line::Held(_)));
        starting.is("ended", |line| matches!(line, Line::Ended(_))).await?;
        scene.node.forgets(&shim.id).await?;
        scene.another_pod_works("next").await
    };
    scene.within(test).await?;
    scene.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dial_for_a_pod_before_never_reaches_the_next() -> Result<()> {
    let scene = Scene::new(SHORT).await?;
    let test = async {
        let old = scene.node.shim("old")?;
        old.create_vm().await?;
        let mut zombie = scene.node.start_held(&old).await?;
        let address = scene.node.cloud.vm(&old.id)?.address;
        old.stop_vm().await?;
        let next = scene.node.shim("next")?;
        scene.node.cloud.next_address(address);
        let mut runtime = next.run().await?;
        ensure!(scene.node.cloud.vm(&next.id)?.address == address);
        runtime.exchange(crate::BLOCK).await?;
        ensure!(*zombie.line.borrow() != Line::Up, "a pod that was stopped has got a VM");
        zombie.is("ended", |line| matches!(line, Line::Ended(_))).await?;
        scene.node.forgets(&old.id).await?;
        runtime.exchange(crate::BLOCK).await?;
        next.end(runtime).await?;
        scene.node.forgets(&next.id).await
    };
    scene.within(test).await?;
    scene.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_whose_caller_has_gone_is_forgotten() -> Result<()> {
    let scene = Scene::new(SHORT).await?;
    let test = async {
        let shim = scene.node.shim("cancelled")?;
        shim.create_vm().await?;
        let starting = scene.node.start_held(&shim).await?;
        // The shim dies; CAA goes on.
        let mut line = starting.line.clone();
        drop(starting);
        line.wait_for(|line| matches!(line, Line::Ended(_))).await?;
        scene.node.forgets(&shim.id).await
    };
    scene.within(test).await?;
    scene.finish().await
}
