//! Demo: a pod from nothing to a kata agent that answers through the Kubernetes phase, step by step, and clients that do
//! not notice a cut of the line between worker node and VM. Agent and adaptor are the real binaries, as processes;
//! everything around them is simulated in this process, the line too.
//!
//! `cargo run --release --bin double [-- --netns]`

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use secure_comms_tests::demo::transfer::Transfer;
use secure_comms_tests::harness::pod_runtime::PodRuntime;
use secure_comms_tests::harness::process::{Child, Signal, ensure_built};
use secure_comms_tests::harness::scene::{
    PATIENCE, Scene, SceneOptions, client, endpoint, kata_socket_client, socket, up,
};
use secure_comms_tests::harness::vm::Vm;
use secure_comms_tests::simulators::kata::client::{EchoSession, bulk_both_ways};
use secure_comms_tests::simulators::kata_api::server::KataServer;
use secure_comms_tests::simulators::kbs::Kbs;
use secure_comms_tests::simulators::line::{How, Line};
use secure_comms_tests::usage::is_help;
use secure_comms_tunnel::netns;
use tokio::net::TcpStream;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{sleep, timeout};

const USAGE: &str =
    "double [--netns]: a pod from nothing to a kata agent that answers, step by step, with the real programs;
then the line between worker node and VM is cut, and no client notices

  --netns  the VM in network namespaces of its own; needs root

demo-vm and demo-node are the same in two terminals, to kill and start again.";
/// A step that takes longer is reported, and then as often.
const SLOW: Duration = Duration::from_secs(5);
/// Bytes that go each way through a tunnel, each of which is checked.
const BULK: u64 = 32 * 1024 * 1024;
/// Requests of [`SMALL`] bytes, answered one after the other.
const REQUESTS: u64 = 1000;
const SMALL: u64 = 200;
/// Bytes of the file that goes to the VM and back while the line is cut. A third of it is more than may be on the path.
const FILE: u64 = 192 * 1024 * 1024;
/// How long the line is cut: a third of what a runtime waits for the answer to a Check.
const CUT: Duration = Duration::from_secs(10);

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
                sleep(SLOW).await;
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
    let mut scene = Scene::new(SceneOptions::default()).await?;
    scene.kata_inbound = None;
    steps.done(format!(
        "KBS, guest components and kata agent are simulated; the KBS is at {}",
        scene.kbs.url()
    ));
    steps.next("waiting until the agent listens");
    let mut agent = scene.agent().await?;
    steps.done(format!("the VM is up: its agent (process {}) listens on {}", agent.pid(), scene.ssh));
    let line = Line::to(scene.ssh).await?;
    let adaptor = Child::spawn("adaptor", scene.adaptor_command(&[line.address()])?)?;
    let node_inbound = scene.node_inbound;
    let node_client = async || client(node_inbound).await;
    play(&mut steps, &Pod { scene, line }, &mut agent, adaptor, node_client).await
}

async fn in_namespaces() -> Result<()> {
    let mut steps = Steps::new("building the programs");
    ensure_built().await?;
    steps.done("agent-protocol-forwarder and secure-comms-adaptor are built");
    let mut scene = Scene::new(SceneOptions::default()).await?;
    steps.next("starting the VM's programs in network namespaces");
    let mut vm = Vm::boot().await?;
    scene.kata_inbound = None;
    (scene.agent_inbounds, scene.agent_outbounds) = (vm.inbounds.clone(), vm.outbounds.clone());
    scene.kata_socket.clone_from(&vm.kata_socket);
    steps.done(format!(
        "the VM is up in network namespaces of its own, podns included; its agent listens on {}",
        vm.ssh
    ));
    let line = Line::to(vm.ssh).await?;
    let adaptor = Child::spawn("adaptor", scene.adaptor_command(&[line.address()])?)?;
    let (pod, node_inbound) = (vm.pod.clone(), vm.node_inbound);
    let node_client = async || Ok(netns::connect(Some(&pod), node_inbound).await?);
    play(&mut steps, &Pod { scene, line }, &mut vm.agent, adaptor, node_client).await
}

/// What surrounds the two programs.
struct Pod {
    scene: Scene,
    /// Between worker node and VM.
    line: Line,
}

/// Both phases, real traffic, cuts of the line, and an orderly end.
async fn play(
    steps: &mut Steps,
    pod: &Pod,
    agent: &mut Child,
    mut adaptor: Child,
    node_client: impl AsyncFn() -> Result<TcpStream>,
) -> Result<()> {
    let result = async {
        phases(steps, &pod.scene.kbs, &pod.scene.pod, &adaptor).await?;
        traffic(steps, &adaptor, node_client).await?;
        cuts(steps, pod, &adaptor).await?;
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
    socket(adaptor, "KATAAGENT").await?;
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
    let kata = socket(adaptor, "KATAAGENT").await?;
    let mut session = EchoSession::open(kata_socket_client(&kata).await?).await?;
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
    let time = bulk_both_ways(kata_socket_client(&kata).await?, BULK, 7).await;
    report("KATAAGENT (worker node -> kata agent)", time)?;
    let time = bulk_both_ways(client(endpoint(adaptor, "VMSERVICE").await?).await?, BULK, 7).await;
    report("VMSERVICE (worker node -> VM)", time)?;
    report("NODESERVICE (VM -> worker node)", bulk_both_ways(node_client().await?, BULK, 7).await)
}

/// The line is cut in the middle of a transfer, without a notice to either end and then by a reset. No client may notice.
async fn cuts(steps: &mut Steps, pod: &Pod, adaptor: &Child) -> Result<()> {
    steps.next("connecting the clients that go on during a cut");
    // In the place of the echo server: one that speaks ttrpc.
    let mut kata = KataServer::start(&pod.scene.kata_socket).await?;
    let opened = Instant::now();
    let mut runtime = PodRuntime::start(&socket(adaptor, "KATAAGENT").await?).await?;
    let mut file = Transfer::begin(client(endpoint(adaptor, "VMSERVICE").await?).await?, FILE).await?;
    file.exceeds(FILE / 3).await?;
    steps.done(format!(
        "KATAAGENT: a runtime (ttrpc) has WaitProcess and 2 more calls open; VMSERVICE: {} of {} MiB are there and back",
        file.back() >> 20,
        FILE >> 20
    ));

    silence(steps, &pod.line, &runtime, &mut file).await?;
    file.exceeds(FILE / 3 * 2).await?;
    pod.line.end_all(How::Reset);
    let call = answered(check(&runtime)).await.context("the line was reset, and the runtime noticed it")?;
    ensure!(file.back() < FILE, "the transfer ended before the line was reset");
    steps.done(format!(
        "all connections of the line were reset: the runtime's Check was answered after {call:.2} s"
    ));

    steps.next("waiting for the end of the transfer");
    let sha256 = file.finish().await?;
    steps.done(format!("VMSERVICE: {FILE} bytes of {FILE}, sha256 equal: {sha256}"));
    runtime.lives()?;
    runtime.finish().await.context("the runtime's connection")?;
    kata.exited().await?;
    let open = opened.elapsed().as_secs_f64();
    steps.done(format!(
        "KATAAGENT: the runtime's connection is the same one; its calls, open for {open:.1} s, were answered"
    ));
    Ok(())
}

/// Nothing passes the line for some time, and what is under way is lost.
async fn silence(steps: &mut Steps, line: &Line, runtime: &PodRuntime, file: &mut Transfer) -> Result<()> {
    steps.next("the line between worker node and VM is cut");
    line.admit(0);
    line.hold_all();
    let check = check(runtime);
    sleep(CUT).await;
    ensure!(!check.is_finished(), "the runtime's Check was answered, or failed, while the line was cut");
    let stopped = file.back();
    ensure!(stopped < FILE, "the transfer ended while the line was cut");
    steps.done(format!(
        "the line was cut for {} s: nothing passed, and what was under way is lost; the clients wait",
        CUT.as_secs()
    ));
    steps.next("waiting for the clients to go on");
    // What the old connections held is never delivered.
    line.admit(usize::MAX);
    let back = Instant::now();
    let went_on = async { file.exceeds(stopped).await.map(|()| back.elapsed().as_secs_f64()) };
    let both: Result<_> = async { tokio::try_join!(answered(check), went_on) }.await;
    let (call, transfer) = both.context("the line is back, and a client noticed the cut")?;
    steps.done(format!(
        "the line is back: the runtime's Check was answered after {call:.2} s, the transfer went on after {transfer:.2} s"
    ));
    Ok(())
}

/// A call of the runtime that waits for its answer.
type Call = JoinHandle<Result<()>>;

/// Sends a Check, as a runtime does every 5 s.
fn check(runtime: &PodRuntime) -> Call {
    let runtime = runtime.calls().clone();
    tokio::spawn(async move { runtime.check().await.map(drop).context("Check") })
}

/// Waits for the answer; returns how long that took, in seconds.
async fn answered(call: Call) -> Result<f64> {
    let began = Instant::now();
    timeout(PATIENCE, call).await.context("Check hangs")???;
    Ok(began.elapsed().as_secs_f64())
}

async fn stop(steps: &mut Steps, agent: &mut Child, adaptor: &mut Child) -> Result<()> {
    steps.next("waiting until both processes have ended");
    for process in [adaptor, agent] {
        process.signal(Signal::SIGTERM)?;
        let status = process.wait_exit(PATIENCE).await?;
        if !status.success() {
            bail!("the {} ended with {status}", process.name());
        }
        // All clients have left.
        ensure!(!process.log().contains("did not end within"), "the {} had streams left", process.name());
    }
    steps.done("both processes ended cleanly on SIGTERM");
    Ok(())
}
