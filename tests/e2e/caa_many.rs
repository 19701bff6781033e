//! Many pods of cloud-api-adaptor's on one node at once, and the end of the node's service among them.

// clippy.toml allows these in `#[test]` functions; the helpers of a test program are tests as well.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use secure_comms_tests::harness::caa_node::{CaaNode, NodeOptions};
use secure_comms_tests::harness::pod_runtime::PodRuntime;
use secure_comms_tests::harness::shim::Shim;
use tokio::task::JoinSet;

const PODS: usize = 50;
const BLOCK: u32 = 32 * 1024;

/// A pod that runs, and how long that took from `CreateVM`.
struct Running {
    shim: Shim,
    runtime: PodRuntime,
    took: Duration,
}

/// Starts pods at once and waits for all.
async fn run_all(node: &CaaNode, count: usize, name: &str) -> Result<Vec<Running>> {
    let mut starts = JoinSet::new();
    for number in 0..count {
        let shim = node.shim(&format!("{name}-{number}"))?;
        starts.spawn(async move {
            let begun = Instant::now();
            let runtime = shim.run().await.with_context(|| format!("{} {}", shim.name, shim.id))?;
            anyhow::Ok(Running { shim, runtime, took: begun.elapsed() })
        });
    }
    let mut running = Vec::new();
    while let Some(started) = starts.join_next().await {
        running.push(started??);
    }
    Ok(running)
}

/// Moves bytes through all pods at once.
async fn exchange_all(running: &mut [Running]) -> Result<()> {
    let each = running.iter_mut().map(|pod| async {
        for _ in 0..4 {
            pod.runtime.exchange(BLOCK).await.with_context(|| pod.shim.name.clone())?;
        }
        anyhow::Ok(())
    });
    futures_util::future::try_join_all(each).await.map(drop)
}

/// Ends all pods and waits until nothing is left of them.
async fn end_all(node: &CaaNode, running: Vec<Running>) -> Result<()> {
    let mut ends = JoinSet::new();
    let ids: Vec<_> = running.iter().map(|pod| pod.shim.id.clone()).collect();
    for pod in running {
        ends.spawn(async move { pod.shim.end(pod.runtime).await });
    }
    while let Some(ended) = ends.join_next().await {
        ended??;
    }
    for id in ids {
        node.forgets(&id).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_pods_that_start_at_once_all_run() -> Result<()> {
    let node = CaaNode::new(NodeOptions::default()).await?;
    let serve = node.serve().await?;
    let all = async {
        let mut running = run_all(&node, PODS, "pod").await?;
        let mut took: Vec<_> = running.iter().map(|pod| pod.took).collect();
        took.sort();
        println!("{PODS} pods: median {:?}, slowest {:?}", took[PODS / 2], took[PODS - 1]);
        exchange_all(&mut running).await?;
        ensure!(node.pods().await?.len() == PODS, "the API lists other pods");
        end_all(&node, running).await?;
        ensure!(node.pods().await?.is_empty(), "the API lists pods that have ended");
        anyhow::Ok(())
    };
    all.await.with_context(|| serve.log())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_of_serve_costs_starting_pods_nothing() -> Result<()> {
    // Longer than CAA waits between two dials.
    let node = CaaNode::new(NodeOptions { grace: 10, ..NodeOptions::default() }).await?;
    let mut serve = node.serve().await?;
    let up = run_all(&node, PODS / 2, "up").await.with_context(|| serve.log())?;
    let mut starting = Vec::new();
    for number in 0..PODS / 2 {
        let shim = node.shim(&format!("starting-{number}"))?;
        let agent = shim.create_vm().await?;
        let start = node.start_held(&shim).await.with_context(|| serve.log())?;
        starting.push((shim, agent, start));
    }
    serve.kill9().await?;
    // What a kill costs: each stream of the runtime's ends, and the runtime ends its pod.
    let mut ended = Vec::new();
    for pod in up {
        pod.runtime.dies().await?;
        ended.push(pod.shim);
    }
    let serve = node.serve().await?;
    let rest = async {
        for (shim, ..) in &starting {
            node.cloud.boot(&shim.id).await?;
        }
        let mut running = Vec::new();
        for (shim, agent, start) in starting {
            start.started().await.with_context(|| shim.name.clone())?;
            let runtime = shim.connect(&agent).await?;
            running.push(Running { shim, runtime, took: Duration::ZERO });
        }
        exchange_all(&mut running).await?;
        for shim in ended {
            shim.stop_vm().await?;
            node.forgets(&shim.id).await?;
        }
        ensure!(node.pods().await?.len() == PODS / 2, "the API lists other pods");
        exchange_all(&mut running).await?;
        end_all(&node, running).await
    };
    rest.await.with_context(|| serve.log())
}
