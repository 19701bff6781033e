//! The node's service with many pods of cloud-api-adaptor's: how soon they start and are resumed, and what the service costs.
//!
//! `serve`, agents and kata agents are real programs, as in the end-to-end tests; the VMs boot at once, so the times are what
//! Secure Comms adds. Everything runs on this machine, so the agents share the processors with the service.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::bench::control::{self, Control, Pair};
use crate::harness::caa_node::{CaaNode, NodeOptions};
use crate::harness::cloud::Vm;
use crate::harness::pod_runtime::PodRuntime;
use crate::harness::process::Child;
use crate::harness::scene::PATIENCE;
use crate::harness::shim::Shim;
use crate::simulators::kata_api::server::Request;

/// Pause between two requests to the API.
const API_EVERY: Duration = Duration::from_millis(50);
/// How long the service is watched while its pods are idle.
const IDLE: Duration = Duration::from_secs(30);
/// How long the service keeps a pod that CAA does not dial again, in seconds: longer than a measurement.
const GRACE: u32 = 300;
/// Clock ticks of `/proc/<pid>/stat` in a second.
const TICKS: f64 = 100.0;
/// Length of a cut of a pod that flaps, and of the time between two.
const FLAP: Duration = Duration::from_millis(300);
/// Rounds, and the checks that are timed in each.
const CHECKS: usize = 1000;
const ROUNDS: usize = 3;
/// From a kata agent's answer to our Check to `StartVM`'s answer, eleven processes wake each other: ten of these, as
/// exchanges with the control process.
const RELEASE: usize = 5;
/// Bytes that each pod moves once it is up.
const BLOCK: u32 = 32 * 1024;

/// Number of pods.
#[derive(Clone, Copy, Debug)]
pub struct Node {
    /// Pods that start at once.
    pub pods: usize,
}

/// As many as a node has at most.
pub const DEFAULT: Node = Node { pods: 250 };

/// What was measured; times are sorted.
#[derive(Debug)]
pub struct Figures {
    pods: usize,
    usable: Vec<Duration>,
    released: Pair,
    api: Pair,
    /// Processor time of the service for the starts.
    computed: Duration,
    rss_kib: u64,
    peak_kib: u64,
    idle: f64,
    resumed: Duration,
    neighbours: Neighbours,
}

/// Checks of one pod, while another one does this.
#[derive(Debug, Default)]
struct Neighbours {
    quiet: Vec<Duration>,
    flaps: Vec<Duration>,
    floods: Vec<Duration>,
    /// As `floods`, by a pod of another service.
    floods_elsewhere: Vec<Duration>,
}

/// A pod that runs.
struct Running {
    shim: Shim,
    runtime: PodRuntime,
    usable: Duration,
    released: Duration,
}

impl Node {
    /// Starts the pods at once, lets them be idle, kills the service and waits until it has resumed all.
    ///
    /// # Errors
    /// If a pod does not start, or is not resumed, or a byte is wrong.
    pub async fn run(self) -> Result<Figures> {
        ensure!(self.pods > 1, "a pod and its neighbour are wanted at least");
        let node = Arc::new(CaaNode::new(NodeOptions { grace: GRACE, ..NodeOptions::default() }).await?);
        let mut serve = node.serve().await?;
        let measured = self.measure(&node, &mut serve).await;
        measured.with_context(|| serve.log())
    }

    async fn measure(self, node: &Arc<CaaNode>, serve: &mut Child) -> Result<Figures> {
        let control = Control::start()?;
        let (stop, stopped) = watch::channel(false);
        let (api, idle) = (node.path("run/adaptor.sock"), control.socket());
        let asked = tokio::task::spawn_blocking({
            let stopped = stopped.clone();
            move || ask(&api, &idle, &stopped)
        });
        let exchanged = tokio::spawn(exchange(control.socket(), stopped));
        let before = ticks(serve.pid())?;
        let mut running = self.start(node).await?;
        let computed = Duration::from_secs_f64((ticks(serve.pid())? - before) / TICKS);
        stop.send_replace(true);
        let mut api = asked.await??;
        let mut released = Pair { service: Vec::new(), control: exchanged.await?? };
        let mut exchanges = JoinSet::new();
        for mut pod in running.drain(..) {
            exchanges.spawn(async move { pod.runtime.exchange(BLOCK).await.map(|()| pod) });
        }
        while let Some(exchanged) = exchanges.join_next().await {
            running.push(exchanged??);
        }
        let (before, begun) = (ticks(serve.pid())?, Instant::now());
        sleep(IDLE).await;
        let idle = (ticks(serve.pid())? - before) / TICKS / begun.elapsed().as_secs_f64();
        let (rss_kib, peak_kib) = (serve.rss_kib()?, serve.peak_kib()?);
        let neighbours = Neighbours::measure(node, &mut running).await?;
        serve.kill9().await?;
        let begun = Instant::now();
        *serve = node.serve().await?;
        self.all_up(node).await?;
        let resumed = begun.elapsed();
        let mut usable: Vec<_> = running.iter().map(|pod| pod.usable).collect();
        released.service = running.iter().map(|pod| pod.released).collect();
        let pairs =
            [&mut released, &mut api].into_iter().flat_map(|pair| [&mut pair.service, &mut pair.control]);
        for times in pairs.chain([&mut usable]) {
            times.sort_unstable();
        }
        for pod in running {
            // The runtime has given it up.
            pod.shim.stop_vm().await?;
        }
        Ok(Figures {
            pods: self.pods,
            usable,
            released,
            api,
            computed,
            rss_kib,
            peak_kib,
            idle,
            resumed,
            neighbours,
        })
    }

    async fn start(self, node: &Arc<CaaNode>) -> Result<Vec<Running>> {
        let mut starts = JoinSet::new();
        for number in 0..self.pods {
            let (shim, node) = (node.shim(&format!("pod-{number}"))?, Arc::clone(node));
            starts.spawn(async move {
                let begun = Instant::now();
                let agent = shim.create_vm().await?;
                let starting = node.start(&shim).await?;
                let vm = node.cloud.vm(&shim.id)?;
                let confirmed = async {
                    // The Check of the service itself, which confirms the pod.
                    vm.kata.wait_for(|request| matches!(request, Request::Check(_)).then_some(())).await;
                    Instant::now()
                };
                let (confirmed, started) = tokio::join!(confirmed, starting.started());
                started.with_context(|| shim.name.clone())?;
                let released = confirmed.elapsed();
                let runtime = shim.connect(&agent).await?;
                anyhow::Ok(Running { shim, runtime, usable: begun.elapsed(), released })
            });
        }
        let mut running = Vec::new();
        while let Some(started) = starts.join_next().await {
            running.push(started??);
        }
        Ok(running)
    }

    async fn all_up(self, node: &CaaNode) -> Result<()> {
        let all = async {
            loop {
                let pods = node.pods().await?;
                let is_up = |pod: &&Value| pod.get("phase").and_then(Value::as_str) == Some("Up");
                if pods.iter().filter(is_up).count() == self.pods {
                    return anyhow::Ok(());
                }
                sleep(API_EVERY).await;
            }
        };
        timeout(PATIENCE, all).await.context("not all pods are resumed")?
    }
}

impl Neighbours {
    /// Disturbs the second pod, and times the first.
    async fn measure(node: &CaaNode, running: &mut [Running]) -> Result<Self> {
        let [victim, other, ..] = running else { bail!("there are no two pods") };
        let vm = node.cloud.vm(&other.shim.id)?;
        let elsewhere = CaaNode::new(NodeOptions { grace: GRACE, ..NodeOptions::default() }).await?;
        let serve = elsewhere.serve().await?;
        let mut stranger = start_one(&elsewhere).await.with_context(|| serve.log())?;
        let mut measured = Self::default();
        for _ in 0..ROUNDS {
            measured.quiet.extend(checks(&victim.runtime).await?);
            measured.flaps.extend(tokio::select! {
                error = flap(node, &vm) => return Err(error),
                checked = checks(&victim.runtime) => checked?,
            });
            // A cut that was under way may not be there.
            let _ = node.cloud.cut(&vm, false).await;
            measured.floods_elsewhere.extend(tokio::select! {
                error = flood(&mut stranger) => return Err(error),
                checked = checks(&victim.runtime) => checked?,
            });
            measured.floods.extend(tokio::select! {
                error = flood(&mut other.runtime) => return Err(error),
                checked = checks(&victim.runtime) => checked?,
            });
        }
        let Self { quiet, flaps, floods, floods_elsewhere } = &mut measured;
        for times in [quiet, flaps, floods, floods_elsewhere] {
            times.sort_unstable();
        }
        Ok(measured)
    }
}

/// Starts a pod.
async fn start_one(node: &CaaNode) -> Result<PodRuntime> {
    let shim = node.shim("neighbour")?;
    let agent = shim.create_vm().await?;
    node.start(&shim).await?.started().await?;
    shim.connect(&agent).await
}

/// Cuts a VM off again and again, until that fails.
async fn flap(node: &CaaNode, vm: &Vm) -> anyhow::Error {
    let cut_once = async || {
        node.cloud.cut(vm, true).await?;
        sleep(FLAP).await;
        node.cloud.cut(vm, false).await?;
        sleep(FLAP).await;
        anyhow::Ok(())
    };
    loop {
        if let Err(error) = cut_once().await {
            return error;
        }
    }
}

/// Moves bytes all the time, until that fails.
async fn flood(runtime: &mut PodRuntime) -> anyhow::Error {
    loop {
        if let Err(error) = runtime.exchange(BLOCK).await {
            return error;
        }
    }
}

/// The times of some checks.
async fn checks(runtime: &PodRuntime) -> Result<Vec<Duration>> {
    let mut times = Vec::with_capacity(CHECKS);
    for _ in 0..CHECKS {
        let begun = Instant::now();
        runtime.calls().check().await.context("Check")?;
        times.push(begun.elapsed());
    }
    Ok(times)
}

/// Lists the pods again and again, from a thread of its own: the tasks of this program would only measure its own queue.
fn ask(api: &Path, control: &Path, stopped: &watch::Receiver<bool>) -> Result<Pair> {
    let mut times = Pair::default();
    while !*stopped.borrow() {
        let (service, idle) = control::ask(api, control)?;
        times.service.push(service);
        times.control.push(idle);
        std::thread::sleep(API_EVERY);
    }
    Ok(times)
}

/// Exchanges bytes with the control process again and again; returns how long each took.
async fn exchange(control: PathBuf, stopped: watch::Receiver<bool>) -> Result<Vec<Duration>> {
    let mut times = Vec::new();
    while !*stopped.borrow() {
        times.push(control::exchange(&control, RELEASE).await?);
        sleep(API_EVERY).await;
    }
    Ok(times)
}

/// Processor time that a process has used.
fn ticks(pid: i32) -> Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).context("reading its processor time")?;
    // The name, in parentheses, may have spaces. Its user and system time are the fields 14 and 15.
    let (_, fields) = stat.rsplit_once(')').context("no name in its status")?;
    let times = fields.split_whitespace().skip(11).take(2).map(str::parse::<f64>);
    Ok(times.sum::<Result<f64, _>>()?)
}

/// A value of sorted ones: of `part` in a hundred, the greatest.
fn percentile(sorted: &[Duration], part: usize) -> Duration {
    let at = (sorted.len() * part).div_ceil(100).saturating_sub(1);
    sorted.get(at).copied().unwrap_or_default()
}

impl Figures {
    /// The table.
    #[must_use]
    pub fn table(&self) -> String {
        let mut text = format!("## node: {} pods\n\n| measured | value | goal |\n|---|---|---|\n", self.pods);
        let usable = |part| percentile(&self.usable, part);
        let slowest = self.usable.last().copied().unwrap_or_default();
        let spread = slowest.as_secs_f64() / usable(50).as_secs_f64().max(f64::MIN_POSITIVE);
        let rows = [
            ("CreateVM to usable, p50 and p99", format!("{:.2?}, {:.2?}", usable(50), usable(99)), ""),
            ("slowest start / median", format!("{spread:.2}"), "<= 3"),
            (
                "our Check at the kata agent to StartVM's answer, p50 and p99",
                pair(&self.released.service),
                "<= 20 ms",
            ),
            (
                "the same number of wake-ups with a process that does nothing",
                pair(&self.released.control),
                "",
            ),
            ("API meanwhile, p50 and p99", pair(&self.api.service), "p99 < 10 ms"),
            ("an answer of that size of a process that does nothing", pair(&self.api.control), ""),
            ("processor time of the service for the starts", format!("{:.2?}", self.computed), ""),
            (
                "resident memory, and its peak",
                format!("{} KiB, {} KiB", self.rss_kib, self.peak_kib),
                "<= 65536 KiB",
            ),
            ("idle, of a core", format!("{:.2} %", self.idle * 100.0), "<= 1 %"),
            ("Check of a pod, p50 and p99", pair(&self.neighbours.quiet), ""),
            ("the same while a neighbour flaps", pair(&self.neighbours.flaps), "p99 + 10 %"),
            ("the same while a pod of another service floods", pair(&self.neighbours.floods_elsewhere), ""),
            ("the same while a neighbour floods", pair(&self.neighbours.floods), "p99 + 10 %"),
            ("all resumed after kill -9", format!("{:.2?}", self.resumed), "<= 10 s"),
        ];
        for (what, value, goal) in rows {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "| {what} | {value} | {goal} |");
        }
        text
    }
}

fn pair(times: &[Duration]) -> String {
    format!("{:.2?}, {:.2?}", percentile(times, 50), percentile(times, 99))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_one_of_the_values() {
        let times: Vec<_> = (1..=200).map(Duration::from_millis).collect();
        assert_eq!(percentile(&times, 50), Duration::from_millis(100));
        assert_eq!(percentile(&times, 99), Duration::from_millis(198));
        assert_eq!(percentile(&times[..1], 99), Duration::from_millis(1));
        assert_eq!(percentile(&[], 99), Duration::ZERO);
    }

    #[test]
    fn this_process_has_used_processor_time() {
        assert!(ticks(i32::try_from(std::process::id()).unwrap()).unwrap() >= 0.0);
    }
}
