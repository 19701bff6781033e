//! Measures the agent's resources against a budget: `footprint BUDGET-FILE` exits with 1 if any figure is over it.
//!
//! Each figure is of a fresh agent process; `SECURE_COMMS_BIN_DIR` selects the agent, as in the tests. `cargo run` builds
//! an ordinary one; image/build-agent builds the one that ships, which `tests/run footprint` measures.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use secure_comms_tests::harness::process::{Child, ensure_built};
use secure_comms_tests::harness::scene::{Scene, SceneOptions, endpoint, kata_client, up};
use secure_comms_tests::simulators::kata::client::{EchoSession, bulk_both_ways};
use secure_comms_tests::simulators::kata::framed::Framed;
use secure_comms_tests::usage::is_help;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

const STREAMS: u64 = 300;
const BULK_STREAMS: u64 = 16;
/// Bytes that each bulk stream moves in either direction: enough that every window has grown.
const BULK: u64 = 16 << 20;

/// The figures, by their names in the budget file.
type Figures = BTreeMap<String, u64>;

#[tokio::main]
async fn main() -> ExitCode {
    if is_help(
        "footprint BUDGET-FILE: measures the agent's resources against a budget (image/budget); exits with 1 if one is over it",
    ) {
        return ExitCode::SUCCESS;
    }
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let [budget] = arguments.as_slice() else {
        eprintln!("footprint: expected one argument, the budget file (image/budget)");
        return ExitCode::from(2);
    };
    match run(Path::new(budget)).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!(
                "footprint: over the budget: make the agent smaller, or raise the budget in {} with a reason",
                budget.display()
            );
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("footprint: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(budget: &Path) -> Result<bool> {
    let text = std::fs::read_to_string(budget).with_context(|| format!("reading {}", budget.display()))?;
    let mut budget = parse(&text).with_context(|| format!("reading {}", budget.display()))?;
    // The sizes of the other programs, which the step static of tests/run checks.
    budget.retain(|name, _| name == "binary_bytes" || !name.ends_with("_bytes"));
    let found = measure().await?;
    ensure!(
        budget.keys().eq(found.keys()),
        "the budget names {:?}, measured were {:?}",
        budget.keys(),
        found.keys()
    );
    let mut within = true;
    println!("{:<24} {:>12} {:>12}", "figure", "measured", "budget");
    for (name, value) in found {
        let limit = budget.get(&name).copied().unwrap_or_default();
        let verdict = if value > limit { "  OVER" } else { "" };
        within &= value <= limit;
        println!("{name:<24} {value:>12} {limit:>12}{verdict}");
    }
    Ok(within)
}

/// Lines `name number`; `#` begins a comment.
fn parse(text: &str) -> Result<Figures> {
    let mut figures = Figures::new();
    for line in text.lines().map(|line| line.split('#').next().unwrap_or_default().trim()) {
        if line.is_empty() {
            continue;
        }
        let (name, value) = line.split_once(' ').with_context(|| format!("{line:?} is not 'name number'"))?;
        let value = value.trim().parse().with_context(|| format!("{line:?}: not a number"))?;
        if figures.insert(name.to_owned(), value).is_some() {
            bail!("{name} is listed twice");
        }
    }
    Ok(figures)
}

async fn measure() -> Result<Figures> {
    let agent = &ensure_built().await?.agent;
    let size = std::fs::metadata(agent).with_context(|| format!("looking at {}", agent.display()))?.len();
    let mut figures = Figures::from([("binary_bytes".to_owned(), size)]);
    let mut note = |name: &str, value: u64| {
        figures.insert(name.to_owned(), value);
    };

    let pod = Pod::up().await?;
    note("idle_kib", pod.agent.rss_kib()?);
    let streams = pod.streams(STREAMS).await?;
    note("streams_300_kib", pod.agent.rss_kib()?);
    note("threads", pod.agent.threads()?);
    drop(streams);

    let pod = Pod::up().await?;
    pod.bulk().await?;
    note("bulk_16_peak_kib", pod.agent.peak_kib()?);
    Ok(figures)
}

/// A pod in the Kubernetes phase.
struct Pod {
    agent: Child,
    adaptor: Child,
    _scene: Scene,
}

impl Pod {
    async fn up() -> Result<Self> {
        let scene = Scene::new(SceneOptions::default()).await?;
        let agent = scene.agent().await?;
        let adaptor = scene.adaptor()?;
        up(&adaptor).await?;
        let pod = Self { agent, adaptor, _scene: scene };
        // Connected means that traffic passes.
        drop(pod.streams(1).await?);
        Ok(pod)
    }

    /// Opens streams to the kata agent, each of which has been answered once.
    async fn streams(&self, count: u64) -> Result<Vec<EchoSession<Framed<TcpStream>>>> {
        let kata = endpoint(&self.adaptor, "KATAAGENT").await?;
        let mut streams = Vec::new();
        for seed in 0..count {
            let mut stream = EchoSession::open(kata_client(kata).await?).await?;
            stream.roundtrip(200, seed).await.with_context(|| format!("stream {seed}"))?;
            streams.push(stream);
        }
        Ok(streams)
    }

    /// Moves data both ways on all streams at once.
    async fn bulk(&self) -> Result<()> {
        let kata = endpoint(&self.adaptor, "KATAAGENT").await?;
        let mut streams = JoinSet::new();
        for seed in 0..BULK_STREAMS {
            streams.spawn(async move { bulk_both_ways(kata_client(kata).await?, BULK, seed).await });
        }
        while let Some(stream) = streams.join_next().await {
            stream??;
        }
        Ok(())
    }
}
