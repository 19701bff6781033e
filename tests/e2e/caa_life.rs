//! The whole life of a pod of cloud-api-adaptor's, over the real `serve` and agent.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use secure_comms_tests::harness::caa_node::{CaaNode, NodeOptions};
use secure_comms_tests::harness::pod_runtime::PodRuntime;
use secure_comms_tests::harness::scene::PATIENCE;
use secure_comms_tests::simulators::kata_api::server::{Request, output};
use tokio::time::sleep;

/// As the runtime sends the input of a process.
const BLOCK: u32 = 32 * 1024;
/// Length of the cut.
const CUT: Duration = Duration::from_secs(10);

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_lives_from_create_vm_to_stop_vm() -> Result<()> {
    let node = CaaNode::new(NodeOptions::default()).await?;
    let serve = node.serve().await?;
    let lived = life(&node).await;
    lived.with_context(|| serve.log())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_of_the_strict_variant_lives_as_well() -> Result<()> {
    let node = CaaNode::new(NodeOptions { strict: true, ..NodeOptions::default() }).await?;
    let serve = node.serve().await?;
    let lived = life(&node).await;
    lived.with_context(|| serve.log())
}

async fn life(node: &CaaNode) -> Result<()> {
    let shim = node.shim("web-1")?;
    let keys = format!("default/pp-{}/keys", shim.id);
    // The VM does not exist yet, and its keys are at the KBS.
    let agent = shim.create_vm().await?;
    node.kbs.wait_for_request(|r| r.method == "POST" && r.path.ends_with(&keys), PATIENCE).await?;
    let starting = node.start_held(&shim).await?;
    node.cloud.boot(&shim.id).await?;
    starting.started().await?;
    let vm = node.cloud.vm(&shim.id)?;
    // One Check of our own, and the runtime's first call is not here yet.
    ensure!(matches!(vm.kata.requests()[..], [Request::Check(_)]), "{:?}", vm.kata.requests());
    let mut runtime = shim.connect(&agent).await?;
    // Once the Kubernetes phase is up, no container finds the keys at the KBS.
    ensure!(node.kbs.resource(&keys).is_none(), "the keys stay at the KBS");
    traffic(&mut runtime, 16).await?;
    node.cloud.cut(&vm, true).await?;
    let cut = async {
        sleep(CUT).await;
        node.cloud.cut(&vm, false).await
    };
    let (healed, moved) = tokio::join!(cut, traffic(&mut runtime, 16));
    healed?;
    moved.with_context(|| format!("during the cut\n{}", vm.log()))?;
    runtime.lives()?;
    let sent: Vec<u8> = vm.kata.requests().into_iter().filter_map(stdin).flatten().collect();
    let block = output("stdin", usize::try_from(BLOCK)?);
    ensure!(sent == block.repeat(32), "the container got {} bytes, or others", sent.len());
    shim.end(runtime).await?;
    ensure!(node.cloud.deleted() == std::slice::from_ref(&shim.id));
    node.forgets(&shim.id).await?;
    ensure!(node.caa.directory(&shim.id).join("apf.json").exists(), "CAA's file is gone");
    Ok(())
}

async fn traffic(runtime: &mut PodRuntime, blocks: usize) -> Result<()> {
    for _ in 0..blocks {
        runtime.exchange(BLOCK).await?;
    }
    runtime.copy_file(1024 * 1024).await
}

fn stdin(request: Request) -> Option<Vec<u8>> {
    match request {
        Request::WriteStdin(request) => Some(request.data),
        _ => None,
    }
}
