//! Demo: a pod from nothing to a kata agent that answers through the Kubernetes phase, step by step. Agent and adaptor
//! are the real binaries, as processes; everything around them is simulated in this process.
//!
//! `cargo run --release --bin double [-- --netns]`

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use secure_comms_tests::harness::process::{Child, Signal, ensure_built};
use secure_comms_tests::harness::scene::{PATIENCE, Scene, SceneOptions, client, endpoint, kata_client, up};
use secure_comms_tests::harness::vm::Vm;
use secure_comms_tests::simulators::kata::client::{EchoSession, bulk_both_ways};
use secure_comms_tests::simulators::kbs::Kbs;
use secure_comms_tests::usage::is_help;
use secure_comms_tunnel::netns;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

const USAGE: &str =
    "double [--netns]: a pod from nothing to a kata agent that answers, step by step, with the real programs

  --netns  the VM in network namespaces of its own; needs root

demo-vm and demo-node are the same in two terminals, to kill and start again.";
/// A step that takes longer is reported, and then as often.
const SLOW: Duration = Duration::from_secs(5);
/// Bytes that go each way through a tunnel, each of which is checked.
const BULK: u64 = 32 * 1024 * 1024;
/// Requests of [`SMALL`] bytes, answered one after the other.
const REQUESTS: u64 = 1000;
const SMALL: u64 = 200;

/// Prints each step, and how long it took.
struct Steps {
    began: Instant,
    last: Instant,
    /// Reports that the step goes on.
    progress: JoinSet<()>,
}

impl Steps {
    /// `next` is what the first step waits for.
    fn new(next: &'static str) -> Self {
        let mut steps = Self { began: Instant::now(), last: Instant::now(), progress: JoinSet::new() };
        steps.next(next);
        steps
    }

    /// Says what is waited for, if it takes long.
    fn next(&mut self, what: &'static str) {
        let began = self.began;
        self.progress.abort_all();
        self.progress.spawn(async move {
            loop {
                tokio::time::sleep(SLOW).await;
                println!("{:>10.1} ms {:>13}  ... {what}", began.elapsed().as_secs_f64() * 1e3, "");
            }
        });
    }

    fn done(&mut self, what: impl std::fmt::Display) {
        let (now, ms) = (Instant::now(), |time: Duration| time.as_secs_f64() * 1e3);
        println!("{:>10.1} ms {:>+10.1} ms  {what}", ms(now - self.began), ms(now - self.last));
        self.last = now;
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    if is_help(USAGE) {
        return ExitCode::SUCCESS;
    }
    let netns = match std::env::args().skip(1).collect::<Vec<_>>().as_slice() {
        [] => false,
        [flag] if flag == "--netns" => true,
        _ => {
            eprintln!("double: unknown arguments; see --help");
            return ExitCode::from(2);
        }
    };
    println!(
        "Building agent-protocol-forwarder and secure-comms-adaptor, if needed: this takes minutes the first time."
    );
    println!("{:>13} {:>13}  what happened", "since start", "this step");
    let result = if netns { in_namespaces().await } else { in_one_namespace().await };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("double: failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn in_one_namespace() -> Result<()> {
    let mut steps = Steps::new("building the programs");
    ensure_built().await?;
    steps.done("agent-protocol-forwarder and secure-comms-adaptor are built");
    steps.next("starting the simulators");
    let scene = Scene::new(SceneOptions::default()).await?;
    steps.done(format!(
        "KBS, guest components and kata agent are simulated; the KBS is at {}",
        scene.kbs.url()
    ));
    steps.next("waiting until the agent listens");
    let mut agent = scene.agent().await?;
    steps.done(format!("the VM is up: its agent (process {}) listens on {}", agent.pid(), scene.ssh));
    let adaptor = scene.adaptor()?;
    let node_client = async || client(scene.node_inbound).await;
    play(&mut steps, &scene, &mut agent, adaptor, node_client).await
}

async fn in_namespaces() -> Result<()> {
    let mut steps = Steps::new("building the programs");
    ensure_built().await?;
    steps.done("agent-protocol-forwarder and secure-comms-adaptor are built");
    let scene = Scene::new(SceneOptions::default()).await?;
    steps.next("starting the VM's programs in network namespaces");
    let mut vm = Vm::boot().await?;
    steps.done(format!(
        "the VM is up in network namespaces of its own, podns included; its agent listens on {}",
        vm.ssh
    ));
    let adaptor = Child::spawn("adaptor", scene.adaptor_command(&[vm.ssh])?)?;
    let (pod, node_inbound) = (vm.pod.clone(), vm.node_inbound);
    let node_client = async || Ok(netns::connect(Some(&pod), node_inbound).await?);
    play(&mut steps, &scene, &mut vm.agent, adaptor, node_client).await
}

/// Both phases, real traffic, and an orderly end.
async fn play(
    steps: &mut Steps,
    scene: &Scene,
    agent: &mut Child,
    mut adaptor: Child,
    node_client: impl AsyncFn() -> Result<TcpStream>,
) -> Result<()> {
    let result = async {
        phases(steps, &scene.kbs, &scene.pod, &adaptor).await?;
        traffic(steps, &adaptor, node_client).await?;
        steps.done(format!("the agent's memory, connected and idle: {} KiB", agent.rss_kib()?));
        stop(steps, agent, &mut adaptor).await
    };
    let result = result.await;
    if result.is_err() {
        eprintln!("--- agent ---\n{}--- adaptor ---\n{}", agent.log(), adaptor.log());
    }
    result
}

async fn phases(steps: &mut Steps, kbs: &Kbs, pod: &str, adaptor: &Child) -> Result<()> {
    let resource = format!("default/pp-{pod}/keys");
    // Logged once the pod is prepared.
    steps.next("waiting until the pod's keys are at the KBS");
    endpoint(adaptor, "KATAAGENT").await?;
    ensure!(kbs.resource(&resource).is_some(), "the pod's keys are not at the KBS");
    steps.done("prepare: the adaptor made the pod's keys and put them at the KBS");
    steps.next("waiting for the Attestation phase");
    adaptor.wait_for_text("attestation: connected", PATIENCE).await?;
    steps.done("Attestation: the adaptor is connected; neither end is authenticated");
    steps.next("waiting until the guest has its keys");
    kbs.wait_for_request(|request| request.method == "GET" && request.path.ends_with("/keys"), PATIENCE)
        .await?;
    ensure!(kbs.attestations() >= 1, "the guest got keys without attesting");
    steps.done(format!(
        "the guest attested {} times through the KBS tunnel and got the keys",
        kbs.attestations()
    ));
    steps.next("waiting for the Kubernetes phase");
    up(adaptor).await?;
    steps.done("Kubernetes: both ends are authenticated with those keys");
    Ok(())
}

async fn traffic(
    steps: &mut Steps,
    adaptor: &Child,
    node_client: impl AsyncFn() -> Result<TcpStream>,
) -> Result<()> {
    steps.next("sending bytes through the tunnels");
    let kata = endpoint(adaptor, "KATAAGENT").await?;
    let mut session = EchoSession::open(kata_client(kata).await?).await?;
    let mut times = Vec::new();
    for seed in 0..REQUESTS {
        times.push(session.roundtrip(SMALL, seed).await?);
    }
    session.finish().await?;
    times.sort_unstable();
    let at = |share: usize| times.get(times.len() * share / 100).copied().unwrap_or_default();
    steps.done(format!(
        "KATAAGENT: {REQUESTS} requests of {SMALL} bytes; p50 {:.0?}, p99 {:.0?}",
        at(50),
        at(99)
    ));
    let mut report = |name: &str, time: Result<Duration>| {
        let time = time.with_context(|| format!("tunnel {name}"))?;
        let rate = BULK as f64 / (1 << 20) as f64 / time.as_secs_f64();
        steps.done(format!(
            "{name}: {} MiB each way, every byte checked; {rate:.0} MiB/s each way",
            BULK >> 20
        ));
        anyhow::Ok(())
    };
    let time = bulk_both_ways(kata_client(kata).await?, BULK, 7).await;
    report("KATAAGENT (worker node -> kata agent)", time)?;
    let time = bulk_both_ways(client(endpoint(adaptor, "VMSERVICE").await?).await?, BULK, 7).await;
    report("VMSERVICE (worker node -> VM)", time)?;
    report("NODESERVICE (VM -> worker node)", bulk_both_ways(node_client().await?, BULK, 7).await)
}

async fn stop(steps: &mut Steps, agent: &mut Child, adaptor: &mut Child) -> Result<()> {
    steps.next("waiting until both processes have ended");
    for process in [adaptor, agent] {
        process.signal(Signal::SIGTERM)?;
        let status = process.wait_exit(PATIENCE).await?;
        if !status.success() {
            bail!("the {} ended with {status}", process.name());
        }
    }
    steps.done("both processes ended cleanly on SIGTERM");
    Ok(())
}
