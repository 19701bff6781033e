//! A pod with everything open that must outlive its connections.

use std::time::Duration;

use crate::harness::pod_runtime::PodRuntime;
use crate::harness::scene::PATIENCE;
use crate::harness::session_pod::{RunningPod, TUNNELS};
use crate::harness::steady::Steady;
use crate::simulators::kata::client::bulk_both_ways;
use anyhow::{Context, Result, ensure};
use tokio::time::timeout;

/// A byte of a steady stream comes in each of these steps.
const STEP: Duration = Duration::from_millis(100);

/// A pod, its runtime with open calls, and a steady stream in each of the other tunnels.
#[derive(Debug)]
pub struct BusyPod {
    /// The pod.
    pub pod: RunningPod,
    /// Its runtime.
    pub runtime: PodRuntime,
    /// A stream of each of [`TUNNELS`].
    pub steady: Vec<Steady>,
    round: u64,
}

impl BusyPod {
    /// Opens everything; both lanes are connected then.
    ///
    /// # Errors
    /// If a call or a stream fails.
    pub async fn new(pod: RunningPod) -> Result<Self> {
        let runtime = pod.pod.runtime().await?;
        let mut busy = Self { pod, runtime, steady: Vec::new(), round: 0 };
        for (seed, tunnel) in (1..).zip(TUNNELS) {
            busy.steady.push(Steady::start(busy.pod.pod.client(tunnel).await?, STEP, seed).await?);
        }
        busy.works().await?;
        Ok(busy)
    }

    /// As [`BusyPod::new`], with a pod on a line.
    ///
    /// # Errors
    /// As there, and as [`RunningPod::on_a_line`].
    pub async fn on_a_line() -> Result<Self> {
        Self::new(RunningPod::on_a_line().await?).await
    }

    /// Checks that a new call and new streams work, and that no old one has ended.
    ///
    /// # Errors
    /// If one fails or hangs, with both logs.
    pub async fn works(&mut self) -> Result<()> {
        let done = self.calls_and_streams().await;
        done.with_context(|| self.pod.logs())
    }

    async fn calls_and_streams(&mut self) -> Result<()> {
        self.round += 1;
        self.runtime.exchange(3000).await?;
        for tunnel in TUNNELS {
            let client = self.pod.pod.client(tunnel).await?;
            let bulk = timeout(PATIENCE, bulk_both_ways(client, 5000, self.round)).await;
            bulk.with_context(|| format!("{tunnel:?} hangs"))?.with_context(|| format!("{tunnel:?}"))?;
        }
        self.steady.iter_mut().try_for_each(Steady::lives)
    }

    /// Checks that everything works, and then ends in good order, with each byte in its place.
    ///
    /// # Errors
    /// As [`BusyPod::works`].
    pub async fn finish(mut self) -> Result<()> {
        self.works().await?;
        let Self { pod, runtime, steady, .. } = self;
        let all = async {
            for steady in steady {
                ensure!(steady.finish().await? > 0, "a steady stream moved no byte");
            }
            runtime.finish().await
        };
        all.await.with_context(|| pod.logs())
    }
}
