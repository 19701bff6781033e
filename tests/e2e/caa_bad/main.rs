//! Bad input of the way in of cloud-api-adaptor, with the real `serve`: it is refused with a reason, and a pod that runs at the
//! same time moves its bytes.

// clippy.toml allows these in `#[test]` functions; the helpers of a test program are tests as well.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod addresses;
mod dials;
mod files;
mod rules;
mod store;

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use secure_comms_tests::harness::caa_node::{CaaNode, NodeOptions};
use secure_comms_tests::harness::process::Child;
use secure_comms_tests::harness::scene::PATIENCE;
use secure_comms_tests::harness::shim::Shim;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;

const BLOCK: u32 = 32 * 1024;
/// How long CAA dials where a test waits for its end.
const SHORT: Duration = Duration::from_secs(30);

/// A node with a pod that moves bytes all the time.
struct Scene {
    node: CaaNode,
    serve: Child,
    bystander: Shim,
    stop: watch::Sender<bool>,
    traffic: JoinSet<Result<u64>>,
}

impl Scene {
    async fn new(proxy_timeout: Duration) -> Result<Self> {
        Self::on(CaaNode::new(NodeOptions { proxy_timeout, ..NodeOptions::default() }).await?).await
    }

    async fn on(node: CaaNode) -> Result<Self> {
        let serve = node.serve().await?;
        let bystander = node.shim("bystander")?;
        let mut runtime = bystander.run().await.with_context(|| serve.log())?;
        let (stop, stopped) = watch::channel(false);
        let mut traffic = JoinSet::new();
        let shim = bystander.clone();
        traffic.spawn(async move {
            let mut blocks = 0;
            while !*stopped.borrow() {
                runtime.exchange(BLOCK).await?;
                blocks += 1;
            }
            shim.end(runtime).await?;
            Ok(blocks)
        });
        Ok(Self { node, serve, bystander, stop, traffic })
    }

    /// Runs a part of a test; an error has the log of `serve`.
    async fn within<T>(&self, part: impl Future<Output = Result<T>>) -> Result<T> {
        part.await.with_context(|| self.serve.log())
    }

    /// Another pod starts, moves a block and ends.
    async fn another_pod_works(&self, name: &str) -> Result<()> {
        let shim = self.node.shim(name)?;
        let mut runtime = shim.run().await.context(name.to_owned())?;
        runtime.exchange(BLOCK).await?;
        shim.end(runtime).await?;
        self.node.forgets(&shim.id).await
    }

    /// Waits until `serve` has said this after a [`Child::mark`], of this pod if there is one.
    async fn says(&self, mark: usize, shim: Option<&Shim>, text: &str) -> Result<()> {
        // The log has a short form of the id.
        let of = shim.map(|shim| shim.id.get(..12).unwrap_or_default()).unwrap_or_default();
        let says = |line: &str| line.contains(of) && line.contains(text);
        self.serve.wait_from(mark, says, PATIENCE).await.map(drop)
    }

    /// The pod that ran all the time must have moved bytes to its end, and must leave nothing.
    async fn finish(mut self) -> Result<()> {
        self.stop.send_replace(true);
        let ended = timeout(PATIENCE, self.traffic.join_next()).await.context("the bystander hangs")?;
        let blocks = ended.context("it ended twice")??.with_context(|| self.serve.log())?;
        ensure!(blocks > 0, "the bystander moved nothing");
        self.node.forgets(&self.bystander.id).await
    }
}
