//! One pod lifetime: the pod comes up, faults are injected, it comes up again; then all is checked.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use futures_util::future::join_all;
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{interval, sleep, timeout};

use super::attacker;
use super::fault::inject_fault;
use super::pod_scene::{PodScene, Route};
use super::resources::Resources;
use super::script::{Fault, Hit, Script, Side};
use super::secrets::Secrets;
use super::traffic::{Seen, Traffic, request};
use crate::harness::process::Binaries;

/// Goal for the recovery of a pod once all faults are over.
pub const GOAL: Duration = Duration::from_secs(10);
/// Limit for the recovery. The longest timers of the protocol are 20 s (`SILENCE`, `KBS_FIRST_BYTE`), and the
/// backoff is up to 5 s; the rest allows for a machine that runs six lifetimes at a time.
pub const BOUND: Duration = Duration::from_secs(45);
/// Limit for a whole lifetime.
const LIFETIME: Duration = Duration::from_secs(240);
/// Limit for the first start, before any fault, on a busy machine.
const FIRST: Duration = Duration::from_secs(60);
/// Interval between two attempts to reach the kata agent.
const PROBE: Duration = Duration::from_millis(100);
/// Connections that must work, one after the other, once all faults are over.
const CALM: u64 = 10;
/// Time in which no byte may arrive at a client that must not be served.
const LISTEN: Duration = Duration::from_millis(300);
/// Limits for an idle process: twice its need. Blocking threads of tokio end after 10 s without work.
const AGENT: Resources = Resources { files: 40, threads: 2, rss_kib: 16 * 1024 };
const ADAPTOR: Resources = Resources { files: 40, threads: 32, rss_kib: 64 * 1024 };
/// Time in which connections that clients have left must be closed at both ends.
const IDLE: Duration = Duration::from_secs(20);

/// Result of a lifetime.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// What the seed decided.
    pub script: Script,
    /// Time from the end of the last fault until the kata agent answered.
    pub recovery: Option<Duration>,
    /// What the clients saw.
    pub seen: Seen,
    /// Connections that ended early, by what may have ended them.
    pub ended: Ended,
    /// What the agent held at the end.
    pub agent: Resources,
    /// What the adaptor held at the end.
    pub adaptor: Resources,
    /// Violated requirements.
    pub violations: Vec<String>,
    /// Logs of the processes.
    pub logs: String,
}

/// Connections of clients that ended early in a lifetime.
#[derive(Clone, Debug, Default)]
pub struct Ended {
    /// Those that no fault excuses but one of the network, with what their clients saw: none is allowed.
    pub by_network: Vec<String>,
    /// Those that ended after a fault that ends processes or servers, or before the pod was up.
    pub by_others: u64,
}

impl Ended {
    /// Divides the connections that ended early in a lifetime whose faults began at `began`.
    fn of(script: &Script, began: Instant, seen: &Seen) -> Self {
        let excused_from = script.spares_streams_until().map(|at| began + at);
        let mut ended = Self::default();
        for broken in &seen.broken {
            if excused_from.is_some_and(|from| broken.at >= from) {
                ended.by_others += 1;
            } else {
                ended.by_network.push(broken.what.clone());
            }
        }
        ended
    }
}

/// Runs one lifetime with these programs.
pub async fn live(script: Script, binaries: Binaries) -> Outcome {
    let mut outcome = Outcome {
        script: script.clone(),
        recovery: None,
        seen: Seen::default(),
        ended: Ended::default(),
        agent: Resources::default(),
        adaptor: Resources::default(),
        violations: Vec::new(),
        logs: String::new(),
    };
    let ended = timeout(LIFETIME, lived(&script, &binaries, &mut outcome)).await;
    match ended {
        Ok(Ok(())) => {}
        Ok(Err(error)) => outcome.violations.push(format!("{error:#}")),
        Err(_) => {
            outcome.violations.push(format!("the lifetime did not end within {} s", LIFETIME.as_secs()))
        }
    }
    outcome
}

async fn lived(script: &Script, binaries: &Binaries, outcome: &mut Outcome) -> Result<()> {
    let scene = PodScene::new(script, binaries).await?;
    let lived = run_faults(&scene, script, outcome).await;
    let examined = if lived.is_ok() { examine(&scene, outcome).await } else { Ok(()) };
    let secrets = secrets(&scene)?;
    for side in [Side::Agent, Side::Adaptor] {
        let found = scene.program(side).pid().map(|pid| secrets.in_process(pid));
        outcome.violations.extend(found.into_iter().flatten().map(|what| format!("{side:?}: {what}")));
    }
    let allowed = [scene.store.path(), scene.state.path(), &scene.directory().join("kbs-admin.pem")];
    let in_files = secrets.in_files(scene.directory(), &allowed);
    let PodScene { agent, adaptor, route, .. } = scene;
    for (side, program) in [(Side::Agent, agent), (Side::Adaptor, adaptor)] {
        let past = program.stop().await.with_context(|| format!("stopping the {side:?}"))?;
        outcome.violations.extend(past.own_ends.iter().filter_map(|status| {
            let excused = status.code() == Some(1) && script.has(|fault| keeps_from_starting(fault, side));
            (!excused).then(|| format!("the {side:?} ended unexpectedly: {status}"))
        }));
        for log in past.logs {
            let found = secrets.in_text(log.as_bytes());
            outcome.violations.extend(found.iter().map(|what| format!("{side:?}: {what} in its log")));
            outcome.logs.push_str(&log);
            outcome.logs.push('\n');
        }
    }
    drop(route);
    outcome.violations.extend(in_files?);
    lived.and(examined)
}

/// Faults in which a starting program reports why it can't start, and ends; a supervisor restarts it.
fn keeps_from_starting(fault: &Fault, side: Side) -> bool {
    match fault {
        Fault::StoreFull
        | Fault::StoreReadOnly
        | Fault::KbsClock(_)
        | Fault::KbsBroken
        | Fault::KbsGarbage => side == Side::Adaptor,
        Fault::NoFiles(of, _) => *of == side,
        _ => false,
    }
}

/// Runs the faults, and the checks that follow them.
async fn run_faults(scene: &PodScene, script: &Script, outcome: &mut Outcome) -> Result<()> {
    let places = [
        ("KATAAGENT", scene.kata_inbound),
        ("VMSERVICE", scene.vm_inbound),
        ("NODESERVICE", scene.node_inbound),
    ];
    if script.hit == Hit::Kubernetes {
        up(scene.kata_inbound, FIRST).await.context("before any fault")?;
    }
    let traffic = Traffic::start(&places, script.seed, script.request);
    let opened = Mutex::new(Vec::new());
    let began = Instant::now();
    let faults = async {
        let injected = script.faults.iter().map(|planned| inject_fault(scene, *planned));
        let (held, faults) = tokio::join!(hold(scene, script.hit), join_all(injected));
        faults.into_iter().fold(held, Result::and)
    };
    let faults = tokio::select! {
        faults = faults => faults,
        never = attack(scene, script, &opened) => match never {},
    };
    let over = Instant::now();
    faults?;
    let recovered = async {
        for (name, address) in places {
            up(address, BOUND).await.with_context(|| format!("after all faults: {name}"))?;
            outcome.recovery.get_or_insert_with(|| over.elapsed());
        }
        anyhow::Ok(())
    };
    recovered.await?;
    traffic.calm();
    let before = traffic.seen().finished;
    let calm = async {
        while traffic.seen().finished < before + CALM {
            sleep(PROBE).await;
        }
    };
    timeout(BOUND, calm).await.context("clients are not served although no fault is active")?;
    outcome.seen = traffic.end().await;
    outcome.ended = Ended::of(script, began, &outcome.seen);
    outcome.violations.append(&mut outcome.seen.violations);
    outcome.violations.extend(opened.into_inner().unwrap_or_else(PoisonError::into_inner));
    Ok(())
}

/// Until the KBS releases the keys to the VM, no tunnel of the Kubernetes phase may be reached.
async fn hold(scene: &PodScene, hit: Hit) -> Result<()> {
    let Hit::Attestation(held) = hit else { return Ok(()) };
    sleep(held).await;
    for (name, server) in
        [("KATAAGENT", &scene.kata), ("VMSERVICE", &scene.vm_service), ("NODESERVICE", &scene.node_service)]
    {
        if server.connections().await > 0 {
            bail!("{name} was reached in the Attestation phase");
        }
    }
    scene.release_keys()
}

async fn attack(scene: &PodScene, script: &Script, opened: &Mutex<Vec<String>>) -> Infallible {
    if let (true, Route::Proxy(_, agent)) = (script.attacker, &scene.route) {
        let record = |what| opened.lock().unwrap_or_else(PoisonError::into_inner).push(what);
        return attacker::attack_agent(*agent, scene.directory(), record).await;
    }
    std::future::pending().await
}

/// Retries until a request is answered.
pub(super) async fn up(address: SocketAddr, bound: Duration) -> Result<()> {
    let tries = async {
        let mut probes = JoinSet::new();
        let mut due = interval(PROBE);
        // Several at a time, so that a success is found soon although others hang.
        const AT_ONCE: usize = 50;
        for number in 0.. {
            tokio::select! {
                _ = due.tick(), if probes.len() < AT_ONCE => drop(probes.spawn(request(address, number))),
                Some(done) = probes.join_next(), if !probes.is_empty() => if let Ok(Ok(())) = done {
                    return;
                },
            }
        }
    };
    timeout(bound, tries).await.with_context(|| format!("not up within {} s", bound.as_secs()))
}

/// Requirements that every pod meets that is up and undisturbed.
async fn examine(scene: &PodScene, outcome: &mut Outcome) -> Result<()> {
    let before = scene.early.connections().await;
    let mut early = TcpStream::connect(scene.early_inbound).await.context("a client of EARLY")?;
    // The connection may be closed, but no byte may arrive.
    if let Ok(Ok(1..)) = timeout(LISTEN, early.read(&mut [0])).await {
        outcome.violations.push("a client of an Attestation-phase tunnel got an answer".to_owned());
    }
    drop(early);
    if scene.early.connections().await > before {
        outcome.violations.push("an Attestation-phase tunnel was reached in the Kubernetes phase".to_owned());
    }
    if let Route::Proxy(_, agent) = &scene.route {
        if attacker::may_attest(*agent).await {
            outcome.violations.push("an unproven peer may attest to a VM that runs a pod".to_owned());
        }
        if attacker::may_log_in(*agent, scene.directory()).await {
            outcome.violations.push("the attacker logged in to a VM that runs a pod".to_owned());
        }
    }
    if scene.bait.connections() > 0 {
        outcome.violations.push("a tunnel of the user data led to the attacker".to_owned());
    }
    if scene.has_published_keys()? {
        outcome.violations.push("the pod's keys are at the KBS while clients are served".to_owned());
    }
    for (side, most) in [(Side::Agent, AGENT), (Side::Adaptor, ADAPTOR)] {
        let (held, over) = idle(scene, side, &most).await?;
        match side {
            Side::Agent => outcome.agent = held,
            Side::Adaptor => outcome.adaptor = held,
        }
        outcome.violations.extend(over.map(|over| format!("the {side:?}, idle, holds {over}")));
    }
    Ok(())
}

/// What a process holds once its clients have left.
async fn idle(scene: &PodScene, side: Side, most: &Resources) -> Result<(Resources, Option<String>)> {
    let began = Instant::now();
    loop {
        let pid = scene.program(side).pid().with_context(|| format!("the {side:?} does not run"))?;
        let held = Resources::of(pid)?;
        let over = held.over(most);
        if over.is_none() || began.elapsed() > IDLE {
            return Ok((held, over));
        }
        sleep(PROBE).await;
    }
}

fn secrets(scene: &PodScene) -> Result<Secrets> {
    let mut secrets = Secrets::default();
    secrets.add_key("the KBS admin's key", scene.kbs.admin_key_pem())?;
    // The KBS has it only while the VM attests.
    let pod = std::fs::read_to_string(scene.store.path().join("pods").join(&scene.pod).join("key"));
    if let Ok(pem) = pod {
        secrets.add_key("the pod's key", &pem)?;
    }
    let node = std::fs::read_to_string(scene.store.path().join("worker-node.key"));
    if let Ok(pem) = node {
        secrets.add_key("the worker node's key", &pem)?;
    }
    secrets.check_any()?;
    Ok(secrets)
}

#[cfg(test)]
mod tests {
    use super::super::script::Planned;
    use super::super::traffic::Broken;
    use super::*;

    #[test]
    fn a_connection_that_ends_before_a_process_does_was_ended_by_the_network() {
        let (began, second) = (Instant::now(), Duration::from_secs(1));
        let mut script = Script::draw(1);
        script.hit = Hit::Kubernetes;
        let planned = |at, fault| Planned { at, lasts: second, fault };
        script.faults = vec![planned(second, Fault::Reset), planned(3 * second, Fault::Kill(Side::Agent))];
        let broken = |after: u32| Broken { at: began + after * second, what: format!("after {after} s") };
        let seen = Seen { broken: vec![broken(2), broken(4)], ..Seen::default() };
        let ended = Ended::of(&script, began, &seen);
        assert_eq!((ended.by_network, ended.by_others), (vec!["after 2 s".to_owned()], 1));
        script.faults.pop();
        let ended = Ended::of(&script, began, &seen);
        assert_eq!((ended.by_network.len(), ended.by_others), (2, 0));
    }
}
